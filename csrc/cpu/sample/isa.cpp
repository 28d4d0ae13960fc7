// One slice of one row: mix (mix.h), sum the exponentials, draw. Compiled once for each instruction
// set with CLP_ISA (namespace), CLP_ISA_LEVEL and CLP_SAMPLE_KERNELS (name of the table) defined.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/sample/isa.h"
#include "cpu/sample/mix.h"
#include "cpu/simd.h"

namespace clp {
namespace CLP_ISA {

// The best id of a slice so far. z/t + g > s is -log(u) < exp(z/t - s), so with the
// e = exp((z - peak)/t) of the sum at hand, an id can win only if 1 - u <= e * exp(peak/t - s).
// That test needs no logarithm, and the exact float64 score is computed for the few that pass.
struct Best {
  const float* z;
  int64_t first;
  float peak;  // the largest z of the slice
  double temperature;
  double to_beat;  // the larger of the caller's and our own best score
  double score;
  int64_t token;
  float logit;
  float gain;  // exp(peak/t - to_beat) * 2^24, rounded up

  void set_gain() {
    // 1e-4 covers e (5e-6 off) and the products. A score so large that noise is lost in its rounding
    // needs no more: ids enter in ascending order, so a tie that is pruned would have lost anyway.
    // exp(60) * 2^24 still is a float.
    const double room = double(peak) / temperature - to_beat + 1e-4;
    gain = float(exp(room < 60.0 ? room : 60.0) * 0x1p24);
  }

