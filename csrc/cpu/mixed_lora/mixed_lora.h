// mixed_lora on the CPU, whole or added to a base product that is already in y:
//
//   u[t] = x[t] A^T,   z[t][i r + j] = w[row(t)][i] u[t][i r + j],
//   y[t] = x[t] W^T + bias + z[t] B^T,   or without W:   y[t] += z[t] B^T
//
// in float32, with one rounding of y. A zero weight gives z = 0 whatever u is; where all weights of
// a row are zero, its y is the base product, untouched without W. Every element is summed in an order
// that depends on the sizes K, m and r alone: neither T nor the number of threads changes a bit of a
// row.
#pragma once

#include "shared/dtype.h"

namespace clp {

struct MixedLoraArgs {
  const void* x;  // [T, K], last axis contiguous
  DType x_dtype;
  int64_t x_stride;
  const void* base_weight;  // W [N, K], x's dtype, contiguous; or null
  const void* bias;  // [N], x's dtype; or null
  const void* lora_A;  // [m r, K], contiguous; or null: u is given
  const void* lora_B;  // [m, N, r], contiguous; or null: u is all that is wanted
  DType lora_dtype;    // x's or float32
  const float* weights;  // [rows, m], contiguous
  const void* example_ids;  // [T] int32 or int64, or null: row(t) = t / tokens_per_example
  bool wide_ids;            // int64
  int64_t tokens_per_example;
  void* y;  // [T, N], x's dtype, last axis contiguous
  int64_t y_stride;
  float* u;  // [T, m r], contiguous
  int64_t T, K, N, m, r;
};

// What lies between PyTorch's products where these compute u and z B^T: z of above, which may be u
// itself, and lora_B [m, N, r] as [N, m r]. Of cold tensors an op of PyTorch takes 50 us and more.
struct MixRankArgs {
  const float* u;        // [T, m r], contiguous
  const float* weights;  // as above
  const void* example_ids;
  bool wide_ids;
  int64_t tokens_per_example;
  float* z;  // [T, m r]
  int64_t T, m, r;
};
void mix_rank(const MixRankArgs& args);

struct StackArgs {
  const void* lora_B;
  void* stacked;
  int64_t bytes;  // of an element
  int64_t m, N, r;
};
void stack(const StackArgs& args);

// Whether the weights [examples, m] of an example, or all `size` elements of lora_B, are zero: y must
// then have the bits of F.linear, so the base product cannot be this kernel's.
bool has_bare_rows(const float* weights, int64_t examples, int64_t m, const void* lora_B,
                   DType lora_dtype, int64_t size);

// isa: a name of cpu/isa.h, or "" for the one chosen at load. Throws std::invalid_argument.
void mixed_lora_cpu(const MixedLoraArgs& args, int num_threads, const char* isa);

}  // namespace clp
