// `mixed_lora` on CUDA, in two launches. The first makes u = x A^T. The second streams W, and adds
// the low-rank part and the bias to the product before its one rounding. From sm_90 on it starts
// beside the first and waits for it only once W has been read. Unverified: not yet run on a GPU.
#include <cstring>

#include "cuda/mixed_rows.cuh"

namespace clp {
namespace {

// Zero in place of infinity and NaN.
__device__ __forceinline__ float finite(float value) {
  return fabsf(value) < INFINITY ? value : 0.0f;
}

// A float32 number for the tensor cores: high + low has 22 significant bits. A low part only goes
// with finite numbers; the product of the high parts alone decides where infinity and NaN stand.
struct Parts {
  float high, low;

  __device__ __forceinline__ explicit Parts(float value)
      : high(round_tf32(value)), low(round_tf32(finite(value - high))) {}
};

// --- u = x A^T: a block has 16 ranks and 8 tokens ----------------------------------------------

constexpr int kShrinkStages = 4;

template <class T>
__device__ __forceinline__ void unpack(const uint4* slot, float (&values)[8]) {
#pragma unroll
  for (int piece = 0; piece < kPieces<T>; ++piece) {
    const uint4 words = slot[piece * kThreads];
    T loaded[16 / sizeof(T)];
    static_assert(sizeof(loaded) == sizeof(words));
    memcpy(loaded, &words, sizeof(words));
#pragma unroll
    for (int i = 0; i < int(16 / sizeof(T)); ++i) {
      values[piece * int(16 / sizeof(T)) + i] = to_float(loaded[i]);
    }
  }
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads) shrink_kernel(const MixedLoraCuda a) {
  start_next_grid();
  constexpr int P = kPieces<A>;
  const MixedTokens& t = a.tokens;
  const int64_t R = t.m * a.r;
  const Place place(a.shrink_splits, (t.T + 7) / 8);
  const int64_t first_rank = 16 * place.row_tile, first_token = 8 * place.token_tile;
  const LaneRows<A, 2> ranks(a.lora_A, a.A_stride, R, first_rank);
  const LaneRows<T, 1> x(t.x, t.x_stride, t.T, first_token);

  float acc[1][4] = {};
  auto copy = [&](uint4* slot, int64_t, int64_t k) {
    ranks.copy(slot, k, t.K);
    x.copy(slot + 2 * P * kThreads, k, t.K);
  };
  auto multiply = [&](const uint4* slot) {
    float upper[8], lower[8], b[8];
    unpack<A>(slot, upper);
    unpack<A>(slot + P * kThreads, lower);
    unpack<T>(slot + 2 * P * kThreads, b);
    // The tensor cores round towards zero; a fresh sum each step keeps that from adding up.
    float step[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if constexpr (P == 1) {
        multiply_tf32(step, upper[i], lower[i], upper[i + 1], lower[i + 1], b[i], b[i + 1]);
      } else {
        const Parts a0(upper[i]), a1(lower[i]), a2(upper[i + 1]), a3(lower[i + 1]);
        multiply_tf32(step, a0.high, a1.high, a2.high, a3.high, b[i], b[i + 1]);
        multiply_tf32(step, a0.low, a1.low, a2.low, a3.low, finite(b[i]), finite(b[i + 1]));
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[0][c] += step[c];
  };
  stream<2 * P + 1, kShrinkStages>(
      t.K, place.split, a.shrink_splits, 1, copy, [] {}, multiply, [](int64_t) {});
  const Reduction<1> reduction{place.split, a.shrink_splits};
  reduction.add(acc);
  if (reduction.tile_of(0) != 0) return;
  const float4 total = reduction.sum(0);
  const float sum[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t rank = first_rank + group_id() + 8 * (c / 2);
    const int64_t token = first_token + 2 * quad_id() + c % 2;
    if (rank < R && token < t.T) a.u[token * R + rank] = sum[c];
  }
}

// --- y = x W^T + bias + sum_i w_i u_i B_i^T ----------------------------------------------------

constexpr int kRowTiles = 4;
constexpr int kRows = 16 * kRowTiles;
// Steps of 8 ranks that are loaded together, so that their latencies overlap.
constexpr int kBatch = 4;

// B comes from memory the first time: fetched while W is read, it is near when u is ready.
template <class A>
__device__ __forceinline__ void prefetch_B(const MixedLoraCuda& a, int64_t first_row) {
#pragma unroll 1
  for (int64_t at = threadIdx.x; at < a.tokens.m * kRows; at += kThreads) {
    const int64_t row = first_row + at % kRows;
    if (row >= a.N) continue;
    const A* const B =
        static_cast<const A*>(a.lora_B) + at / kRows * a.B_stride_m + row * a.B_stride_n;
#pragma unroll 1
    for (int64_t j = 0; j < a.r; j += 128 / int(sizeof(A))) prefetch_to_l2(B + j * a.B_stride_r);
  }
}

// sum_i w_i u_i B_i^T for one tile of 16 rows and 8 tokens; `weight_rows` are those of the lane's
// two tokens. The product of an adapter is scaled after it is made, so that leaving it out is
// exact, whatever A and B contain. `active` says for each of the two tokens whether any was left in.
template <class A>
__device__ __forceinline__ void low_rank(const MixedLoraCuda& a, int64_t first_row,
                                         int64_t first_token, const float* const (&weight_rows)[2],
                                         float (&out)[4], bool (&active)[2]) {
  constexpr bool kExact = sizeof(A) == 2;  // B has at most 11 significant bits
  const int64_t m = a.tokens.m, r = a.r;
  const int64_t row = first_row + group_id(), token = first_token + group_id();
  const float* const u_row = a.u + token * m * r;
  const A* const B_row = static_cast<const A*>(a.lora_B) + row * a.B_stride_n;
  float product[4] = {};
  int64_t i = 0, first = 0;
  while (i < m) {
    float u[kBatch][2], weight[kBatch][2];
    A b[kBatch][4];
    int64_t load_i = i, load_first = first;
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t j = load_first + 2 * quad_id() + half;
        const bool exists = load_i < m && j < r;
        const A* const B = B_row + load_i * a.B_stride_m + j * a.B_stride_r;
        b[step][2 * half] = exists && row < a.N ? __ldg(B) : from_float<A>(0.0f);
        b[step][2 * half + 1] =
            exists && row + 8 < a.N ? __ldg(B + 8 * a.B_stride_n) : from_float<A>(0.0f);
        // Not through the read-only cache: the grid before this one may have been writing u.
        u[step][half] = exists && token < a.tokens.T ? __ldcg(u_row + load_i * r + j) : 0.0f;
        weight[step][half] = load_i < m ? weight_at(weight_rows[half], load_i) : 0.0f;
      }
      load_first += 8;
      if (load_first >= r) {
        load_first = 0;
        ++load_i;
      }
    }
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      if (i >= m) break;
      const Parts b0(u[step][0]), b1(u[step][1]);
      const Parts a0(to_float(b[step][0])), a1(to_float(b[step][1]));
      const Parts a2(to_float(b[step][2])), a3(to_float(b[step][3]));
      multiply_tf32(product, a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
      multiply_tf32(product, finite(a0.high), finite(a1.high), finite(a2.high), finite(a3.high),
                    b0.low, b1.low);
      if constexpr (!kExact) {
        multiply_tf32(product, a0.low, a1.low, a2.low, a3.low, finite(b0.high), finite(b1.high));
      }
      first += 8;
      if (first < r) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (weight[step][c % 2] != 0.0f) {
          out[c] = __fmaf_rn(weight[step][c % 2], product[c], out[c]);
          active[c % 2] = true;
        }
        product[c] = 0.0f;
      }
      first = 0;
      ++i;
    }
  }
}

template <class T, class A, int TOKEN_TILES>
__global__ void __launch_bounds__(kThreads) mixed_lora_kernel(const MixedLoraCuda a) {
  using S = Shape<kRowTiles, TOKEN_TILES>;
  const MixedTokens& t = a.tokens;
  const Place place(a.base_splits, (t.T + S::kTokens - 1) / S::kTokens);
  const int64_t block_row = kRows * place.row_tile, block_token = S::kTokens * place.token_tile;
  const LaneRows<T, 2 * kRowTiles> W(a.base_weight, a.base_stride, a.N, block_row);
  const LaneRows<T, TOKEN_TILES> x(t.x, t.x_stride, t.T, block_token);
  const TokenWeights weights{t.weights, t.m, S::weight_rows()};

  float acc[S::kTiles][4] = {};
  stream<S::kChunks, S::kStages>(
      t.K, place.split, a.base_splits, 1,
      [&](uint4* slot, int64_t, int64_t k) {
        W.copy(slot, k, t.K);
        x.copy(slot + 2 * kRowTiles * kThreads, k, t.K);
      },
      [&] {
        weights.look_up(t, block_token, S::kTokens);
        prefetch_B<A>(a, block_row);
      },
      [&](const uint4* slot) { multiply_step<T, kRowTiles, TOKEN_TILES>(slot, acc); },
      [](int64_t) {});
  const Reduction<S::kTiles> base{place.split, a.base_splits};
  base.add(acc);

  wait_for_previous_grid();
#pragma unroll 1
  for (int i = 0; i < base.kMost; ++i) {
    const int tile = base.tile_of(i);
    if (tile >= S::kTiles) break;
    const int local = 8 * (tile % TOKEN_TILES);
    const int64_t first_row = block_row + 16 * (tile / TOKEN_TILES);
    const float* const weight_rows[2] = {weights.row(local + 2 * quad_id()),
                                         weights.row(local + 2 * quad_id() + 1)};
    const float4 total = base.sum(i);
    const float sum[4] = {total.x, total.y, total.z, total.w};
    float delta[4] = {};
    bool active[2] = {};
    low_rank<A>(a, first_row, block_token + local, weight_rows, delta, active);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t row = first_row + group_id() + 8 * (c / 2);
      const int64_t token = block_token + local + 2 * quad_id() + c % 2;
      if (row >= a.N || token >= t.T) continue;
      float y = sum[c];
      if (a.bias != nullptr) y += to_float(static_cast<const T*>(a.bias)[row]);
      if (active[c % 2]) y += delta[c];
      static_cast<T*>(a.y)[token * a.N + row] = from_float<T>(y);
    }
  }
}