  void enter(int64_t j, uint32_t word) {
    const double value = double(z[j]) / temperature + philox_gumbel(word);
    if (!(value > score || (value == score && first + j < token))) return;
    score = value;
    token = first + j;
    logit = z[j];
    if (score > to_beat) {
      to_beat = score;
      set_gain();
    }
  }
};

// 1 - u in units of 2^-24, rounded down.
static inline uint32_t shortfall(uint32_t word) { return (word >> 8) ^ 0xffffffu; }
static inline Words shortfall(Words word) { return shift_right<8>(word) ^ all_words(0xffffffu); }

__attribute__((noinline)) static void enter_group(Best& best, int64_t j, const Words words[4],
                                                  const Floats e[4]) {
  uint32_t word[kGroup];
  float weight[kGroup];
  for (int k = 0; k < 4; ++k) {
    store(word + 16 * k, words[k]);
    store(weight + 16 * k, e[k]);
  }
  for (int i = 0; i < kGroup; ++i) {
    if (float(int32_t(shortfall(word[i]))) <= weight[i] * best.gain) best.enter(j + i, word[i]);
  }
}

// Sum of exp((z - peak)/t) over the slice; with DRAW, draws on the way.
template <bool DRAW>
static double sum_slice(const float* z, int64_t count, float peak, double temperature,
                        const PhiloxKeys* keys, Best* best) {
  const double scale = kLog2E / temperature;
  const double least = -125.5 / scale > -3e38 ? -125.5 / scale : -3e38;
  // Two floats for log2(e)/t: one alone is off by 3e-8 for every id in the same direction.
  const Floats high = all(float(scale)), low = all(float(scale - double(float(scale))));
  const Floats floor = all(float(least)), top = all(peak);
  Sum sum = no_sum();
  for (int64_t j = 0; j < count; j += kGroup) {
    Floats e[4];
    for (int k = 0; k < 4; ++k) {
      // NaN passes through as the second argument of maximum, and ends in the sum.
      const Floats d = maximum(floor, load(z + j + 16 * k) - top);
      e[k] = exp2(d * high + d * low);
    }
    accumulate(sum, (e[0] + e[1]) + (e[2] + e[3]));
    if (!DRAW) continue;
    const Floats gain = all(best->gain);
    const Floats most = maximum(maximum(e[0], e[1]), maximum(e[2], e[3]));
    // 1 - u is at least 2^-33, that is 2^-9 in units of 2^-24: below it no noise is enough.
    if (at_most(all(0x1p-9f), most * gain) == 0) continue;
    Words words[4];
    philox64(*keys, uint32_t((best->first + j) / 4), words);
    uint32_t passed = 0;
    for (int k = 0; k < 4; ++k) {
      passed |= at_most(to_floats(shortfall(words[k])), e[k] * gain);
    }
    if (passed != 0) enter_group(*best, j, words, e);
  }
  double lanes[16], total = 0;
  store(lanes, sum);
  for (double lane : lanes) total += lane;
  return total;
}

static int64_t find(const float* z, float value) {
  for (int64_t j = 0;; j += 16) {
    const uint32_t mask = equal(load(z + j), all(value));
    if (mask != 0) return j + __builtin_ctz(mask);
  }
}

static bool has_nan(const float* z, int64_t count) {
  uint32_t same = 0xffffu;
  for (int64_t j = 0; j < count; j += 16) same &= equal(load(z + j), load(z + j));
  return same != 0xffffu;
}

static void reduce(const SampleTask& task, double to_beat, const float* z, SamplePartial* out) {
  const float peak = out->maximum;
  if (peak == -INFINITY) out->sum = has_nan(z, task.count) ? double(NAN) : 0.0;
  if (peak == INFINITY) out->sum = double(NAN);
  if (fabsf(peak) == INFINITY) return;
  const bool greedy = task.temperature == 0;
  const double temperature = greedy ? 1.0 : task.temperature;
  const double top = double(peak) / temperature;
  if (greedy || top + kGumbelMax < to_beat) {
    out->sum = sum_slice<false>(z, task.count, peak, temperature, nullptr, nullptr);
    if (!greedy || double(peak) <= to_beat) return;
    out->score = double(peak);
    out->logit = peak;
    out->token = task.first + find(z, peak);
    return;
  }
  Best best{z, task.first, peak, temperature, to_beat, -INFINITY, -1, 0.0f, 0.0f};
  best.set_gain();
  if (to_beat < top + kGumbelMin) {
    // Without a good score to beat everything would pass: start from the largest logit.
    const int64_t j = find(z, peak), v = task.first + j;
    best.enter(j, philox_block(task.seed, task.position, uint32_t(v / 4)).x[v % 4]);
  }
  const PhiloxKeys keys = philox_keys(task.seed, task.position);
  out->sum = sum_slice<true>(z, task.count, peak, temperature, &keys, &best);
  out->score = best.score;
  out->logit = best.logit;
  out->token = best.token;
}

static void slice(const SampleTask& task, double to_beat, SamplePartial* out) {
  alignas(64) float z[kSampleSlice];
  for (bool masked : {false, true}) {
    *out = {mix(task, masked, z), 0.0f, 0.0, -INFINITY, -1};
    reduce(task, to_beat, z, out);
    if (out->sum == out->sum) return;
  }
}

// For kGroup ids their bins, and exp((z - maximum) / temperature) relative to the bin's; beyond the last
// bin 1. Polynomial of exp on [-1/32, 1/32], 8e-14 off and exact at 0. In the compiler's own vectors, which
// round lane by lane alike however many registers they take.
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));

static inline void exp_in_bin(const float* z, double maximum, double scale, double* e,
                              int64_t* bins) {
  constexpr double kMagic = 0x1.8p52;  // adding it rounds to an integer, in the low bits
  const Doubles last = {kSampleBins - 1, kSampleBins - 1, kSampleBins - 1, kSampleBins - 1};
  for (int64_t j = 0; j < kGroup; j += 4) {
    Quad four;
    memcpy(&four, z + j, sizeof(four));
    // Sixteenths of the temperature below the maximum.
    Doubles y = (maximum - __builtin_convertvector(four, Doubles)) * scale;
    y = y < last ? y : last;
    const Doubles shifted = y + kMagic;
    const Doubles f = (shifted - kMagic) - y, f2 = f * f;
    const Doubles power = (f * 0x1.0000000000000p-4 + 1.0) +
                          (f * 0x1.555555534d329p-15 + 0x1.fffffff8e3841p-10) * f2 +
                          (f * 0x1.11131933616ffp-27 + 0x1.5558e39249274p-21) * (f2 * f2);
    memcpy(e + j, &power, sizeof(power));
    const Longs place = Longs(shifted) & 0xffff;
    memcpy(bins + j, &place, sizeof(place));
  }
}

