// What mixed_lora.cu and mixed_linear.cu share: a block's shape, its tokens' weights, the launch.
#pragma once

#include "cuda/mixed.h"
#include "cuda/gemm.cuh"

namespace clp {

// The tile of a block and its shared memory: the ring, then the partial sums in its place, and the
// weight rows of the tokens.
template <int ROW_TILES, int TOKEN_TILES>
struct Shape {
  static constexpr int kRows = 16 * ROW_TILES, kTokens = 8 * TOKEN_TILES;
  static constexpr int kTiles = ROW_TILES * TOKEN_TILES;
  static constexpr int kChunks = 2 * ROW_TILES + TOKEN_TILES;
  static constexpr int kStageBytes = kChunks * kThreads * 16;
  // sm_80 gives a block 163 KB.
  static constexpr int kStages = 3 * kStageBytes <= 160 * 1024 ? 3 : 2;
  static constexpr int kRing = kStages * kStageBytes;
  static constexpr int kSums = Reduction<kTiles>::kBytes;
  static constexpr int kScratch = kRing > kSums ? kRing : kSums;
  static constexpr int kBytes = kScratch + kTokens * int(sizeof(int64_t));
  static_assert(kBytes <= 163 * 1024 && kTokens <= kThreads);

  static int64_t blocks(int64_t N, int64_t T, int splits) {
    return (N + kRows - 1) / kRows * ((T + kTokens - 1) / kTokens) * splits;
  }

  static __device__ __forceinline__ int64_t* weight_rows() {
    return reinterpret_cast<int64_t*>(shared_memory() + kScratch / 16);
  }
};

// The weights of a block's tokens.
struct TokenWeights {
  const float* weights;
  int64_t m;
  int64_t* rows;  // of the tokens, in shared memory; -1 past the last token

  // Fills rows, one a thread; a barrier must follow.
  __device__ __forceinline__ void look_up(const MixedTokens& t, int64_t first, int count) const {
    const int i = int(threadIdx.x);
    if (i >= count) return;
    const int64_t token = first + i;
    int64_t row = -1;
    if (token < t.T) {
      if (t.example_ids == nullptr) {
        row = token / t.tokens_per_example;
      } else if (t.wide_ids) {
        row = static_cast<const int64_t*>(t.example_ids)[token];
      } else {
        row = static_cast<const int32_t*>(t.example_ids)[token];
      }
    }
    rows[i] = row;
  }

  // Null for a token past the last.
  __device__ __forceinline__ const float* row(int token) const {
    return rows[token] < 0 ? nullptr : weights + rows[token] * m;
  }
};

__device__ __forceinline__ float weight_at(const float* row, int64_t i) {
  return row == nullptr ? 0.0f : __ldg(row + i);
}

// Launches in clusters of `splits` blocks; `overlap`: as soon as the kernel before it allows.
template <class Kernel, class Args>
cudaError_t launch(Kernel kernel, const Args& args, int64_t blocks, int splits, size_t shared_bytes,
                   bool overlap, cudaStream_t stream) {
  // The grid is one-dimensional, because its other axes end at 65535.
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (splits > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = unsigned(splits);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Runs `enqueue(major compute capability)` with `device` current.
template <class Enqueue>
const char* on_device(int device, Enqueue enqueue) {
  int previous = 0, major = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = enqueue(major);
  if (previous != device) cudaSetDevice(previous);
  // Reported here, and not again to whoever asks for the last error.
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace clp
