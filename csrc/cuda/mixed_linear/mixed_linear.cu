// `mixed_linear` on CUDA: a block streams its rows of the m matrices one after the other, without a
// gap between them, and scales the product of each by its tokens' weights in registers. Unverified:
// not yet run on a GPU.
#include "cuda/mixed_rows.cuh"

namespace clp {
namespace {

template <class T, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(kThreads) mixed_linear_kernel(const MixedLinearCuda a) {
  using S = Shape<ROW_TILES, TOKEN_TILES>;
  const MixedTokens& t = a.tokens;
  const Place place(a.splits, (t.T + S::kTokens - 1) / S::kTokens);
  const int64_t block_row = S::kRows * place.row_tile, block_token = S::kTokens * place.token_tile;
  const LaneRows<T, 2 * ROW_TILES> W(a.expert_weight, a.row_stride, a.N, block_row);
  const LaneRows<T, TOKEN_TILES> x(t.x, t.x_stride, t.T, block_token);
  const TokenWeights weights{t.weights, t.m, S::weight_rows()};

  float acc[S::kTiles][4] = {}, total[S::kTiles][4] = {};
  auto scale = [&](int64_t i) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float weight = weight_at(weights.row(8 * n + 2 * quad_id() + half), i);
#pragma unroll
        for (int tile = n; tile < S::kTiles; tile += TOKEN_TILES) {
#pragma unroll
          for (int c = half; c < 4; c += 2) {
            const float added = __fmaf_rn(weight, acc[tile][c], total[tile][c]);
            // Chosen, not multiplied: a term of weight zero leaves nothing, not even NaN.
            total[tile][c] = weight != 0.0f ? added : total[tile][c];
            acc[tile][c] = 0.0f;
          }
        }
      }
    }
  };
  stream<S::kChunks, S::kStages>(
      t.K, place.split, a.splits, t.m,
      [&](uint4* slot, int64_t i, int64_t k) {
        W.copy(slot, k, t.K, i * a.expert_stride);
        x.copy(slot + 2 * ROW_TILES * kThreads, k, t.K);
      },
      [&] {
        weights.look_up(t, block_token, S::kTokens);
        __syncthreads();
      },
      [&](const uint4* slot) { multiply_step<T, ROW_TILES, TOKEN_TILES>(slot, acc); }, scale);
  const Reduction<S::kTiles> reduction{place.split, a.splits};
  reduction.add(total);

#pragma unroll 1
  for (int index = 0; index < reduction.kMost; ++index) {
    const int tile = reduction.tile_of(index);
    if (tile >= S::kTiles) break;
    const float4 sums = reduction.sum(index);
    const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t row = block_row + 16 * (tile / TOKEN_TILES) + group_id() + 8 * (c / 2);
      const int local = 8 * (tile % TOKEN_TILES) + 2 * quad_id() + c % 2;
      const int64_t token = block_token + local;
      if (row >= a.N || token >= t.T) continue;
      float y = sum[c];
      if (a.bias != nullptr) {
        const T* const bias = static_cast<const T*>(a.bias) + row;
        const float* const weight_row = weights.row(local);
        for (int64_t i = 0; i < t.m; ++i) {
          const float weight = weight_at(weight_row, i);
          if (weight != 0.0f) y = __fmaf_rn(weight, to_float(bias[i * a.N]), y);
        }
      }
      static_cast<T*>(a.y)[token * a.N + row] = from_float<T>(y);
    }
  }
}

template <class T, int ROW_TILES, int TOKEN_TILES>
cudaError_t launch_tiles(const MixedLinearCuda& a, cudaStream_t stream) {
  using S = Shape<ROW_TILES, TOKEN_TILES>;
  return launch(mixed_linear_kernel<T, ROW_TILES, TOKEN_TILES>, a,
                S::blocks(a.N, a.tokens.T, a.splits), a.splits, S::kBytes, false, stream);
}

template <class T>
cudaError_t enqueue(const MixedLinearCuda& a, cudaStream_t stream) {
  if (a.tokens.T <= 8) return launch_tiles<T, 4, 1>(a, stream);
  if (a.tokens.T <= 16) return launch_tiles<T, 4, 2>(a, stream);
  if (a.tokens.T <= 32) return launch_tiles<T, 4, 4>(a, stream);
  // Two sums per tile: 64 rows beside 64 tokens would not fit the registers.
  return launch_tiles<T, 2, 8>(a, stream);
}

}  // namespace

const char* mixed_linear_cuda(const MixedLinearCuda& a, int device, void* stream) {
  if (a.tokens.T == 0 || a.N == 0) return nullptr;
  return on_device(device, [&](int) {
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    return a.tokens.dtype == DType::kBFloat16 ? enqueue<__nv_bfloat16>(a, queue)
                                              : enqueue<__half>(a, queue);
  });
}

}  // namespace clp
