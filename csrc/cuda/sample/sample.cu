// `sample` on CUDA. Rows without filters: one block mixes and draws from a fixed slice of 2048 ids
// of one row and writes a partial result; a second kernel combines a row's partials in a fixed
// order. So a row's bits depend neither on B nor on the scheduling, and no floating-point number
// is added atomically. Rows with filters are filter.cu's, which is launched as well where
// there is a filter argument: which rows are whose is decided on the device. Seeds, positions,
// temperatures, weights and filters are read on the device only.
#include <cuda_runtime.h>

#include "shared/philox.h"
#include "shared/sample.h"
#include "cuda/sample/filter.cuh"
#include "cuda/sample/mix.cuh"
#include "cuda/sample/normalise.cuh"

namespace clp {
namespace {

constexpr int kCombineRows = 4;  // rows a block of the second kernel, one warp each
constexpr double kLog2E = 1.4426950408889634;
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

// As on the CPU: z/t + g > s is -log(u) < exp(z/t - s), and 1 - u <= -log(u) <= (1 - u)/u. So
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
  bound *= exp2_approx(room * float(kLog2E));
  unsigned found = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) found |= unsigned(low[k] <= bound) << k;
  return found;
}

// At least 4 blocks a multiprocessor, hence at most 64 registers.
template <class T, Mix HOW>
__global__ void __launch_bounds__(kThreads, 4)
    sample_slices_kernel(const SampleArgs a, unsigned slices, const SourceTerm* terms,
                         Partial* partials) {
  __shared__ float scratch[3][kWarps];
  __shared__ Drawn drawn_by[kWarps];
  const int64_t b = blockIdx.x / slices;
  const int64_t first = int64_t(blockIdx.x % slices) * kSlice;
  Partial* out = partials + blockIdx.x;
  if (filtered(a, b)) return;

  float z[kPerThread], peak = -INFINITY;
  mix<T, HOW>(a, terms, b, first, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) peak = fmaxf(peak, z[k]);
  peak = reduce_block(peak, scratch[0], [](float x, float y) { return fmaxf(x, y); });
  if (fabsf(peak) == INFINITY) {
    if (threadIdx.x == 0) *out = {-INFINITY, -1, peak, 0.0f, 0.0f, 0.0f};
    return;
  }

  const double temperature = a.temperature[b];
  const bool greedy = !(temperature > 0.0);
  const double t = greedy ? 1.0 : fmax(temperature, kMinTemperature);
  // Two floats for log2(e)/t: one alone shifts every exponent by 3e-8 in the same direction.
  const double scale = kLog2E / t;
  const float high = float(scale), low = float(scale - double(high));
  const float floor = float(fmax(-87.0 * t, -3e38));
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
    found = contenders<T>(a, b, first, e, double(peak) / t, scratch[2]);
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
      one.score = one.score / t + philox_gumbel(word);
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

// One warp per row: lane i takes partials i, i + 32, ... in order, then a fixed tree over the lanes.
__global__ void __launch_bounds__(32 * kCombineRows)
    sample_combine_kernel(const SampleArgs a, unsigned slices, const Partial* partials) {
  const int64_t b = int64_t(blockIdx.x) * kCombineRows + threadIdx.x / 32;
  if (b >= a.B || filtered(a, b)) return;
  const unsigned lane = threadIdx.x % 32;
  const Partial* row = partials + b * slices;
  const double given = a.temperature[b];
  const double t = given > 0.0 ? fmax(given, kMinTemperature) : 1.0;

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
  const bool bad = fabsf(peak) == INFINITY || !(given >= 0.0 && given < INFINITY);
  a.tokens[b] = bad ? -1 : token;
  const float logprob = bad ? NAN : float((double(logit) - double(peak)) / t - log(sum));
  a.logprobs[b] = logprob;
  a.filtered_logprobs[b] = !bad && given == 0.0 ? 0.0f : logprob;
}

// The parts of the scratch memory, each a multiple of 16 bytes long.
struct Workspace {
  Partial* partials;
  SourcePartial* sources;  // probability mode
  SourceTerm* terms;
  char* filters;
  int64_t size;
};

Workspace divide(char* memory, int64_t m, int64_t B, int64_t V, bool probability, bool filters) {
  Workspace w = {};
  const auto take = [&](int64_t bytes) {
    char* part = memory + w.size;
    w.size += (bytes + 15) / 16 * 16;
    return part;
  };
  const int64_t slices = slices_of(V);
  w.partials = reinterpret_cast<Partial*>(take(B * slices * int64_t(sizeof(Partial))));
  if (probability) {
    const int64_t bytes = B * m * slices * int64_t(sizeof(SourcePartial));
    w.sources = reinterpret_cast<SourcePartial*>(take(bytes));
    w.terms = reinterpret_cast<SourceTerm*>(take(B * m * int64_t(sizeof(SourceTerm))));
  }
  if (filters) w.filters = take(sample_filter_workspace(B, V));
  return w;
}

bool has_filters(const SampleArgs& a) { return a.top_k || a.top_p || a.min_p; }

template <class T>
void launch_normalise(const SampleArgs& a, const Workspace& w, cudaStream_t stream) {
  const unsigned slices = unsigned(slices_of(a.V));
  const unsigned blocks = unsigned(a.B) * unsigned(a.m) * slices, rows = unsigned(a.B);
  sum_sources_kernel<T><<<blocks, kThreads, 0, stream>>>(a, slices, w.sources);
  normalise_kernel<<<rows, 32, 0, stream>>>(a, slices, w.sources, w.terms);
}

template <class T, Mix HOW>
void launch_draw(const SampleArgs& a, const Workspace& w, cudaStream_t stream) {
  const unsigned slices = unsigned(slices_of(a.V));
  const unsigned blocks = unsigned(a.B) * slices;
  const unsigned groups = unsigned((a.B + kCombineRows - 1) / kCombineRows);
  sample_slices_kernel<T, HOW><<<blocks, kThreads, 0, stream>>>(a, slices, w.terms, w.partials);
  sample_combine_kernel<<<groups, 32 * kCombineRows, 0, stream>>>(a, slices, w.partials);
}

}  // namespace

int64_t sample_cuda_workspace(int64_t m, int64_t B, int64_t V, bool probability, bool filters) {
  return divide(nullptr, m, B, V, probability, filters).size;
}

const char* sample_cuda(const SampleArgs& a, void* workspace, int device, void* stream) {
  if (a.B == 0) return nullptr;
  // The grid is one-dimensional, because its other axes end at 65535.
  if (a.B * (a.probability ? a.m : 1) * slices_of(a.V) > INT32_MAX) {
    return "B * ceil(V / 2048), in probability mode times m, must stay below 2^31";
  }
  if (has_filters(a) && a.B > INT32_MAX / 8) return "B must stay below 2^28 with filters";
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const Workspace w = divide(static_cast<char*>(workspace), a.m, a.B, a.V, a.probability,
                             has_filters(a));
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  with_types(a, [&](auto zero, auto how) {
    using T = decltype(zero);
    if (a.probability) launch_normalise<T>(a, w, queue);
    launch_draw<T, decltype(how)::value>(a, w, queue);
  });
  error = cudaGetLastError();
  if (error == cudaSuccess && has_filters(a)) {
    error = sample_filter_cuda(a, w.terms, w.filters, device, queue);
  }
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace clp
