// Finds the least z that top-k or top-p keeps, in a row of mixed logits; part of filter.cu.
//
// The threshold is found by counting the ids, or adding up their masses, in 2048 bins: first in
// bins of equal width below the largest z, where logits spread evenly, then inside the one bin that
// holds the threshold, in bins of consecutive floats, until that is one float. Equal z share every
// bin, so ties stay together. Masses are integers, in units of at most 2^-61 of the row's total:
// their sums do not depend on an order, so atomics do not disturb the bits, nor does the number of
// blocks that work on the row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/sample/mix.cuh"

namespace clp {
namespace {

constexpr int kSelectThreads = 512, kSelectWarps = kSelectThreads / 32;
constexpr int kBinsPerThread = 4, kBins = kBinsPerThread * kSelectThreads, kBinBits = 11;
static_assert(kBins == 1 << kBinBits, "bins are picked by bits");
constexpr float kBinsPerUnit = 64.0f;  // of the first round: they span 32 temperatures
constexpr int kUnitBits = 61;

// Floats as integers of the same order; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float z) {
  const uint32_t bits = __float_as_uint(z == 0.0f ? 0.0f : z);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The least key of [low, high] that passes; `high` does, and so does what is above one that does.
template <class Test>
__device__ __forceinline__ uint32_t first_key(uint32_t low, uint32_t high, Test passes) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (passes(value_of(middle))) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// A row, and the part of it that this block works on.
struct Row {
  const float4* z;
  unsigned quads;        // of the row
  unsigned begin, step;  // this thread's
  float peak;
  double temperature, total;  // total: of exp((z - peak) / temperature)
  double scale;               // units of mass in exp(0)
  float bins_per_unit;        // bins of the first round per unit of z

  __device__ __forceinline__ double mass(float value) const {
    return exp((double(value) - double(peak)) / temperature);
  }
  __device__ __forceinline__ uint64_t units(double mass) const {
    return __double2ull_rn(mass * scale);
  }
  // Never lower for a smaller value: each operation rounds monotonically.
  __device__ __forceinline__ uint32_t first_bin(float value) const {
    const float distance = __fmul_rn(__fsub_rn(peak, value), bins_per_unit);
    return uint32_t(fminf(distance, float(kBins - 1)));
  }
};

struct SelectShared {
  // One sum of 64 bits a bin: two 32-bit atomics are native, a 64-bit one spins.
  alignas(16) uint32_t low[kBins];
  alignas(16) uint32_t high[kBins];
  uint64_t warp_sums[kSelectWarps];
  // The bin found by a round: the keys it spans, what lies above it and in it.
  uint32_t least, most;
  uint64_t above, amount;
};

__device__ __forceinline__ void add(SelectShared& s, uint32_t bin, uint64_t amount) {
  const uint32_t low = uint32_t(amount);
  const uint32_t before = atomicAdd(&s.low[bin], low);
  const uint32_t high = uint32_t(amount >> 32) + (before + low < low ? 1u : 0u);
  if (high != 0) atomicAdd(&s.high[bin], high);
}

// This thread's bins, summed over the row's blocks; ends with a barrier.
__device__ __forceinline__ void gather_bins(SelectShared& s, unsigned ranks,
                                            uint64_t amount[kBinsPerThread]) {
  __syncthreads();
  cluster_barrier();
  const float4* low = reinterpret_cast<const float4*>(s.low) + threadIdx.x;
  const float4* high = reinterpret_cast<const float4*>(s.high) + threadIdx.x;
  const auto pair = [](float a, float b) {
    return uint64_t(__float_as_uint(a)) | uint64_t(__float_as_uint(b)) << 32;
  };
  for (int k = 0; k < kBinsPerThread; ++k) amount[k] = 0;
  for (unsigned rank = 0; rank < ranks; ++rank) {
    const float4 x = read_from_cluster(low, rank), y = read_from_cluster(high, rank);
    amount[0] += pair(x.x, y.x);
    amount[1] += pair(x.y, y.y);
    amount[2] += pair(x.z, y.z);
    amount[3] += pair(x.w, y.w);
  }
  cluster_barrier();
}

// Exclusive sum over the block's threads, and the sum of all.
__device__ __forceinline__ uint64_t sum_before(SelectShared& s, uint64_t own, uint64_t* all) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t running = own;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, running, step);
    if (lane >= step) running += other;
  }
  if (lane == 31) s.warp_sums[warp] = running;
  __syncthreads();
  uint64_t before = running - own, sum = 0;
  for (unsigned w = 0; w < kSelectWarps; ++w) {
    if (w == warp) before += sum;
    sum += s.warp_sums[w];
  }
  *all = sum;
  return before;
}

// The least key, of those from `least` up, that a filter keeps. MASS: top-p, the last key with less
// than top_p of the mass from `least` up above it; else top-k, the count-th. Every thread of every
// block of the row calls this and gets the result.
template <bool MASS>
__device__ __forceinline__ uint32_t threshold(const Row& row, SelectShared& s, unsigned ranks,
                                              uint32_t least, uint64_t count, double top_p) {
  uint32_t most = key_of(row.peak);
  const uint32_t lowest = least;
  uint64_t target = count, above = 0;
  for (bool first_round = true;; first_round = false) {
    // Bin i holds the keys most - (i << shift) and below.
    const int shift = max(0, 32 - __clz(int(most - least)) - kBinBits);
    for (int k = 0; k < kBinsPerThread; ++k) {
      s.low[k * kSelectThreads + threadIdx.x] = 0;
      s.high[k * kSelectThreads + threadIdx.x] = 0;
    }
    __syncthreads();
    for (unsigned q = row.begin; q < row.quads; q += row.step) {
      const float4 four = row.z[q];
      const float z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t key = key_of(z[k]);
        if (key < least || key > most) continue;
        const uint32_t bin = first_round ? row.first_bin(z[k]) : (most - key) >> shift;
        const uint64_t amount = MASS ? row.units(row.mass(z[k])) : 1;
        if (amount != 0) add(s, bin, amount);
      }
    }
    uint64_t amount[kBinsPerThread], all = 0;
    gather_bins(s, ranks, amount);
    const uint64_t own = (amount[0] + amount[1]) + (amount[2] + amount[3]);
    uint64_t before = above + sum_before(s, own, &all);
    if (first_round) {
      // An integer is below a number exactly where it is below the number's ceiling.
      if (MASS) target = uint64_t(fmax(ceil(top_p * double(all)), 1.0));
      if (target > all) return lowest;
    }
#pragma unroll
    for (int k = 0; k < kBinsPerThread; ++k) {
      if (before < target && target <= before + amount[k]) {
        const uint32_t bin = kBinsPerThread * threadIdx.x + k;
        if (first_round) {
          s.least = first_key(least, most, [&](float z) { return row.first_bin(z) <= bin; });
          if (bin > 0) {
            most = first_key(least, most, [&](float z) { return row.first_bin(z) < bin; }) - 1;
          }
          s.most = most;
        } else {
          const uint32_t span = (1u << shift) - 1;
          s.most = most - (bin << shift);
          s.least = s.most - least > span ? s.most - span : least;
        }
        s.above = before;
        s.amount = amount[k];
      }
      before += amount[k];
    }
    __syncthreads();
    least = s.least;
    most = s.most;
    above = s.above;
    // One key, or every id of the bin is among the first `count`.
    const bool done = least == most || (!MASS && above + s.amount == target);
    __syncthreads();
    if (done) return least;
  }
}

}  // namespace
}  // namespace clp
