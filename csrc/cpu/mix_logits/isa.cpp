// One slice of one row of mix_logits and its gradients. Compiled once for each instruction set; see
// isa.h.
#include "cpu/mix_logits/isa.h"

#include <math.h>
#include <string.h>

#include <type_traits>

#include "cpu/simd.h"

namespace clp {
namespace CLP_ISA {

constexpr int kPacks = 4;  // at a time
// An exponential below e^kLeast, 1.2e-38, counts as nothing. Where the mixture is at least kPlain,
// that is nothing to it (2^-61); elsewhere the largest is divided out first.
constexpr float kLeast = -87.3f;
constexpr float kPlain = 0x1p-64f;
constexpr float kSmallest = 0x1p-126f;  // normal number

static inline float masked(const float*) { return -INFINITY; }
static inline BFloat16 masked(const BFloat16*) { return {0xff80}; }
static inline Float16 masked(const Float16*) { return {0xfc00}; }

// The first `left` lanes from memory, and beyond logits of -inf, which take part in nothing, or
// gradients of 0. WHOLE: there are 16.
template <bool WHOLE, class T>
static inline Floats read_padded(const T* p, int64_t left, T padding) {
  if (WHOLE || left >= 16) return load(p);
  T padded[16];
  for (T& one : padded) one = padding;
  if (left > 0) memcpy(padded, p, size_t(left) * sizeof(T));
  return load(padded);
}
template <bool WHOLE = false, class T>
static inline Floats read(const T* p, int64_t left) {
  return read_padded<WHOLE>(p, left, masked(p));
}
template <bool WHOLE = false, class T>
static inline Floats read_gradient(const T* p, int64_t left) {
  return read_padded<WHOLE>(p, left, T{});
}

template <bool WHOLE = false, class T>
static inline void write(T* p, int64_t left, Floats value) {
  if (WHOLE || left >= 16) return store(p, value);
  T lanes[16];
  store(lanes, value);
  if (left > 0) memcpy(p, lanes, size_t(left) * sizeof(T));
}

// Calls body(whole, j) for groups of kPacks: whole.value is false for a last one that is shorter.
template <class Body>
__attribute__((always_inline)) static inline void each_group(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + 16 * kPacks <= count; j += 16 * kPacks) body(std::true_type(), j);
  if (j < count) body(std::false_type(), j);
}

template <class T>
static inline const T* logits_of(const MixTerm& term) {
  return static_cast<const T*>(term.logits);
}

static double total(const Sum& sum) {
  double lanes[16], all = 0;
  store(lanes, sum);
  for (double lane : lanes) all += lane;
  return all;
}

// e^d, 0 below kLeast; for d <= 0. NaN passes through as the second argument of maximum.
static inline Floats power(Floats d) {
  const Floats least = all(kLeast), bounded = maximum(least, d);
  return where_equal(bounded, least, all(0.0f), exponential(bounded));
}

// e^d for any d: underflows to 0, overflows to +inf.
static inline Floats wide_power(Floats d) {
  const Floats zero = all(0.0f), half = d * all(0.5f);
  const Floats most = zero - maximum(all(kLeast), zero - half);
  const Floats root = exponential(maximum(all(kLeast), most));
  return root * root;
}

template <class T>
static void sum_exp_as(const T* row, int64_t count, float* powers, MixSumExp* out) {
  Floats top = all(-INFINITY);
  each_group(count, [&](auto whole, int64_t j) {
    for (int k = 0; k < kPacks; ++k) {
      top = maximum(read<whole.value>(row + j + 16 * k, count - j - 16 * k), top);
    }
  });
  float lanes[16], peak = -INFINITY;
  store(lanes, top);
  for (float lane : lanes) peak = lane > peak ? lane : peak;
  const Floats shift = all(peak == -INFINITY ? 0.0f : peak);
  Sum sum = no_sum();
  each_group(count, [&](auto whole, int64_t j) {
    Floats e[kPacks];
    for (int k = 0; k < kPacks; ++k) {
      e[k] = power(read<whole.value>(row + j + 16 * k, count - j - 16 * k) - shift);
      store(powers + j + 16 * k, e[k]);
    }
    accumulate(sum, (e[0] + e[1]) + (e[2] + e[3]));
  });
  *out = {peak, total(sum)};
}

// With the rule that an active -inf decides, whatever stands beside it.
template <class T>
static Floats masked_geometric(const MixRow& row, int64_t at, int64_t left) {
  const Floats zero = all(0.0f), one = all(1.0f), minus = all(-INFINITY);
  Floats value = zero, blocked = zero;
  for (int64_t t = 0; t < row.active; ++t) {
    const Floats logit = read(logits_of<T>(row.terms[t]) + at, left);
    value = value + logit * all(row.terms[t].weight);
    blocked = where_equal(logit, minus, one, blocked);
  }
  return where_equal(blocked, one, minus, value);
}

// kPacks of z. Where it is finite no active logit was -inf.
template <class T, bool WHOLE>
static inline void geometric(const MixRow& row, int64_t at, int64_t left, Floats* z) {
  const Floats zero = all(0.0f);
  for (int k = 0; k < kPacks; ++k) z[k] = zero;
  for (int64_t t = 0; t < row.active; ++t) {
    const T* const logits = logits_of<T>(row.terms[t]) + at;
    const Floats weight = all(row.terms[t].weight);
    for (int k = 0; k < kPacks; ++k) {
      z[k] = z[k] + read<WHOLE>(logits + 16 * k, left - 16 * k) * weight;
    }
  }
  for (int k = 0; k < kPacks; ++k) {
    if (equal(z[k] - z[k], zero) != 0xffffu) {
      z[k] = masked_geometric<T>(row, at + 16 * k, left - 16 * k);
    }
  }
}

// l_i less the row's maximum.
template <class T>
static inline Floats distance(const MixTerm& term, int64_t at, int64_t left) {
  return read(logits_of<T>(term) + at, left) - all(term.maximum);
}

// exp(-shift) sum_i w_i / W p_i.
template <class T>
static inline Floats mixture(const MixRow& row, int64_t at, int64_t left, Floats shift) {
  Floats sum = all(0.0f);
  for (int64_t t = 0; t < row.active; ++t) {
    const MixTerm& term = row.terms[t];
    sum = sum + power(distance<T>(term, at, left) - shift) * all(term.whole.coefficient);
  }
  return sum;
}

// The largest distance at each id: with it as the shift no mixture is too small for a float. Where
// that is -inf there is no mixture, `shift` is 0 and what comes of it is overwritten.
template <class T>
static inline Floats largest(const MixRow& row, int64_t at, int64_t left, Floats* shift) {
  Floats most = all(-INFINITY);
  for (int64_t t = 0; t < row.active; ++t) {
    most = maximum(distance<T>(row.terms[t], at, left), most);
  }
  *shift = where_equal(most, all(-INFINITY), all(0.0f), most);
  return most;
}

template <class T>
static Floats small_probability(const MixRow& row, int64_t at, int64_t left) {
  Floats shift;
  const Floats most = largest<T>(row, at, left, &shift);
  const Floats sum = maximum(mixture<T>(row, at, left, shift), all(kSmallest));
  return most + log(sum) + all(row.log_total);
}

template <class T>
static inline Floats probability(const MixRow& row, int64_t at, int64_t left) {
  if (row.active == 1) return distance<T>(row.terms[0], at, left) + all(row.log_total);
  Floats sum = all(0.0f);
  for (int64_t t = 0; t < row.active; ++t) {
    sum = sum + load(row.terms[t].powers + at) * all(row.terms[t].slice.coefficient);
  }
  if (at_most(all(kPlain), sum) != 0xffffu) return small_probability<T>(row, at, left);
  return log(sum) + all(row.log_total);
}

// T: of the logits; Z: of z.
template <class T, class Z>
static void mix_as(const MixRow& row, int64_t first, int64_t count, Z* out) {
  Z* const z = out + first;
  if (row.probability) {
    for (int64_t j = 0; j < count; j += 16) {
      write(z + j, count - j, probability<T>(row, first + j, count - j));
    }
    return;
  }
  each_group(count, [&](auto whole, int64_t j) {
    Floats value[kPacks];
    geometric<T, whole.value>(row, first + j, count - j, value);
    for (int k = 0; k < kPacks; ++k) {
      write<whole.value>(z + j + 16 * k, count - j - 16 * k, value[k]);
    }
  });
}

template <class T>
static void geometric_gradients(const MixRow& row, const T* dz, int64_t first, int64_t count,
                                bool out, Sum* sums) {
  const Floats zero = all(0.0f), minus = all(-INFINITY);
  each_group(count, [&](auto whole, int64_t j) {
    Floats z[kPacks], upstream[kPacks];
    geometric<T, whole.value>(row, first + j, count - j, z);
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = first + j + 16 * k, left = count - j - 16 * k;
      upstream[k] = where_equal(z[k], minus, zero, read_gradient<whole.value>(dz + at, left));
    }
    for (int64_t t = 0; t < row.count; ++t) {
      const MixTerm& term = row.terms[t];
      Floats part = zero;
      for (int k = 0; k < kPacks; ++k) {
        const int64_t at = first + j + 16 * k, left = count - j - 16 * k;
        const Floats gradient = upstream[k] * all(term.weight);
        if (out) write<whole.value>(static_cast<T*>(term.d_logits) + at, left, gradient);
        if (sums) {
          const Floats logit = read<whole.value>(logits_of<T>(term) + at, left);
          part = part + upstream[k] * where_equal(logit, minus, zero, logit);
        }
      }
      if (sums) accumulate(sums[t], part);
    }
  });
}