template <class T, class A>
cudaError_t launch_shrink(const MixedLoraCuda& a, cudaStream_t stream) {
  const int64_t tiles = (a.tokens.m * a.r + 15) / 16 * ((a.tokens.T + 7) / 8);
  const size_t bytes = kShrinkStages * (2 * kPieces<A> + 1) * kThreads * 16;
  static_assert(kShrinkStages * 3 * kThreads * 16 >= Reduction<1>::kBytes);
  return launch(shrink_kernel<T, A>, a, tiles * a.shrink_splits, a.shrink_splits, bytes, false,
                stream);
}

template <class T, class A, int TOKEN_TILES>
cudaError_t launch_base(const MixedLoraCuda& a, bool overlap, cudaStream_t stream) {
  using S = Shape<kRowTiles, TOKEN_TILES>;
  return launch(mixed_lora_kernel<T, A, TOKEN_TILES>, a, S::blocks(a.N, a.tokens.T, a.base_splits),
                a.base_splits, S::kBytes, overlap, stream);
}

template <class T, class A>
cudaError_t enqueue(const MixedLoraCuda& a, int major, cudaStream_t stream) {
  const bool shrinks = a.tokens.m * a.r > 0;
  if (shrinks) {
    const cudaError_t error = launch_shrink<T, A>(a, stream);
    if (error != cudaSuccess) return error;
  }
  if (a.N == 0) return cudaSuccess;
  const bool overlap = shrinks && major >= 9;
  if (a.tokens.T <= 8) return launch_base<T, A, 1>(a, overlap, stream);
  if (a.tokens.T <= 16) return launch_base<T, A, 2>(a, overlap, stream);
  if (a.tokens.T <= 32) return launch_base<T, A, 4>(a, overlap, stream);
  return launch_base<T, A, 8>(a, overlap, stream);
}

template <class T>
cudaError_t enqueue_for(const MixedLoraCuda& a, int major, cudaStream_t stream) {
  return a.float32_lora ? enqueue<T, float>(a, major, stream) : enqueue<T, T>(a, major, stream);
}

}  // namespace

const char* mixed_lora_cuda(const MixedLoraCuda& a, int device, void* stream) {
  if (a.tokens.T == 0) return nullptr;
  return on_device(device, [&](int major) {
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    return a.tokens.dtype == DType::kBFloat16 ? enqueue_for<__nv_bfloat16>(a, major, queue)
                                              : enqueue_for<__half>(a, major, queue);
  });
}

}  // namespace clp