template <bool COUNTED>
static void mass_as(const float* z, int64_t count, double maximum, double scale,
                    SampleBins* bins) {
  constexpr double kMagic = 1.5 * 0x1p52 * kSampleMassUnit;
  const Doubles magic = {kMagic, kMagic, kMagic, kMagic};
  double e[kGroup];
  int64_t units[kGroup], place[kGroup];
  for (int64_t j = 0; j < count; j += kGroup) {
    exp_in_bin(z + j, maximum, scale, e, place);
    for (int64_t k = 0; k < kGroup; k += 4) {
      Doubles power;
      memcpy(&power, e + k, sizeof(power));
      const Longs integer = Longs(power + magic) - Longs(magic);
      memcpy(units + k, &integer, sizeof(integer));
    }
    const auto add = [&](int64_t k) {
      bins->mass[k % 2][place[k]] += units[k];
      if (COUNTED) ++bins->count[k % 2][place[k]];
    };
    if (count - j >= kGroup) {
#pragma GCC unroll 8
      for (int64_t k = 0; k < kGroup; ++k) add(k);
    } else {
      for (int64_t k = 0; k < count - j; ++k) add(k);
    }
  }
}

static void mass(const float* z, int64_t count, float maximum, double temperature, bool counted,
                 SampleBins* bins) {
  const auto add = counted ? mass_as<true> : mass_as<false>;
  add(z, count, double(maximum), 16 / temperature, bins);
}

// The ids with low <= z <= high in ascending order; returns how many.
static int64_t collect(const float* z, int64_t first, int64_t count, float low, float high,
                       SampleCandidate* out) {
  int64_t found = 0;
  for (int64_t j = 0; j < count; j += 16) {
    const Floats value = load(z + j);
    uint32_t mask = at_most(all(low), value) & at_most(value, all(high));
    if (count - j < 16) mask &= (1u << (count - j)) - 1;  // not the filling
    for (; mask != 0; mask &= mask - 1) {
      const int64_t k = j + __builtin_ctz(mask);
      out[found++] = {z[k], uint32_t(first + k), 0.0};
    }
  }
  return found;
}

// Gives candidates their mass, and keeps those of one bin (all where bin < 0); returns how many.
static int64_t weigh(SampleCandidate* c, int64_t count, float maximum, double temperature,
                     int bin) {
  const double* const masses = sample_bin_masses();
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += kGroup) {
    float z[kGroup];
    double e[kGroup];
    int64_t place[kGroup];
    const int64_t n = count - i < kGroup ? count - i : kGroup;
    for (int64_t k = 0; k < kGroup; ++k) z[k] = k < n ? c[i + k].z : maximum;
    exp_in_bin(z, double(maximum), 16 / temperature, e, place);
    for (int64_t k = 0; k < n; ++k) {
      c[kept] = {z[k], c[i + k].id, e[k] * masses[place[k]]};
      kept += bin < 0 || place[k] == bin;
    }
  }
  return kept;
}

static int64_t gather(const float* z, int64_t first, int64_t count, float maximum,
                      double temperature, int bin, SampleCandidate* out) {
  // Half a bin more on either side: what rounds into it is found by its place.
  const double step = temperature / 16;
  const double low = bin == kSampleBins - 1 ? -INFINITY : double(maximum) - (bin + 1) * step;
  const double high = double(maximum) - (bin - 1) * step;
  const int64_t found = collect(z, first, count, float(low), float(high), out);
  return weigh(out, found, maximum, temperature, bin);
}

static int64_t keep(const float* z, int64_t first, int64_t count, float maximum,
                    double temperature, float least, SampleCandidate* out) {
  const int64_t found = collect(z, first, count, least, INFINITY, out);
  return weigh(out, found, maximum, temperature, -1);
}

