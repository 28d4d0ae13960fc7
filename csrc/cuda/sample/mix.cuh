// Loads and mixes a thread's share of one slice of a row; for the kernels of sample.cu and
// filter.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "shared/sample.h"

namespace clp {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPerThread = 8;  // two quads of ids, each of which takes one Philox call
constexpr int kSlice = kThreads * kPerThread;
constexpr unsigned kAllLanes = 0xffffffffu;

// How a row's z comes from its source rows: the one row itself, a weighted sum, or
// log sum_i w_i softmax(l_i).
enum class Mix { kNone, kWeighted, kProbability };

// Of source row i of a row, in probability mode: log(w_i softmax(l_i)) is l_i - maximum - offset,
// up to a constant of the row. NaN where the source makes the row bad.
struct SourceTerm {
  float maximum, offset;
};

inline int64_t slices_of(int64_t V) { return (V + kSlice - 1) / kSlice; }

// Calls f(T(), how) for the logits' type and the way of mixing, an integral_constant.
template <class F>
void with_types(const SampleArgs& a, F f) {
  const auto with_mix = [&](auto zero) {
    if (a.probability) {
      f(zero, std::integral_constant<Mix, Mix::kProbability>());
    } else if (a.weights) {
      f(zero, std::integral_constant<Mix, Mix::kWeighted>());
    } else {
      f(zero, std::integral_constant<Mix, Mix::kNone>());
    }
  };
  switch (a.dtype) {
    case DType::kFloat32:
      with_mix(0.0f);
      break;
    case DType::kBFloat16:
      with_mix(__nv_bfloat16());
      break;
    case DType::kFloat16:
      with_mix(__half());
      break;
  }
}

// Whether a filter applies to row b. A greedy row needs none: its token is the largest, which every
// filter keeps. The kernels for rows without filters skip these rows, and the other way round, so
// that a row's bits do not depend on what the other rows ask for.
__device__ __forceinline__ bool filtered(const SampleArgs& a, int64_t b) {
  if (!a.top_k && !a.top_p && !a.min_p) return false;
  const double temperature = a.temperature[b];
  if (!(temperature > 0.0 && temperature < INFINITY)) return false;
  return (a.top_k && a.top_k[b] > 0 && a.top_k[b] < a.V) || (a.top_p && a.top_p[b] < 1.0) ||
         (a.min_p && a.min_p[b] > 0.0);
}

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

// Whether load_row may read the slice in whole vectors.
template <class T>
__device__ __forceinline__ bool whole_slice(const SampleArgs& a, int64_t first) {
  const uintptr_t unaligned = reinterpret_cast<uintptr_t>(a.logits) |
                              uintptr_t(a.stride_b) * sizeof(T) |
                              uintptr_t(a.stride_m) * sizeof(T);
  return first + kSlice <= a.V && unaligned % 16 == 0;
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

// log sum_i w_i softmax(l_i), up to a constant of the row: `sum` is of exp(term - z).
template <class T, bool WHOLE>
__device__ __forceinline__ void mix_probability(const SampleArgs& a, const SourceTerm* terms,
                                                int64_t b, int64_t first, float z[kPerThread]) {
  float sum[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = -INFINITY, sum[k] = 0.0f;
  for (int64_t i = 0; i < a.m; ++i) {
    if (a.weights && a.weights[b * a.m + i] == 0.0f) continue;
    const SourceTerm source = terms[b * a.m + i];
    const T* row = static_cast<const T*>(a.logits) + b * a.stride_b + i * a.stride_m;
    const Raw<T> raw = load_row<T, WHOLE>(row, first, a.V);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const float term = __fsub_rn(__fsub_rn(to_float(raw.x[k]), source.maximum), source.offset);
      if (term == -INFINITY) continue;  // an id that this source rules out
      // exp(-inf) for the first. A NaN fails the comparison and goes into the sum.
      const float share = expf(-fabsf(term - z[k]));
      sum[k] = term > z[k] ? __fmaf_rn(sum[k], share, 1.0f) : sum[k] + share;
      z[k] = fmaxf(z[k], term);
    }
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = z[k] + logf(sum[k]);
}

// The thread's z: -inf past the end of the row, +inf for what makes the row bad (NaN, +inf).
// `terms` is [B, m] in probability mode and unused otherwise.
template <class T, Mix HOW>
__device__ __forceinline__ void mix(const SampleArgs& a, const SourceTerm* terms, int64_t b,
                                    int64_t first, float z[kPerThread]) {
  const bool whole = whole_slice<T>(a, first);
  if constexpr (HOW == Mix::kProbability) {
    if (whole) {
      mix_probability<T, true>(a, terms, b, first, z);
    } else {
      mix_probability<T, false>(a, terms, b, first, z);
    }
  } else {
    constexpr bool kWeighted = HOW == Mix::kWeighted;
    if (whole) {
      mix_plain<T, kWeighted, true>(a, b, first, z);
    } else {
      mix_plain<T, kWeighted, false>(a, b, first, z);
    }
    bool suspect = false;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) suspect |= !(z[k] < INFINITY);
    if (kWeighted && suspect) mask<T>(a, b, first, z);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (!(z[k] < INFINITY)) z[k] = INFINITY;
    if (first + place<T>(k) >= a.V) z[k] = -INFINITY;
  }
}

}  // namespace
}  // namespace clp
