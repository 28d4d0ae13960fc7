// `sample` on CUDA, geometric mode. One block mixes and draws from a fixed slice of 2048 ids of one
// row and writes a partial result; a second kernel combines a row's partials in a fixed order. So a
// row's bits depend neither on B nor on the scheduling, and there are no atomics. Seeds, positions,
// temperatures and weights are read on the device only.
#include <cuda_runtime.h>

#include "philox.h"
#include "sample.h"
#include "sample_mix.cuh"

namespace clp {
namespace {

constexpr int kCombineRows = 4;  // rows a block of the second kernel, one warp each
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kMinTemperature = 1e-30f;
// log2(e) in two floats: one alone shifts every exponent by 3e-8 in the same direction.
constexpr float kLog2EHigh = 1.44269502f, kLog2ELow = 1.92596303e-8f;
// exp(kGumbelMin - kGumbelMax): an id this far below the slice's largest logit cannot win.
constexpr float kNegligible = 4.8e-12f;

struct alignas(16) Partial {
  double score;   // of the token; greedy: its z
  int64_t token;  // -1: nothing finite in the slice
  float maximum;  // of z; +inf marks a bad row
  float sum;      // of exp((z - maximum) / temperature)
  float logit;    // z of the token
  float unused;
};

__device__ __forceinline__ float exp2_approx(float y) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(y));
  return out;
}

// All threads get the result; the tree is fixed. `scratch` holds kWarps values, one use each.
template <class Op>
__device__ __forceinline__ float reduce_block(float value, float* scratch, Op op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  return value;
}

struct Drawn {
  double score;
  float logit;
  int place;  // ids beyond the slice's first; kSlice: none
};

__device__ __forceinline__ bool beats(const Drawn& a, const Drawn& b) {
  return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// As the CPU's race: z/t + g > s is -log(u) < exp(z/t - s), and 1 - u <= -log(u) <= (1 - u)/u. So
// the least upper bound of -log(u)/e over the block leaves a few ids (one or two in a flat slice),
// and only these take the exact float64 score. Returns their bits.
template <class T>
__device__ __forceinline__ unsigned contenders(const SampleArgs& a, int64_t b, int64_t first,
                                               const float e[kPerThread], double top,
                                               float* scratch) {
  float low[kPerThread], least = INFINITY, bound = INFINITY;
#pragma unroll
  for (int quad = 0; quad < kPerThread; quad += 4) {
    const float most = fmaxf(fmaxf(e[quad], e[quad + 1]), fmaxf(e[quad + 2], e[quad + 3]));
#pragma unroll
    for (int k = quad; k < quad + 4; ++k) low[k] = INFINITY;
    if (most < kNegligible) continue;
    const int64_t v = first + place<T>(quad);
    const Philox4 words = philox_block(a.seed[b], a.position[b], uint32_t(v / 4));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // 1 - u in units of 2^-32, rounded down.
      const float shortfall = __uint2float_rz(~words.x[k]);
      low[quad + k] = __fdividef(shortfall, e[quad + k]);
      if (low[quad + k] < least) {
        least = low[quad + k];
        const float high = shortfall + 1.0f;
        bound = __fdividef(high, e[quad + k] * (1.0f - high * 0x1p-32f));
      }
    }
  }
  // 1e-3 covers the approximate e, quotients and rounding; 2^-49 the ties of huge scores, whose
  // noise is lost in the float64 sum.
  const float room = fminf(fabsf(float(top)) * 0x1p-49f + 1e-3f, 60.0f);
  bound = reduce_block(bound, scratch, [](float x, float y) { return fminf(x, y); });
  bound *= exp2_approx(room * kLog2EHigh);
  unsigned found = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) found |= unsigned(low[k] <= bound) << k;
  return found;
}

