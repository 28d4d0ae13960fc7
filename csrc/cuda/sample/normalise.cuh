// The normalisers of probability mode: maximum and log-sum-exp of every source row, from which
// mix.cuh makes log(w_i softmax(l_i)). One block sums a fixed slice of a source row, one
// warp per row combines the slices in a fixed order. Part of sample.cu.
#pragma once

#include "cuda/sample/mix.cuh"

namespace clp {
namespace {

struct alignas(16) SourcePartial {
  double sum;     // of exp(l - maximum)
  float maximum;  // +inf: the source has a NaN or +inf; -inf: nothing finite
  float unused;
};

// Terms of weight 0 are left out: not read, and not written.
__device__ __forceinline__ bool left_out(const SampleArgs& a, int64_t source) {
  return a.weights && a.weights[source] == 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_sources_kernel(const SampleArgs a, unsigned slices, SourcePartial* partials) {
  __shared__ float maxima[kWarps];
  __shared__ double sums[kWarps];
  const int64_t source = blockIdx.x / slices;  // b * m + i
  const int64_t first = int64_t(blockIdx.x % slices) * kSlice;
  if (left_out(a, source)) return;
  const T* row = static_cast<const T*>(a.logits) + source / a.m * a.stride_b +
                 source % a.m * a.stride_m;
  const Raw<T> raw = whole_slice<T>(a, first) ? load_row<T, true>(row, first, a.V)
                                              : load_row<T, false>(row, first, a.V);
  float peak = -INFINITY;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (first + place<T>(k) >= a.V) continue;
    const float logit = to_float(raw.x[k]);
    peak = fmaxf(peak, logit < INFINITY ? logit : INFINITY);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
  }
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) peak = fmaxf(peak, maxima[warp]);

  double sum = 0.0;
  if (fabsf(peak) < INFINITY) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (first + place<T>(k) < a.V) sum += double(expf(to_float(raw.x[k]) - peak));
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp];
  partials[blockIdx.x] = {sum, peak, 0.0f};
}

// One warp per row. A source that makes the row bad gets NaN, as does one of negative weight.
__global__ void __launch_bounds__(32)
    normalise_kernel(const SampleArgs a, unsigned slices, const SourcePartial* partials,
                     SourceTerm* terms) {
  const int64_t b = blockIdx.x;
  const unsigned lane = threadIdx.x;
  // Only differences of z matter. The first pass finds the least offset, so that the likeliest ids
  // lie near 0, where floats are dense; the second one writes.
  double least = INFINITY;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < a.m; ++i) {
      const int64_t source = b * a.m + i;
      if (left_out(a, source)) continue;
      const SourcePartial* row = partials + source * slices;
      float peak = -INFINITY;
      for (unsigned c = lane; c < slices; c += 32) peak = fmaxf(peak, row[c].maximum);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
      }
      double sum = 0.0;
      for (unsigned c = lane; c < slices; c += 32) {
        if (row[c].maximum != -INFINITY) {
          sum += row[c].sum * exp(double(row[c].maximum) - double(peak));
        }
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      const double weight = a.weights ? double(a.weights[source]) : 1.0;
      const double offset = log(sum) - log(weight);
      if (pass == 0) {
        least = fmin(least, offset);  // passes a NaN over
      } else if (lane == 0) {
        const float maximum = fabsf(peak) < INFINITY ? peak : NAN;
        terms[source] = {maximum, float(offset - least)};
      }
    }
  }
}

}  // namespace
}  // namespace clp
