// `mixed_lora` and `mixed_linear` on CUDA for the few tokens of a decoding step, where reading the
// matrices once is all that costs. bfloat16 and float16; defined by clp_kernels/ops/<op>/reference.py.
//
// Every element is summed in float32 in an order that depends on K, N, m, r, the number of splits
// and the kind of GPU alone: a row's bits depend neither on T nor on the other rows. There are no
// atomics. A term of weight zero is left out, whatever stands in its matrices; a mixed_lora row of
// zeros gives x W^T + bias as this kernel computes it.
#pragma once

#include <cstdint>

#include "shared/dtype.h"

namespace clp {

// x and what mixes each of its rows. Strides are in elements.
struct MixedTokens {
  const void* x;  // [T, K], last axis contiguous; pointer and stride aligned to 16 bytes
  DType dtype;    // kBFloat16 or kFloat16; of x, W, bias and y
  int64_t x_stride;
  int64_t T, K;  // K a multiple of 8
  int64_t m;
  const float* weights;     // [rows, m], contiguous
  const void* example_ids;  // [T] int32 or int64, or null: row(t) = t / tokens_per_example
  bool wide_ids;            // int64
  int64_t tokens_per_example;
};

struct MixedLoraCuda {
  MixedTokens tokens;
  const void* base_weight;  // [N, K], last axis contiguous; aligned as x
  int64_t base_stride;
  const void* bias;      // [N] contiguous, or null
  const void* lora_A;    // [m r, K], last axis contiguous; aligned as x
  int64_t A_stride;
  const void* lora_B;    // [m, N, r]
  int64_t B_stride_m, B_stride_n, B_stride_r;
  bool float32_lora;     // A and B are float32, not of x's dtype
  int64_t N, r;
  int base_splits, shrink_splits;  // of K, over the blocks of a cluster: 1, 2, 4 or 8; 1 on sm_80
  void* y;   // [T, N], contiguous
  float* u;  // [T, m r], contiguous: x A^T
};

struct MixedLinearCuda {
  MixedTokens tokens;
  const void* expert_weight;  // [m, N, K], last axis contiguous; aligned as x
  int64_t expert_stride, row_stride;
  const void* bias;  // [m, N] contiguous, or null
  int64_t N;
  int splits;  // as base_splits
  void* y;     // [T, N], contiguous
};

// Enqueue on `stream`; every pointer is a device pointer, nothing is read on the host and nothing
// kept. Return null, or a message that stays valid.
const char* mixed_lora_cuda(const MixedLoraCuda& args, int device, void* stream);
const char* mixed_linear_cuda(const MixedLinearCuda& args, int device, void* stream);

}  // namespace clp