// At least 4 blocks a multiprocessor, hence at most 64 registers.
template <class T, bool WEIGHTED>
__global__ void __launch_bounds__(kThreads, 4)
    sample_slices_kernel(const SampleArgs a, unsigned slices, Partial* partials) {
  __shared__ float scratch[3][kWarps];
  __shared__ Drawn drawn_by[kWarps];
  const int64_t b = blockIdx.x / slices;
  const int64_t first = int64_t(blockIdx.x % slices) * kSlice;
  Partial* out = partials + blockIdx.x;

  float z[kPerThread], peak = -INFINITY;
  mix<T, WEIGHTED>(a, b, first, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) peak = fmaxf(peak, z[k]);
  peak = reduce_block(peak, scratch[0], [](float x, float y) { return fmaxf(x, y); });
  if (fabsf(peak) == INFINITY) {
    if (threadIdx.x == 0) *out = {-INFINITY, -1, peak, 0.0f, 0.0f, 0.0f};
    return;
  }

  const float temperature = a.temperature[b];
  const bool greedy = !(temperature > 0.0f);
  const float t = greedy ? 1.0f : fmaxf(temperature, kMinTemperature);
  const float high = __fdiv_rn(kLog2EHigh, t);
  const float low = __fdiv_rn(__fmaf_rn(-high, t, kLog2EHigh) + kLog2ELow, t);
  const float floor = fmaxf(-125.5f * t * 0.693147f, -3e38f);
  float e[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const float d = fmaxf(z[k] - peak, floor);
    e[k] = exp2_approx(__fmaf_rn(d, high, d * low));
  }
  const float sum = reduce_block(
      ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])), scratch[1],
      [](float x, float y) { return x + y; });

  unsigned found = 0;
  if (greedy) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) found |= unsigned(z[k] == peak) << k;
  } else {
    found = contenders<T>(a, b, first, e, double(peak) / double(t), scratch[2]);
  }
  Drawn best = {-INFINITY, 0.0f, kSlice};
  for (unsigned rest = found; rest != 0; rest &= rest - 1) {
    const int k = __ffs(int(rest)) - 1;
    Drawn one = {0.0, 0.0f, place<T>(k)};
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) one.logit = j == k ? z[j] : one.logit;
    one.score = double(one.logit);
    if (!greedy) {
      const int64_t v = first + one.place;
      const Philox4 words = philox_block(a.seed[b], a.position[b], uint32_t(v / 4));
      const uint32_t pair = v & 1 ? words.x[1] : words.x[0];
      const uint32_t word = v & 2 ? (v & 1 ? words.x[3] : words.x[2]) : pair;
      one.score = one.score / double(t) + philox_gumbel(word);
    }
    if (beats(one, best)) best = one;
  }
  if (__any_sync(kAllLanes, found != 0)) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const Drawn other = {__shfl_xor_sync(kAllLanes, best.score, step),
                           __shfl_xor_sync(kAllLanes, best.logit, step),
                           __shfl_xor_sync(kAllLanes, best.place, step)};
      if (beats(other, best)) best = other;
    }
  }
  if (threadIdx.x % 32 == 0) drawn_by[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    if (beats(drawn_by[warp], best)) best = drawn_by[warp];
  }
  *out = {best.score, first + best.place, peak, sum, best.logit, 0.0f};
}

// One warp a row: lane i takes partials i, i + 32, ... in order, then a fixed tree over the lanes.
__global__ void __launch_bounds__(32 * kCombineRows)
    sample_combine_kernel(const SampleArgs a, unsigned slices, const Partial* partials) {
  const int64_t b = int64_t(blockIdx.x) * kCombineRows + threadIdx.x / 32;
  if (b >= a.B) return;
  const unsigned lane = threadIdx.x % 32;
  const Partial* row = partials + b * slices;
  const float given = a.temperature[b];
  const double t = given > 0.0f ? double(fmaxf(given, kMinTemperature)) : 1.0;

  float peak = -INFINITY, logit = 0.0f;
  double score = -INFINITY;
  int64_t token = -1;
  for (unsigned i = lane; i < slices; i += 32) {
    peak = fmaxf(peak, row[i].maximum);
    // Slices come in ascending order: a later equal score has a higher id.
    if (row[i].token >= 0 && row[i].score > score) {
      score = row[i].score;
      token = row[i].token;
      logit = row[i].logit;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
    const double other_score = __shfl_xor_sync(kAllLanes, score, step);
    const long long other = __shfl_xor_sync(kAllLanes, static_cast<long long>(token), step);
    const float other_logit = __shfl_xor_sync(kAllLanes, logit, step);
    if (other >= 0 && (token < 0 || other_score > score ||
                       (other_score == score && other < token))) {
      score = other_score;
      token = other;
      logit = other_logit;
    }
  }
  double sum = 0.0;
  for (unsigned i = lane; i < slices; i += 32) {
    if (row[i].token < 0) continue;
    const double gap = double(row[i].maximum) - double(peak);
    sum += double(row[i].sum) * (gap == 0.0 ? 1.0 : exp(gap / t));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane != 0) return;
  const bool bad = fabsf(peak) == INFINITY || !(given >= 0.0f && given < INFINITY);
  a.tokens[b] = bad ? -1 : token;
  a.logprobs[b] = bad ? NAN : float((double(logit) - double(peak)) / t - log(sum));
}

int64_t slices_of(int64_t V) { return (V + kSlice - 1) / kSlice; }

template <class T>
void launch(const SampleArgs& a, Partial* partials, cudaStream_t stream) {
  const unsigned slices = unsigned(slices_of(a.V));
  const unsigned blocks = unsigned(a.B) * slices;
  if (a.weights) {
    sample_slices_kernel<T, true><<<blocks, kThreads, 0, stream>>>(a, slices, partials);
  } else {
    sample_slices_kernel<T, false><<<blocks, kThreads, 0, stream>>>(a, slices, partials);
  }
  const unsigned groups = unsigned((a.B + kCombineRows - 1) / kCombineRows);
  sample_combine_kernel<<<groups, 32 * kCombineRows, 0, stream>>>(a, slices, partials);
}

}  // namespace

int64_t sample_cuda_workspace(int64_t B, int64_t V) {
  return B * slices_of(V) * int64_t(sizeof(Partial));
}

const char* sample_cuda(const SampleArgs& a, void* workspace, int device, void* stream) {
  if (a.B == 0) return nullptr;
  // The grid is one-dimensional, because its other axes end at 65535.
  if (a.B * slices_of(a.V) > INT32_MAX) return "B * ceil(V / 2048) must stay below 2^31";
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  Partial* partials = static_cast<Partial*>(workspace);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::kFloat32:
      launch<float>(a, partials, queue);
      break;
    case DType::kBFloat16:
      launch<__nv_bfloat16>(a, partials, queue);
      break;
    case DType::kFloat16:
      launch<__half>(a, partials, queue);
      break;
  }
  error = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace clp
