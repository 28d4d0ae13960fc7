// One head of one row of slot_attention. Compiled once for each instruction set.
#include "cpu/slot_attention/isa.h"

#include <math.h>

#include "cpu/dots.h"
#include "cpu/simd.h"

namespace clp {
namespace CLP_ISA {

// Of one query, over the blocks so far.
struct SlotSoftmax {
  float maximum;  // of the scaled scores, -inf at first
  float sum;      // of exp(score - maximum), 0 at first
  float rescale;  // what sums over the earlier blocks are to be multiplied by
};

constexpr float kLeast = -87.3f;  // an exponential below e^kLeast, 1.2e-38, counts as nothing

// e^d, 0 below kLeast; for d <= 0. NaN passes through as the second argument of maximum.
static inline Floats power(Floats d) {
  const Floats least = all(kLeast), bounded = maximum(least, d);
  return where_equal(bounded, least, all(0.0f), exponential(bounded));
}

// By halves, which a compiler does in registers.
template <class Join>
static inline float reduce(Floats a, const Join& join) {
  float lanes[16];
  store(lanes, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] = join(lanes[k], lanes[k + half]);
  }
  return lanes[0];
}

// Takes a block's scores, `count` of kSlotBlock floats, to exp(scale score - maximum).
static void softmax_block(float* scores, int64_t count, float scale, SlotSoftmax* state) {
  const int64_t whole = count / 16 * 16;
  const Floats factor = all(scale);
  Floats top = all(-INFINITY);
  for (int64_t j = 0; j < whole; j += 16) {
    const Floats score = load(scores + j) * factor;
    store(scores + j, score);
    top = maximum(score, top);  // skips NaN, which the sum then has
  }
  if (whole < count) {
    for (int64_t j = whole; j < count; ++j) scores[j] *= scale;
    for (int64_t j = count; j < whole + 16; ++j) scores[j] = -INFINITY;
    top = maximum(load(scores + whole), top);
  }
  const float peak = reduce(top, [](float a, float b) { return a > b ? a : b; });
  const float before = state->maximum, now = peak > before ? peak : before;
  // Where all scores are -inf, all exponentials are 0, and the sum makes NaN of them in the end.
  const float shift = now == -INFINITY ? 0.0f : now;
  const Floats offset = all(shift);
  Floats sum = all(0.0f);
  for (int64_t j = 0; j < count; j += 16) {
    const Floats e = power(load(scores + j) - offset);
    store(scores + j, e);
    sum = sum + e;
  }
  // A larger maximum makes the earlier sums smaller; e^0 is exactly 1.
  float rescale[16];
  store(rescale, power(all(before - shift)));
  state->rescale = rescale[0];
  state->maximum = now;
  state->sum = state->sum * rescale[0] + reduce(sum, [](float a, float b) { return a + b; });
}

namespace lanes {

static int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// A thread's scratch memory: the group's sums over values, scores and softmaxes, then its queries as
// operands.
template <class T>
struct Scratch {
  using Operand = typename Format<T>::Operand;
  int64_t group, d, dv;  // d and dv padded
  explicit Scratch(const SlotAttentionArgs& a)
      : group(a.H / a.heads), d(padded<T>(a.d)), dv(whole_lanes(a.dv)) {}
  float* total(void* p) const { return static_cast<float*>(p); }
  float* scores(void* p) const { return total(p) + group * dv; }
  SlotSoftmax* softmax(void* p) const {
    return reinterpret_cast<SlotSoftmax*>(scores(p) + group * kSlotBlock);
  }
  Operand* q(void* p) const { return reinterpret_cast<Operand*>(softmax(p) + group); }
  int64_t bytes() const {
    return group * ((dv + kSlotBlock) * int64_t(sizeof(float)) + int64_t(sizeof(SlotSoftmax)) +
                    d * int64_t(sizeof(Operand)));
  }
};

// Adds the values of a block, weighted by its exponentials, to QUERIES sums: REGISTERS registers of
// the width, of which the only one is cut short to `part` lanes unless that is 0.
template <class T, int QUERIES, int REGISTERS, bool PART>
static void add_columns(const T* values, int64_t dv, int part, const float* powers, int64_t count,
                        const SlotSoftmax* softmax, float* total, int64_t total_row) {
  // Eight sums at least: a multiply-add takes as long as eight of them take to start.
  constexpr int kSums = QUERIES * REGISTERS, kSplit = kSums >= 8 ? 1 : 8 / kSums;
  Lanes sum[kSplit][QUERIES][REGISTERS];
  for (auto& one : sum) {
    for (auto& query : one) {
      for (Lanes& lanes : query) lanes = zero();
    }
  }
  const auto add = [&](int64_t j, int split) __attribute__((always_inline)) {
    Lanes value[REGISTERS];
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) {
      const T* const at = values + j * dv + r * kLanes;
      value[r] = PART ? load_part(at, part) : load(at);
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Lanes power = all(powers[q * kSlotBlock + j]);
#pragma GCC unroll 4
      for (int r = 0; r < REGISTERS; ++r) {
        sum[split][q][r] = multiply_add(power, value[r], sum[split][q][r]);
      }
    }
  };
  int64_t j = 0;
  for (; j + kSplit <= count; j += kSplit) {
#pragma GCC unroll 8
    for (int split = 0; split < kSplit; ++split) add(j + split, split);
  }
  for (; j < count; ++j) add(j, 0);
  for (int q = 0; q < QUERIES; ++q) {
    for (int r = 0; r < REGISTERS; ++r) {
      for (int split = 1; split < kSplit; ++split) {
        sum[0][q][r] = sum[0][q][r] + sum[split][q][r];
      }
      float* const at = total + q * total_row + r * kLanes;
      store(at, multiply_add(all(softmax[q].rescale), load(at), sum[0][q][r]));
    }
  }
}

template <class T, int QUERIES>
static void add_values(const T* values, int64_t dv, const float* powers, int64_t count,
                       const SlotSoftmax* softmax, float* total, int64_t total_row) {
  // With sixteen registers, eight sums leave room for what they are made of.
  constexpr int kMost = CLP_ISA_LEVEL < 2 && QUERIES > 2 ? 2 : 4;
  int64_t c = 0;
  for (; c + kMost * kLanes <= dv; c += kMost * kLanes) {
    add_columns<T, QUERIES, kMost, false>(values + c, dv, 0, powers, count, softmax, total + c,
                                          total_row);
  }
  if (kMost > 2 && c + 2 * kLanes <= dv) {
    add_columns<T, QUERIES, 2, false>(values + c, dv, 0, powers, count, softmax, total + c,
                                      total_row);
    c += 2 * kLanes;
  }
  if (c + kLanes <= dv) {
    add_columns<T, QUERIES, 1, false>(values + c, dv, 0, powers, count, softmax, total + c,
                                      total_row);
    c += kLanes;
  }
  if (c < dv) {
    add_columns<T, QUERIES, 1, true>(values + c, dv, int(dv - c), powers, count, softmax, total + c,
                                     total_row);
  }
}

template <class T>
static void round_row(const float* total, float sum, int64_t count, T* out) {
  const Lanes factor = all(1.0f / sum);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(out + c, load(total + c) * factor);
  if (c < count) store_part(out + c, load(total + c) * factor, int(count - c));
}

template <class T>
static void head(const SlotAttentionArgs& a, void* scratch, int64_t b, int64_t h) {
  const Scratch<T> s(a);
  float *const total = s.total(scratch), *const scores = s.scores(scratch);
  SlotSoftmax* const states = s.softmax(scratch);
  const int64_t n = a.lengths[b], slot = ((a.first + b) * a.heads + h) * a.capacity;
  T* const keys = static_cast<T*>(a.keys) + slot * a.d;
  T* const values = static_cast<T*>(a.values) + slot * a.dv;
  memcpy(keys + n * a.d, static_cast<const T*>(a.k) + b * a.k_row + h * a.k_head,
         size_t(a.d) * sizeof(T));
  memcpy(values + n * a.dv, static_cast<const T*>(a.v) + b * a.v_row + h * a.v_head,
         size_t(a.dv) * sizeof(T));
  const T* const q = static_cast<const T*>(a.q) + b * a.q_row + h * s.group * a.q_head;
  for (int64_t g = 0; g < s.group; ++g) {
    convert_row<T>(q + g * a.q_head, a.d, s.q(scratch) + g * s.d);
    states[g] = {-INFINITY, 0.0f, 0.0f};
  }
  memset(total, 0, size_t(s.group * s.dv) * sizeof(float));
  for (int64_t j = first_seen(a, n); j <= n; j += kSlotBlock) {
    const int64_t count = n + 1 - j < kSlotBlock ? n + 1 - j : kSlotBlock;
    dots<T, 1>({s.q(scratch), s.d, 0, keys + j * a.d, a.d, 0, 1, a.d}, s.group, count, scores,
               kSlotBlock);
    for (int64_t g = 0; g < s.group; ++g) {
      softmax_block(scores + g * kSlotBlock, count, a.scale, states + g);
    }
    const T* const block = values + j * a.dv;
    for (int64_t g = 0; g < s.group; g += 4) {
      const auto add = [&](auto function) {
        function(block, a.dv, scores + g * kSlotBlock, count, states + g, total + g * s.dv, s.dv);
      };
      switch (s.group - g) {
        case 1:
          add(add_values<T, 1>);
          break;
        case 2:
          add(add_values<T, 2>);
          break;
        case 3:
          add(add_values<T, 3>);
          break;
        default:
          add(add_values<T, 4>);
      }
    }
  }
  T* const out = static_cast<T*>(a.out) + (b * a.H + h * s.group) * a.dv;
  for (int64_t g = 0; g < s.group; ++g) {
    round_row(total + g * s.dv, states[g].sum, a.dv, out + g * a.dv);
  }
}

template <class Body>
static auto typed(const SlotAttentionArgs& a, const Body& body) {
  if (a.dtype == DType::kBFloat16) return body(BFloat16());
  if (a.dtype == DType::kFloat16) return body(Float16());
  return body(float());
}

static int64_t scratch_bytes(const SlotAttentionArgs& a) {
  return typed(a, [&](auto T) { return Scratch<decltype(T)>(a).bytes(); });
}

static void head_any(const SlotAttentionArgs& a, void* scratch, int64_t b, int64_t h) {
  typed(a, [&](auto T) { head<decltype(T)>(a, scratch, b, h); });
}

}  // namespace lanes
}  // namespace CLP_ISA

const SlotAttentionKernels CLP_SLOT_ATTENTION_KERNELS{CLP_ISA::lanes::scratch_bytes,
                                                      CLP_ISA::lanes::head_any};

}  // namespace clp