// A pack where some of the mixture is too small for probability_gradients.
template <class T>
static void small_gradients(const MixRow& row, const T* dz, int64_t at, int64_t left, bool out,
                            Sum* sums) {
  const Floats zero = all(0.0f), minus = all(-INFINITY);
  Floats shift;
  const Floats most = largest<T>(row, at, left, &shift);
  const Floats sum = maximum(mixture<T>(row, at, left, shift), all(kSmallest));
  const Floats inverse = all(1.0f) / sum;
  const Floats upstream = where_equal(most, minus, zero, read_gradient(dz + at, left));
  for (int64_t t = 0; t < row.count; ++t) {
    const MixTerm& term = row.terms[t];
    const Floats d = distance<T>(term, at, left);
    // A term without weight may lie far above those that have one.
    const Floats e = t < row.active ? power(d - shift) : wide_power(d - shift);
    const Floats ratio = where_equal(most, minus, zero, e * all(term.whole.inverse_sum) * inverse);
    const Floats share = upstream * ratio;
    if (sums) accumulate(sums[t], share);
    if (!out) continue;
    const Floats pulled = share * all(term.weight) - power(d) * all(term.whole.pull);
    write(static_cast<T*>(term.d_logits) + at, left, t < row.active ? pulled : zero);
  }
}

