// Products of a large matrix with few tokens, for kernels whose time is the reading of the matrix.
//
// A block owns 16 ROW_TILES rows of the matrix and 8 TOKEN_TILES tokens. Its warps, and those of
// the other blocks of its cluster, split K: warp s of S takes steps s, s + S, ... of 32 columns,
// and the partial products are added in the order of the warps. A lane copies ahead, into shared
// memory that no other lane touches, the very 16 bytes that it later multiplies, so the loop needs
// no barrier. That works because a product may take its columns in any order, if both sides take
// the same: quad q of a step holds columns 8 q to 8 q + 7, and the tensor core is told otherwise.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace clp {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;

__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int group_id() { return lane_id() / 4; }
__device__ __forceinline__ int quad_id() { return lane_id() % 4; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half_rn(value);
}

// 16-byte pieces in 8 elements.
template <class T>
constexpr int kPieces = int(sizeof(T)) / 2;

// The COUNT rows of a block's tile that a lane reads, each 8 after the one before, and of each the
// 8 columns of its quad. Rows past the last read as zeros.
template <class T, int COUNT>
struct LaneRows {
  const T* data;
  int64_t stride;
  unsigned exist;  // bit i: row i is one of the matrix

  __device__ __forceinline__ LaneRows(const void* matrix, int64_t row_stride, int64_t rows,
                                      int64_t first)
      : data(static_cast<const T*>(matrix) + (first + group_id()) * row_stride + 8 * quad_id()),
        stride(8 * row_stride),
        exist(0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) exist |= unsigned(first + group_id() + 8 * i < rows) << i;
  }

  // Starts the copies of the step at column k of K, in the matrix `offset` elements further on.
  __device__ __forceinline__ void copy(uint4* slot, int64_t k, int64_t K,
                                       int64_t offset = 0) const {
    const unsigned live = k + 8 * quad_id() < K ? exist << 4 : 0;
    const T* const from = data + offset + k;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        copy_async(slot + (i * kPieces<T> + piece) * kThreads,
                   from + i * stride + piece * (8 / kPieces<T>), live >> i & 16);
      }
    }
  }
};

// Which split of which tile a block is. Blocks that read the same rows come one after the other.
struct Place {
  int split;
  int64_t token_tile, row_tile;

  __device__ __forceinline__ Place(int splits, int64_t token_tiles) {
    const unsigned tile = blockIdx.x / unsigned(splits);
    split = int(blockIdx.x % unsigned(splits));
    token_tile = tile % unsigned(token_tiles);
    row_tile = tile / unsigned(token_tiles);
  }
};

// The loop over K of one warp. A lane reads CHUNKS pieces of 16 bytes a step, STAGES steps are in
// shared memory. `copy(slot, repeat, k)` starts the copies of a step, piece i to slot[i kThreads];
// `multiply(slot)` uses them; `finish(repeat)` follows the last step of each of `repeats` passes.
// `meanwhile()` runs once, on every thread, while the first copies are under way.
template <int CHUNKS, int STAGES, class Copy, class Meanwhile, class Multiply, class Finish>
__device__ __forceinline__ void stream(int64_t K, int split, int splits, int64_t repeats,
                                       Copy copy, Meanwhile meanwhile, Multiply multiply,
                                       Finish finish) {
  const int64_t begin = int64_t(kStep) * (split * kWarps + warp_id());
  const int64_t stride = int64_t(kStep) * (splits * kWarps);
  if (begin >= K) repeats = 0;
  uint4* const mine = shared_memory() + threadIdx.x;
  int64_t ahead = 0, ahead_k = begin;
  auto copy_next = [&](int stage) {
    if (ahead < repeats) {
      copy(mine + stage * (CHUNKS * kThreads), ahead, ahead_k);
      ahead_k += stride;
      if (ahead_k >= K) {
        ahead_k = begin;
        ++ahead;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) copy_next(stage);
  meanwhile();
  int stage = 0;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t k = begin; k < K; k += stride) {
      wait_copies<STAGES - 2>();
      // The stage before this one has been used up by every lane.
      __syncwarp();
      copy_next(stage == 0 ? STAGES - 1 : stage - 1);
      multiply(mine + stage * (CHUNKS * kThreads));
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    finish(repeat);
  }
  wait_copies<0>();
}

// One step of a block's tile: pieces 0, 1, ... are 2 ROW_TILES rows of the matrix, then tokens.
template <class T, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void multiply_step(const uint4* slot,
                                              float (&acc)[ROW_TILES * TOKEN_TILES][4]) {
  uint4 a[2 * ROW_TILES];
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; ++i) a[i] = slot[i * kThreads];
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) {
    const uint4 b = slot[(2 * ROW_TILES + n) * kThreads];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      float(&c)[4] = acc[i * TOKEN_TILES + n];
      multiply(T(), c, a[2 * i].x, a[2 * i + 1].x, a[2 * i].y, a[2 * i + 1].y, b.x, b.y);
      multiply(T(), c, a[2 * i].z, a[2 * i + 1].z, a[2 * i].w, a[2 * i + 1].w, b.z, b.w);
    }
  }
}

// Adds the partial tiles of all warps of the cluster. Afterwards this warp has the sums of tiles
// tile_of(0), tile_of(1), ... < TILES, at most kMost; other warps and blocks have the others.
template <int TILES>
struct Reduction {
  static constexpr int kMost = (TILES + kWarps - 1) / kWarps;
  static constexpr int kBytes = kWarps * TILES * 32 * int(sizeof(float4));

  int split, splits;

  __device__ __forceinline__ int tile_of(int i) const {
    return (warp_id() + i * kWarps) * splits + split;
  }

  __device__ __forceinline__ float4 sum(int i) const { return *place(0, tile_of(i)); }

  // In place of the ring: every copy of this thread has ended. Every thread comes here.
  __device__ __forceinline__ void add(const float (&acc)[TILES][4]) const {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      *place(warp_id(), tile) =
          make_float4(acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]);
    }
    __syncthreads();
    // From here on no other thread of the block comes to the places that this one uses.
#pragma unroll
    for (int tile = warp_id(); tile < TILES; tile += kWarps) {
      float4 total = *place(0, tile);
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) total = plus(total, *place(warp, tile));
      *place(0, tile) = total;
    }
    if (splits == 1) return;
    float4 totals[kMost];
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (tile_of(i) >= TILES) break;
      totals[i] = read_from_cluster(place(0, tile_of(i)), 0);
      for (int rank = 1; rank < splits; ++rank) {
        totals[i] = plus(totals[i], read_from_cluster(place(0, tile_of(i)), unsigned(rank)));
      }
    }
    // No block may write or leave before every other has read.
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (tile_of(i) >= TILES) break;
      *place(0, tile_of(i)) = totals[i];
    }
  }

 private:
  // The lane's four sums of a tile, as warp `warp` has them.
  static __device__ __forceinline__ float4* place(int warp, int tile) {
    return reinterpret_cast<float4*>(shared_memory()) + (warp * TILES + tile) * 32 + lane_id();
  }

  static __device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
};

}  // namespace clp