static void draw(const SampleTask& task, double to_beat, float maximum, float peak, float least,
                 const float* z, SamplePartial* out) {
  *out = {peak, 0.0f, 0.0, -INFINITY, -1};
  if (!(peak >= least)) return;
  const double temperature = task.temperature;
  Best best{z, task.first, maximum, temperature, to_beat, -INFINITY, -1, 0.0f, 0.0f};
  if (to_beat < double(peak) / temperature + kGumbelMin) {
    // Without a good score to beat everything would pass: start from the largest logit.
    const int64_t j = find(z, peak), v = task.first + j;
    best.enter(j, philox_block(task.seed, task.position, uint32_t(v / 4)).x[v % 4]);
  }
  // The test of Best in the logarithm of base 2: no exponential is needed, because the bits of a float
  // x are at most log2(x) + 127, in units of 2^-23, and at least that less 0.09.
  constexpr double kUnit = 0x1p23;
  const auto reach = [&]() {  // of an id at the maximum
    const double room = (double(maximum) / temperature - best.to_beat) * kLog2E;
    // 1e-3 covers what float32 rounds: |y| < 200 where an id can win, times 2^-22.
    return float((fmin(room, 100.0) + (24 + 127 + 1e-3)) * kUnit);
  };
  const double wide = kLog2E / temperature * kUnit;
  const Floats scale = all(float(wide < 3e38 ? wide : 3e38)), top = all(maximum);
  // 1 - u is at least 2^-33, 2^-9 in units of 2^-24: below it no noise is enough.
  const Floats hopeless = all(float((127 - 9) * kUnit)), bound = all(least);
  const PhiloxKeys keys = philox_keys(task.seed, task.position);
  Floats most = all(reach());
  for (int64_t j = 0; j < task.count; j += kGroup) {
    Floats value[4];
    uint32_t live[4];
    for (int k = 0; k < 4; ++k) {
      const Floats one = load(z + j + 16 * k);
      value[k] = (one - top) * scale + most;
      live[k] = at_most(bound, one) & at_most(hopeless, value[k]);
    }
    if ((live[0] | live[1] | live[2] | live[3]) == 0) continue;
    Words words[4];
    philox64(keys, uint32_t((task.first + j) / 4), words);
    uint64_t passed = 0;
    for (int k = 0; k < 4; ++k) {
      const Floats log = to_floats(bits(to_floats(shortfall(words[k]))));
      passed |= uint64_t(live[k] & at_most(log, value[k])) << (16 * k);
    }
    if (passed == 0) continue;
    uint32_t word[kGroup];
    for (int k = 0; k < 4; ++k) store(word + 16 * k, words[k]);
    for (; passed != 0; passed &= passed - 1) {
      const int i = __builtin_ctzll(passed);
      best.enter(j + i, word[i]);
    }
    most = all(reach());
  }
  out->score = best.score;
  out->logit = best.logit;
  out->token = best.token;
}

static bool mix_slice(const SampleTask& task, float* z, float* maximum) {
  for (bool masked : {false, true}) {
    *maximum = mix(task, masked, z);
    if (*maximum < INFINITY && !has_nan(z, task.count)) return true;
  }
  return false;
}

static void uniform(int64_t seed, int64_t position, int64_t count, double* out) {
  const PhiloxKeys keys = philox_keys(seed, position);
  for (int64_t j = 0; j < count; j += kGroup) {
    Words words[4];
    uint32_t word[kGroup];
    philox64(keys, uint32_t(j / 4), words);
    for (int k = 0; k < 4; ++k) store(word + 16 * k, words[k]);
    for (int64_t i = 0; i < kGroup && j + i < count; ++i) out[j + i] = philox_uniform(word[i]);
  }
}

template <Floats (*FUNCTION)(Floats)>
static void each(const float* x, int64_t count, float* out) {
  for (int64_t j = 0; j < count; j += 16) {
    float lanes[16];
    store(lanes, FUNCTION(load_part(x + j, count - j)));
    for (int64_t i = 0; i < 16 && j + i < count; ++i) out[j + i] = lanes[i];
  }
}

}  // namespace CLP_ISA

const SampleKernels CLP_SAMPLE_KERNELS{CLP_ISA::slice, CLP_ISA::mix_slice,
                                       CLP_ISA::mass, CLP_ISA::gather, CLP_ISA::keep,
                                       CLP_ISA::draw, CLP_ISA::uniform, CLP_ISA::each<CLP_ISA::exp2>,
                                       CLP_ISA::each<CLP_ISA::exponential>};

}  // namespace clp
