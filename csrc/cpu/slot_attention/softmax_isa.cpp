// The softmax of slot_attention over a block of scores. Compiled once for each instruction set, apart
// from slot_attention_isa.cpp because lanes.h and simd.h name their registers alike.
#include <math.h>

#include "cpu/simd.h"
#include "cpu/slot_attention/isa.h"

namespace clp {
namespace CLP_ISA {

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

}  // namespace CLP_ISA

const SlotSoftmaxBlock CLP_SLOT_SOFTMAX = CLP_ISA::softmax_block;

}  // namespace clp
