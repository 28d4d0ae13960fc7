// Mixes m rows of logits into one, and its gradients.
//
//   geometric:    z = sum_i w_i l_i             d_logits_i = dz w_i
//                                               d_weights_i = sum_v dz l_i
//   probability:  z = log sum_i w_i p_i         d_logits_i = w_i (dz r_i - p_i d_weights_i)
//                 p_i = softmax(l_i)            d_weights_i = sum_v dz r_i,   r_i = p_i / exp(z)
//
// A term of weight 0 is left out of z. Geometric: an active -inf gives -inf; products and sums are
// rounded one by one in the order of i. Probability: a row that holds NaN or +inf, or nothing but
// -inf, has no softmax, and makes z NaN; so does a weight that is not finite and >= 0; without an
// active term z is -inf. Ids where z is -inf pass no gradient, whatever dz holds there.
//
// float32 within, rounded once on the way out; sums over the vocabulary in float64, slice by slice.
// A row's bits depend neither on the other rows, nor on the number of threads, nor on the
// instruction set (the sign and payload of a NaN aside).
#pragma once

#include <cstdint>

#include "shared/dtype.h"

namespace clp {

struct MixArgs {
  const void* logits;  // [m, B, V], last axis contiguous, strides in elements
  DType dtype;
  int64_t m, B, V;
  int64_t stride_m, stride_b;
  const float* weights;  // [B, m], contiguous
  bool probability;      // the mode
};

struct MixLogitsArgs : MixArgs {
  void* z;  // [B, V] contiguous, of the logits' dtype
};

struct MixLogitsBackwardArgs : MixArgs {
  const void* dz;    // [B, V] contiguous, of the logits' dtype
  void* d_logits;    // [m, B, V] contiguous, of the logits' dtype; or null
  float* d_weights;  // [B, m], or null
};

// isa: a name of cpu/isa.h, or "" for the one chosen at load. Throws std::invalid_argument for
// another.
void mix_logits_cpu(const MixLogitsArgs& args, int num_threads, const char* isa);

// z is float32 whatever the dtype, and in probability mode up to a constant of each row: its
// likeliest ids lie near 0, where floats are dense. For `sample`, where only differences count.
void mix_logits_relative_cpu(const MixLogitsArgs& args, int num_threads, const char* isa);

void mix_logits_backward_cpu(const MixLogitsBackwardArgs& args, int num_threads, const char* isa);

}  // namespace clp
