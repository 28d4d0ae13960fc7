// One slice of one row: mix (sample_mix.h), sum the exponentials, draw. Compiled once for each instruction set
// with CLP_ISA (namespace), CLP_ISA_LEVEL and CLP_SAMPLE_KERNELS (name of the table) defined.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "sample_isa.h"
#include "sample_mix.h"
#include "simd.h"

namespace clp {
namespace CLP_ISA {

// The running draw of a slice. Exponential race: z/t + g > s is -log(u) < exp(z/t - s), so with the
// e = exp((z - peak)/t) of the sum at hand, an id can win only if 1 - u <= e * exp(peak/t - s).
// That test needs no logarithm, and the exact float64 score is computed for the few that pass.
struct Race {
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

__attribute__((noinline)) static void enter_group(Race& race, int64_t j, const Words words[4],
                                                  const Floats e[4]) {
  uint32_t word[kGroup];
  float weight[kGroup];
  for (int k = 0; k < 4; ++k) {
    store(word + 16 * k, words[k]);
    store(weight + 16 * k, e[k]);
  }
  for (int i = 0; i < kGroup; ++i) {
    if (float(int32_t(shortfall(word[i]))) <= weight[i] * race.gain) race.enter(j + i, word[i]);
  }
}

// Sum of exp((z - peak)/t) over the slice; with DRAW, runs the race on the way.
template <bool DRAW>
static double sum_slice(const float* z, int64_t count, float peak, double temperature,
                        const PhiloxKeys* keys, Race* race) {
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
    const Floats gain = all(race->gain);
    const Floats most = maximum(maximum(e[0], e[1]), maximum(e[2], e[3]));
    // 1 - u is at least 2^-33, that is 2^-9 in units of 2^-24: below it no noise is enough.
    if (at_most(all(0x1p-9f), most * gain) == 0) continue;
    Words words[4];
    philox64(*keys, uint32_t((race->first + j) / 4), words);
    uint32_t passed = 0;
    for (int k = 0; k < 4; ++k) {
      passed |= at_most(to_floats(shortfall(words[k])), e[k] * gain);
    }
    if (passed != 0) enter_group(*race, j, words, e);
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
  const bool greedy = task.temperature == 0.0f;
  const double temperature = greedy ? 1.0 : double(task.temperature);
  const double top = double(peak) / temperature;
  if (greedy || top + kGumbelMax < to_beat) {
    out->sum = sum_slice<false>(z, task.count, peak, temperature, nullptr, nullptr);
    if (!greedy || double(peak) <= to_beat) return;
    out->score = double(peak);
    out->logit = peak;
    out->token = task.first + find(z, peak);
    return;
  }
  Race race{z, task.first, peak, temperature, to_beat, -INFINITY, -1, 0.0f, 0.0f};
  race.set_gain();
  if (to_beat < top + kGumbelMin) {
    // Without a good score to beat everything would pass: start from the largest logit.
    const int64_t j = find(z, peak), v = task.first + j;
    race.enter(j, philox_block(task.seed, task.position, uint32_t(v / 4)).x[v % 4]);
  }
  const PhiloxKeys keys = philox_keys(task.seed, task.position);
  out->sum = sum_slice<true>(z, task.count, peak, temperature, &keys, &race);
  out->score = race.score;
  out->logit = race.logit;
  out->token = race.token;
}

static void slice(const SampleTask& task, double to_beat, SamplePartial* out) {
  alignas(64) float z[kSampleSlice];
  for (bool masked : {false, true}) {
    *out = {mix(task, masked, z), 0.0f, 0.0, -INFINITY, -1};
    reduce(task, to_beat, z, out);
    if (out->sum == out->sum || task.probability) return;
  }
}

static void sum_exp(const void* logits, DType dtype, int64_t first, int64_t count,
                    SamplePartial* out) {
  const SampleTerm term{logits, 1.0f, 0.0f, 0.0f};
  // Greedy with nothing left to beat: the sum alone.
  slice({&term, 1, dtype, false, 0.0f, 0, 0, first, count}, INFINITY, out);
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

static void exp2_each(const float* y, int64_t count, float* out) {
  for (int64_t j = 0; j < count; j += 16) {
    float lanes[16];
    store(lanes, exp2(load_part(y + j, count - j)));
    for (int64_t i = 0; i < 16 && j + i < count; ++i) out[j + i] = lanes[i];
  }
}

}  // namespace CLP_ISA

const SampleKernels CLP_SAMPLE_KERNELS{CLP_ISA::slice, CLP_ISA::sum_exp, CLP_ISA::uniform,
                                       CLP_ISA::exp2_each};

}  // namespace clp
