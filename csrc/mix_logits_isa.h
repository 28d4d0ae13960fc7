// What mix_logits.cpp (threads, sums over a row) and mix_logits_isa.cpp (one slice of one row,
// compiled for each instruction set) agree on.
#pragma once

#include "cpu_isa.h"
#include "mix_logits.h"

namespace clp {

// Vocabulary ids a slice. Constant, because the order of the sums must not depend on the machine;
// 4096 logits are 16 KB, which the first-level cache keeps between the two passes of `sum_exp`.
constexpr int64_t kMixSlice = 4096;

// A source row. The rest is for probability mode, where W is the sum of the row's weights: numbers
// near 1 are what floats are good at, and z needs no more than log W added.
struct MixTerm {
  const void* logits;
  void* d_logits;        // its gradient, or null
  int64_t index;         // i
  float weight;          // w; probability: w / W
  float maximum;         // of the row
  float inverse_sum;     // 1 / S with S = sum exp(l - maximum), so p = exp(l - maximum) / S
  float coefficient;     // w / W / S, of an active term at least 2^-126
  float pull;            // w / W / S * sum_v dz r W
};

struct MixRow {
  const MixTerm* terms;  // those of a weight other than 0 first, in the order of i
  int64_t active, count;
  DType dtype;
  bool probability;
  float log_total;  // log W; log(W / S) where one term is active
};

struct MixSumExp {
  float maximum;
  double sum;  // of exp(l - maximum); NaN where a NaN or +inf is in the slice, 0 if all is -inf
};

// Bytes of scratch memory that `gradients` needs for each term, aligned to 64.
constexpr int64_t kMixScratch = 16 * sizeof(double) + 64 * sizeof(float);

struct MixKernels {
  void (*sum_exp)(const void* logits, DType dtype, int64_t first, int64_t count, MixSumExp* out);
  void (*mix)(const MixRow& row, int64_t first, int64_t count, void* z);
  // Writes d_logits of the terms that have one, and to `sums` (unless null), by term, the slice's
  // part of sum_v dz l (geometric) or sum_v dz r W (probability, where d_logits needs the whole
  // row's: so a row takes a pass for each).
  void (*gradients)(const MixRow& row, const void* dz, int64_t first, int64_t count,
                    bool write, void* scratch, double* sums);
};

extern const MixKernels kMixKernelsScalar, kMixKernelsAvx2, kMixKernelsAvx512;

}  // namespace clp
