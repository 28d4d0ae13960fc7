// What mix_logits.cpp (threads, sums over a row) and isa.cpp (one slice of one row,
// compiled for each instruction set) agree on.
#pragma once

#include "cpu/isa.h"
#include "cpu/mix_logits/mix_logits.h"

namespace clp {

// Vocabulary ids per slice. Constant, because the order of the sums must not depend on the machine;
// 4096 logits are 16 KB, which the first-level cache keeps between the two passes of `sum_exp`.
constexpr int64_t kMixSlice = 4096;

// What makes of e = exp(l - maximum) the probability p = inverse_sum e, w / W p = coefficient e,
// and w / W p sum_v dz r W = pull e. W is the sum of the row's weights.
struct MixFactors {
  float inverse_sum, coefficient, pull;
};

// A source row.
struct MixTerm {
  const void* logits;
  void* d_logits;  // its gradient, or null
  int64_t index;   // i
  float weight;    // w; probability: w / W
  // Of probability mode alone.
  float maximum;        // of the row
  MixFactors whole;     // for that maximum; the coefficient is at least 2^-126
  const float* powers;  // e for each slice's own maximum, as sum_exp left them
  MixFactors slice;     // for the maximum of the slice at hand
};

struct MixRow {
  const MixTerm* terms;  // those of a weight other than 0 first, in the order of i
  int64_t active, count;
  DType dtype;
  bool probability;
  bool relative;    // z goes out in float32, up to a constant
  float log_total;  // log W; log W - log S where one term is active; relative: 0
};

struct MixSumExp {
  float maximum;
  double sum;  // of exp(l - maximum); NaN where a NaN or +inf is in the slice, 0 if all is -inf
};

// Bytes of scratch memory that `gradients` needs for each term, aligned to 64.
constexpr int64_t kMixScratch = 16 * sizeof(double);

struct MixKernels {
  // Writes exp(l - maximum of the slice) to `powers`, 0 below 1e-38 and up to a multiple of 64.
  void (*sum_exp)(const void* logits, DType dtype, int64_t first, int64_t count, float* powers,
                  MixSumExp* out);
  void (*mix)(const MixRow& row, int64_t first, int64_t count, void* z);
  // Writes d_logits if `write`, and to `sums` (unless null), by term, the slice's part of
  // sum_v dz l (geometric) or sum_v dz r W (probability, where d_logits needs the whole row's: so
  // a row takes a pass for each).
  void (*gradients)(const MixRow& row, const void* dz, int64_t first, int64_t count, bool write,
                    void* scratch, double* sums);
};

extern const MixKernels kMixKernelsScalar, kMixKernelsAvx2, kMixKernelsAvx512;

}  // namespace clp
