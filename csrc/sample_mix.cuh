// Loads and mixes a thread's share of one slice of a row; part of sample.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sample.h"

namespace clp {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPerThread = 8;  // two quads of ids, each of which takes one Philox call
constexpr int kSlice = kThreads * kPerThread;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Place in the slice of element k (0 ... 7) of a thread. 16-byte loads, neighbouring threads on
// neighbouring addresses: eight consecutive ids of two bytes, or two times four of four bytes.
template <class T>
__device__ __forceinline__ int place(int k) {
  const int thread = int(threadIdx.x);
  return sizeof(T) == 2 ? 8 * thread + k : (k / 4) * (4 * kThreads) + 4 * thread + k % 4;
}

template <class T>
struct Raw {
  alignas(16) T x[kPerThread];
};

// A thread's elements of one source row; past the end of the row, zeros. WHOLE: the slice lies
// inside the row and every row starts on a multiple of 16 bytes.
template <class T, bool WHOLE>
__device__ __forceinline__ Raw<T> load_row(const T* row, int64_t first, int64_t V) {
  Raw<T> raw;
  constexpr int kVector = 16 / sizeof(T);
#pragma unroll
  for (int k = 0; k < kPerThread; k += kVector) {
    const int64_t v = first + place<T>(k);
    if (WHOLE) {
      // Read once: leave the cache to others.
      *reinterpret_cast<uint4*>(raw.x + k) = __ldcs(reinterpret_cast<const uint4*>(row + v));
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) raw.x[k + j] = v + j < V ? row[v + j] : T(0.0f);
    }
  }
  return raw;
}

// z = sum_i w_i l_i as the CPU rounds it: no fused multiply-add, in the order of i.
template <class T, bool WEIGHTED, bool WHOLE>
__device__ __forceinline__ void mix_plain(const SampleArgs& a, int64_t b, int64_t first,
                                          float z[kPerThread]) {
  const T* rows = static_cast<const T*>(a.logits) + b * a.stride_b;
  if (!WEIGHTED) {
    const Raw<T> raw = load_row<T, WHOLE>(rows, first, a.V);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) z[k] = to_float(raw.x[k]);
    return;
  }
  // Loads in flight a thread: four source rows of 16 or 32 bytes.
  constexpr int kTerms = WHOLE ? 4 : 1;
  const float* weights = a.weights + b * a.m;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = 0.0f;
  for (int64_t start = 0; start < a.m; start += kTerms) {
    float w[kTerms];
    Raw<T> raw[kTerms];
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      w[i] = start + i < a.m ? __ldg(weights + start + i) : 0.0f;
      if (w[i] != 0.0f) {
        raw[i] = load_row<T, WHOLE>(rows + (start + i) * a.stride_m, first, a.V);
      }
    }
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      if (w[i] == 0.0f) continue;
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        z[k] = __fadd_rn(z[k], __fmul_rn(w[i], to_float(raw[i].x[k])));
      }
    }
  }
}

// An active -inf gives -inf, whatever its weight's sign and whatever stands beside it. Plain
// arithmetic leaves NaN or +inf there when it does not, so this pass is rare.
template <class T>
__device__ __forceinline__ void mask(const SampleArgs& a, int64_t b, int64_t first,
                                     float z[kPerThread]) {
  for (int64_t i = 0; i < a.m; ++i) {
    if (a.weights[b * a.m + i] == 0.0f) continue;
    const T* row = static_cast<const T*>(a.logits) + b * a.stride_b + i * a.stride_m;
    const Raw<T> raw = load_row<T, false>(row, first, a.V);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (to_float(raw.x[k]) == -INFINITY) z[k] = -INFINITY;
    }
  }
}

// The thread's z: -inf past the end of the row, +inf for what makes the row bad (NaN, +inf).
template <class T, bool WEIGHTED>
__device__ __forceinline__ void mix(const SampleArgs& a, int64_t b, int64_t first,
                                    float z[kPerThread]) {
  const uintptr_t unaligned = reinterpret_cast<uintptr_t>(a.logits) |
                              uintptr_t(a.stride_b) * sizeof(T) |
                              uintptr_t(a.stride_m) * sizeof(T);
  if (first + kSlice <= a.V && unaligned % 16 == 0) {
    mix_plain<T, WEIGHTED, true>(a, b, first, z);
  } else {
    mix_plain<T, WEIGHTED, false>(a, b, first, z);
  }
  bool suspect = false;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) suspect |= !(z[k] < INFINITY);
  if (WEIGHTED && suspect) mask<T>(a, b, first, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (!(z[k] < INFINITY)) z[k] = INFINITY;
    if (first + place<T>(k) >= a.V) z[k] = -INFINITY;
  }
}

}  // namespace
}  // namespace clp