template <class T>
static void probability_gradients(const MixRow& row, const T* dz, int64_t first, int64_t count,
                                  bool out, Sum* sums) {
  const Floats zero = all(0.0f);
  each_group(count, [&](auto whole, int64_t j) {
    Floats sum[kPacks], inverse[kPacks], upstream[kPacks];
    bool plain[kPacks];
    for (Floats& one : sum) one = zero;
    for (int64_t t = 0; t < row.active; ++t) {
      const MixTerm& term = row.terms[t];
      for (int k = 0; k < kPacks; ++k) {
        const Floats e = load(term.powers + first + j + 16 * k);
        sum[k] = sum[k] + e * all(term.slice.coefficient);
      }
    }
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = first + j + 16 * k, left = count - j - 16 * k;
      plain[k] = at_most(all(kPlain), sum[k]) == 0xffffu;
      inverse[k] = plain[k] ? all(1.0f) / sum[k] : zero;
      upstream[k] = plain[k] ? read_gradient<whole.value>(dz + at, left) : zero;
    }
    for (int64_t t = 0; t < row.count; ++t) {
      const MixTerm& term = row.terms[t];
      const bool active = t < row.active;
      Floats part = zero;
      for (int k = 0; k < kPacks; ++k) {
        const int64_t at = first + j + 16 * k, left = count - j - 16 * k;
        const Floats e = load(term.powers + at);
        const Floats ratio = e * all(term.slice.inverse_sum) * inverse[k];
        const Floats share = upstream[k] * ratio;
        part = part + share;
        if (!out) continue;
        const Floats pulled = share * all(term.weight) - e * all(term.slice.pull);
        write<whole.value>(static_cast<T*>(term.d_logits) + at, left, active ? pulled : zero);
      }
      if (sums) accumulate(sums[t], part);
    }
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = first + j + 16 * k, left = count - j - 16 * k;
      if (!plain[k] && left > 0) small_gradients<T>(row, dz, at, left, out, sums);
    }
  });
}

template <class T>
static void gradients_as(const MixRow& row, const void* dz, int64_t first, int64_t count,
                         bool out, void* scratch, double* results) {
  Sum* const sums = results ? static_cast<Sum*>(scratch) : nullptr;
  for (int64_t t = 0; sums && t < row.count; ++t) sums[t] = no_sum();
  const T* const upstream = static_cast<const T*>(dz);
  if (row.probability) {
    probability_gradients<T>(row, upstream, first, count, out, sums);
  } else {
    geometric_gradients<T>(row, upstream, first, count, out, sums);
  }
  for (int64_t t = 0; sums && t < row.count; ++t) results[t] = total(sums[t]);
}

static void sum_exp(const void* logits, DType dtype, int64_t first, int64_t count,
                    float* powers, MixSumExp* out) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_exp_as(static_cast<const float*>(logits) + first, count, powers, out);
    case DType::kBFloat16:
      return sum_exp_as(static_cast<const BFloat16*>(logits) + first, count, powers, out);
    default:
      return sum_exp_as(static_cast<const Float16*>(logits) + first, count, powers, out);
  }
}

template <class T>
static void mix_from(const MixRow& row, int64_t first, int64_t count, void* z) {
  if (row.relative) return mix_as<T>(row, first, count, static_cast<float*>(z));
  mix_as<T>(row, first, count, static_cast<T*>(z));
}

static void mix(const MixRow& row, int64_t first, int64_t count, void* z) {
  switch (row.dtype) {
    case DType::kFloat32:
      return mix_from<float>(row, first, count, z);
    case DType::kBFloat16:
      return mix_from<BFloat16>(row, first, count, z);
    default:
      return mix_from<Float16>(row, first, count, z);
  }
}

static void gradients(const MixRow& row, const void* dz, int64_t first, int64_t count, bool out,
                      void* scratch, double* sums) {
  switch (row.dtype) {
    case DType::kFloat32:
      return gradients_as<float>(row, dz, first, count, out, scratch, sums);
    case DType::kBFloat16:
      return gradients_as<BFloat16>(row, dz, first, count, out, scratch, sums);
    default:
      return gradients_as<Float16>(row, dz, first, count, out, scratch, sums);
  }
}

}  // namespace CLP_ISA

const MixKernels CLP_MIX_KERNELS = {CLP_ISA::sum_exp, CLP_ISA::mix, CLP_ISA::gradients};

}  // namespace clp
