// mixed_linear on the CPU for few rows, where reading the m matrices once is all that costs:
//
//   y[t] = sum_i w[row(t)][i] (x[t] W_i^T + bias_i)
//
// in float32 in the order of i, with one rounding. A term of weight zero is left out. Every element
// is summed in an order that depends on K and m alone: neither T nor the number of threads changes a
// bit of a row.
#pragma once

#include "shared/dtype.h"

namespace clp {

struct MixedLinearArgs {
  const void* x;  // [T, K], last axis contiguous
  int64_t x_stride;
  const void* expert_weight;  // [m, N, K], contiguous
  const void* bias;           // [m, N], contiguous, or null
  DType dtype;                // of x, expert_weight, bias and y
  const float* weights;       // [rows, m], contiguous
  const void* example_ids;    // [T] int32 or int64, or null: row(t) = t / tokens_per_example
  bool wide_ids;              // int64
  int64_t tokens_per_example;
  void* y;  // [T, N], contiguous
  int64_t T, K, N, m;
};

// isa: a name of cpu/isa.h, or "" for the one chosen at load. Throws std::invalid_argument.
void mixed_linear_cpu(const MixedLinearArgs& args, int num_threads, const char* isa);

}  // namespace clp
