// One row of linear_logprob. Compiled once for each instruction set; see isa.h.
#include "cpu/linear_logprob/isa.h"

#include <math.h>
#include <string.h>

#include "cpu/simd.h"

namespace clp {
namespace CLP_ISA {

constexpr double kLog2E = 1.4426950408889634, kLog2 = 0.6931471805599453;

// Calls body(first id, how many) for packs of 16 ids, the last one shorter.
template <class Body>
__attribute__((always_inline)) static inline void each_pack(int64_t V, const Body& body) {
  int64_t j = 0;
  for (; j + 16 <= V; j += 16) body(j, 16);
  if (j < V) body(j, int(V - j));
}

static inline Floats read(const float* z, int64_t j, int count, float filling) {
  if (count == 16) return load(z + j);
  float padded[16];
  for (int k = 0; k < 16; ++k) padded[k] = k < count ? z[j + k] : filling;
  return load(padded);
}

static inline void write(float* z, int64_t j, int count, Floats value) {
  if (count == 16) return store(z + j, value);
  float lanes[16];
  store(lanes, value);
  memcpy(z + j, lanes, size_t(count) * sizeof(float));
}

static float largest(const float* z, int64_t V) {
  Floats top = all(-INFINITY);
  each_pack(V, [&](int64_t j, int count) { top = maximum(read(z, j, count, -INFINITY), top); });
  float lanes[16], best = -INFINITY;
  store(lanes, top);
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}

// A sum in float64 of what was added up by fours in float32: widening every pack takes longer than
// its exponential.
struct Total {
  Sum wide = no_sum();
  Floats four = all(0.0f);
  int count = 0;
  void add(Floats value) {
    four = four + value;
    if (++count < 4) return;
    accumulate(wide, four);
    four = all(0.0f);
    count = 0;
  }
  double value() {
    accumulate(wide, four);
    double lanes[16], sum = 0;
    store(lanes, wide);
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// exp((z - top) / t) of packs.
struct Power {
  // log2(e) / t as two floats: one alone is off by 3e-8 for every id in the same direction.
  Floats high, low, floor;
  explicit Power(double temperature) {
    const double scale = kLog2E / temperature, least = -125.5 / scale;
    high = all(float(scale));
    low = all(float(scale - double(float(scale))));
    floor = all(float(least > -3e38 ? least : -3e38));
  }
  // d = z - top; y: its logarithm of base 2. At the floor and below the power is 0. NaN passes
  // through as the second argument of maximum.
  Floats operator()(Floats d, Floats* y) const {
    d = maximum(floor, d);
    *y = d * high + d * low;
    return where_equal(d, floor, all(0.0f), exp2(*y));
  }
};

static void forward(const LogprobArgs& a, int64_t t) {
  const int64_t C = a.C, target = a.targets[t] - a.first;
  float* const z = a.logits + t * C;
  float* const ref = a.ref_logits ? a.ref_logits + t * C : nullptr;
  const double temperature = double(a.temperature[t]);
  const Power power(temperature);
  LogprobState s = a.state[t];
  if (a.first == 0) s = {-INFINITY, 0, 0, 0, -INFINITY, 0, 0, -INFINITY};
  if (target >= 0 && target < C) s.at_target = double(z[target]);

  const float top = fmaxf(largest(z, C), float(s.top));
  // Of 0 where there was nothing before, and of 1 where there is nothing yet.
  const double gap = (s.top - double(top)) / temperature;
  const double factor = gap == 0.0 || top == -INFINITY ? 1.0 : ::exp(gap);
  if (s.mass > 0) s.weighted = factor * (s.weighted + gap * kLog2E * s.mass);
  s.mass *= factor;
  s.apart *= factor;
  s.top = double(top);
  a.factor[t] = float(factor);

  if (ref) {
    const float ref_top = fmaxf(largest(ref, C), float(s.ref_top));
    if (ref_top > -INFINITY) {
      Total sum;
      each_pack(C, [&](int64_t j, int count) {
        Floats y;
        sum.add(power(read(ref, j, count, -INFINITY) - all(ref_top), &y));
      });
      s.ref_mass = s.ref_mass * ::exp((s.ref_top - double(ref_top)) / temperature) + sum.value();
      s.ref_top = double(ref_top);
    }
  }
  const Floats zero = all(0.0f), most = all(top > -INFINITY ? top : 0.0f);
  const Floats before = all(float(s.shift));
  Total sum, weighted, apart;
  each_pack(C, [&](int64_t j, int count) {
    const Floats value = read(z, j, count, -INFINITY);
    Floats y;
    const Floats e = power(value - most, &y);
    sum.add(e);
    weighted.add(where_equal(e, zero, zero, e * y));
    if (a.gradient) write(z, j, count, e);
    if (!ref) return;
    // An id without probability counts for nothing, whatever the reference says of it.
    const Floats difference = (value - read(ref, j, count, 0.0f)) - before;
    apart.add(where_equal(e, zero, zero, e * difference));
    if (a.gradient) write(ref, j, count, where_equal(e, zero, zero, difference));
  });
  s.mass += sum.value();
  s.weighted += weighted.value();
  s.apart += apart.value();
  const double mean = s.apart / s.mass;
  // Not where it is infinite, or nothing has come yet.
  const double shift = mean - mean == 0.0 ? double(float(s.shift + mean)) : s.shift;
  a.moved[t] = float(s.shift - shift);
  if (s.shift != shift) s.apart += (s.shift - shift) * s.mass;
  s.shift = shift;
  if (ref && a.gradient) {
    each_pack(C, [&](int64_t j, int count) {
      const Floats e = read(z, j, count, 0.0f);
      const Floats difference = read(ref, j, count, 0.0f) + all(a.moved[t]);
      write(ref, j, count, where_equal(e, zero, zero, e * difference));
    });
  }
  a.state[t] = s;
}

static void backward(const LogprobBackwardArgs& a, int64_t t) {
  const int64_t C = a.C, target = a.targets[t] - a.first;
  float* const z = a.logits + t * C;
  float* const ref = a.ref_logits ? a.ref_logits + t * C : nullptr;
  if (a.targets[t] == -100) {
    memset(z, 0, size_t(C) * sizeof(float));
    if (ref) memset(ref, 0, size_t(C) * sizeof(float));
    return;
  }
  const double temperature = double(a.temperature[t]);
  const Power power(temperature);
  const LogprobState s = a.state[t];
  const Floats zero = all(0.0f), most = all(s.top > -INFINITY ? float(s.top) : 0.0f);
  const Floats least = all(s.ref_top > -INFINITY ? float(s.ref_top) : 0.0f);
  // e and e' times these are p / t and q / t.
  const Floats share = all(float(1.0 / (s.mass * temperature)));
  const Floats ref_share = all(float(1.0 / (s.ref_mass * temperature)));
  const Floats by_logprob = all(a.d_logprobs[t]);
  // log p + H = (y - weighted / mass) log 2
  const Floats by_entropy = all(a.d_entropy ? float(double(a.d_entropy[t]) * kLog2) : 0.0f);
  const Floats mean = all(float(s.weighted / s.mass));
  // log p/q - kl = (z - z' - shift - apart / mass) / t
  const Floats by_kl = all(ref ? float(double(a.d_kl[t]) / temperature) : 0.0f);
  const Floats d_kl = all(ref ? a.d_kl[t] : 0.0f);
  const Floats shift = all(float(s.shift)), rest = all(float(s.apart / s.mass));
  each_pack(C, [&](int64_t j, int count) {
    const Floats value = read(z, j, count, -INFINITY);
    Floats y;
    const Floats e = power(value - most, &y), p = e * share;
    Floats change = zero - by_logprob - by_entropy * (y - mean);
    if (ref) {
      const Floats ref_value = read(ref, j, count, -INFINITY);
      const Floats q = power(ref_value - least, &y) * ref_share;
      // An id without probability counts for nothing, whatever the reference says of it.
      const Floats difference = ((value - ref_value) - shift) - rest;
      change = change + by_kl * where_equal(e, zero, zero, difference);
      write(ref, j, count, d_kl * (q - p));
    }
    write(z, j, count, p * change);
  });
  if (target >= 0 && target < C) z[target] += float(double(a.d_logprobs[t]) / temperature);
}

}  // namespace CLP_ISA

const LogprobRow CLP_LOGPROB_ROW = {CLP_ISA::forward, CLP_ISA::backward};

}  // namespace clp
