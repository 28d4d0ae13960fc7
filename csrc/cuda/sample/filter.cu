// top-k, top-p and min-p on CUDA, exact and without a sort. One kernel mixes a row into float32 z
// in the workspace and sums its exponentials slice by slice. A second one, a cluster of blocks per
// row (one block before sm_90), finds the least z that the filters keep (select.cuh) and
// draws from what is left. After the mix, z is read once for the draw, and about three times each
// for top-k and top-p.
#include "cuda/sample/filter.cuh"

#include <cfloat>

#include "shared/philox.h"
#include "cuda/ptx.cuh"
#include "cuda/sample/mix.cuh"
#include "cuda/sample/select.cuh"

namespace clp {
namespace {

constexpr unsigned kMaxRanks = 8;  // blocks per row; clusters beyond 8 are not portable

struct alignas(16) FilterPartial {
  double sum;     // of exp((z - maximum) / temperature)
  float maximum;  // +inf marks a bad row
  float unused;
};

int64_t padded(int64_t V) { return slices_of(V) * kSlice; }

// Writes z (-inf past the end of the row) and the partial of one slice.
template <class T, Mix HOW>
__global__ void __launch_bounds__(kThreads)
    mix_slices_kernel(const SampleArgs a, unsigned slices, const SourceTerm* terms,
                      FilterPartial* partials, float* mixed) {
  __shared__ float maxima[kWarps];
  __shared__ double sums[kWarps];
  const int64_t b = blockIdx.x / slices;
  const int64_t first = int64_t(blockIdx.x % slices) * kSlice;
  if (!filtered(a, b)) return;
  float z[kPerThread], peak = -INFINITY;
  mix<T, HOW>(a, terms, b, first, z);
  float* row = mixed + b * slices * int64_t(kSlice) + first;
#pragma unroll
  for (int k = 0; k < kPerThread; k += 4) {
    const float4 four = make_float4(z[k], z[k + 1], z[k + 2], z[k + 3]);
    *reinterpret_cast<float4*>(row + place<T>(k)) = four;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) peak = fmaxf(peak, z[k]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
  }
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) peak = fmaxf(peak, maxima[warp]);

  double sum = 0.0;
  if (fabsf(peak) < INFINITY) {
    const double t = fmax(a.temperature[b], kMinTemperature);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) sum += exp((double(z[k]) - double(peak)) / t);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp];
  partials[blockIdx.x] = {sum, peak, 0.0f};
}

struct alignas(16) Winner {  // of a block; as two float4, to be read across a cluster
  double score;
  int64_t token;  // -1: none
  uint64_t kept;  // units of mass of what the filters keep
  uint64_t unused;
};

struct Shared {
  SelectShared select;
  Winner winner;
  Winner by_warp[kSelectWarps];
  double total;
  float peak;
  uint32_t least;
};

__device__ __forceinline__ void take(Winner& best, double score, int64_t token) {
  if (token < 0) return;
  if (best.token < 0 || score > best.score || (score == best.score && token < best.token)) {
    best.score = score;
    best.token = token;
  }
}

// This thread's share of the draw from the keys from `least` up.
__device__ __forceinline__ Winner best_of_share(const SampleArgs& a, int64_t b, const Row& row,
                                       uint32_t least) {
  const double top = double(row.peak) / row.temperature;
  // What rounding can hide: then everything may tie and takes the exact score.
  const double slack = fabs(top) * 0x1p-50 + 1e-9;
  Winner best = {-INFINITY, -1, 0, 0};
  double gain = INFINITY;
  for (unsigned q = row.begin; q < row.quads; q += row.step) {
    const float4 four = row.z[q];
    const float z[4] = {four.x, four.y, four.z, four.w};
    bool any = false;
#pragma unroll
    for (int k = 0; k < 4; ++k) any |= key_of(z[k]) >= least;
    if (!any) continue;
    const Philox4 words = philox_block(a.seed[b], a.position[b], q);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (key_of(z[k]) < least) continue;
      const double mass = row.mass(z[k]);
      best.kept += row.units(mass);
      // z/t + g > score is -log(u) < exp(z/t - score), and 1 - u <= -log(u).
      if ((double(~words.x[k]) + 0.5) * 0x1p-32 > mass * gain) continue;
      const double score = double(z[k]) / row.temperature + philox_gumbel(words.x[k]);
      if (!(score > best.score) && best.token >= 0) continue;  // ids come in ascending order
      best.score = score;
      best.token = int64_t(q) * 4 + k;
      gain = exp(fmin(top - score + slack, 700.0));
    }
  }
  return best;
}

// The row's winner, in every thread of its first block; ends with a barrier of the row's blocks.
__device__ __forceinline__ Winner combine(Shared& s, unsigned ranks, Winner best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double score = __shfl_xor_sync(kAllLanes, best.score, step);
    const int64_t token = __shfl_xor_sync(kAllLanes, best.token, step);
    best.kept += __shfl_xor_sync(kAllLanes, best.kept, step);
    take(best, score, token);
  }
  if (threadIdx.x % 32 == 0) s.by_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSelectWarps; ++warp) {
      take(best, s.by_warp[warp].score, s.by_warp[warp].token);
      best.kept += s.by_warp[warp].kept;
    }
    s.winner = best;
  }
  __syncthreads();
  cluster_barrier();
  best = s.winner;
  for (unsigned rank = 1; rank < ranks; ++rank) {
    union {
      float4 raw[2];
      Winner winner;
    } other;
    const float4* theirs = reinterpret_cast<const float4*>(&s.winner);
    other.raw[0] = read_from_cluster(theirs, rank);
    other.raw[1] = read_from_cluster(theirs + 1, rank);
    take(best, other.winner.score, other.winner.token);
    best.kept += other.winner.kept;
  }
  cluster_barrier();
  return best;
}

struct FilterArgs {
  SampleArgs sample;
  const FilterPartial* partials;  // [B, slices]
  const float* mixed;             // [B, slices * kSlice]
  unsigned slices, ranks;         // ranks: blocks per row
};

__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(const FilterArgs f) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const SampleArgs& a = f.sample;
  const int64_t b = blockIdx.x / f.ranks;
  const unsigned rank = blockIdx.x % f.ranks;
  if (!filtered(a, b)) return;

  Row row;
  row.z = reinterpret_cast<const float4*>(f.mixed + b * f.slices * int64_t(kSlice));
  row.quads = f.slices * unsigned(kSlice / 4);
  row.begin = rank * kSelectThreads + threadIdx.x;
  row.step = f.ranks * kSelectThreads;
  row.temperature = fmax(a.temperature[b], kMinTemperature);
  if (threadIdx.x < 32) {
    // Lane i takes partials i, i + 32, ... in order, then a fixed tree over the lanes.
    const FilterPartial* partials = f.partials + b * f.slices;
    float peak = -INFINITY;
    for (unsigned i = threadIdx.x; i < f.slices; i += 32) peak = fmaxf(peak, partials[i].maximum);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
    }
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < f.slices; i += 32) {
      const double gap = double(partials[i].maximum) - double(peak);
      if (partials[i].sum != 0.0) sum += partials[i].sum * exp(gap / row.temperature);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (threadIdx.x == 0) {
      s.peak = peak;
      s.total = sum;
    }
  }
  __syncthreads();
  row.peak = s.peak;
  row.total = s.total;
  if (fabsf(row.peak) == INFINITY) {
    if (rank != 0 || threadIdx.x != 0) return;
    a.tokens[b] = -1;
    a.logprobs[b] = a.filtered_logprobs[b] = NAN;
    return;
  }
  // A power of two, so that a single id of the largest z has exactly the mass it is.
  row.scale = scalbn(1.0, kUnitBits - ilogb(row.total));
  row.bins_per_unit = float(kBinsPerUnit / row.temperature);

  uint32_t least = key_of(-FLT_MAX);
  const int64_t top_k = a.top_k ? a.top_k[b] : 0;
  if (top_k > 0 && top_k < a.V) {
    least = threshold<false>(row, s.select, f.ranks, least, uint64_t(top_k), 0.0);
  }
  const double top_p = a.top_p ? a.top_p[b] : 1.0;
  if (top_p < 1.0) least = threshold<true>(row, s.select, f.ranks, least, 0, top_p);
  if (a.min_p && a.min_p[b] > 0.0) {
    if (threadIdx.x == 0) {
      const double lowest = log(a.min_p[b]);
      const auto stays = [&](float z) {
        return (double(z) - double(row.peak)) / row.temperature >= lowest;
      };
      s.least = first_key(least, key_of(row.peak), stays);
    }
    __syncthreads();
    least = s.least;
  }

  const Winner winner = combine(s, f.ranks, best_of_share(a, b, row, least));
  if (rank != 0 || threadIdx.x != 0) return;
  const float z = reinterpret_cast<const float*>(row.z)[winner.token];
  const double logit = (double(z) - double(row.peak)) / row.temperature;
  a.tokens[b] = winner.token;
  a.logprobs[b] = float(logit - log(row.total));
  a.filtered_logprobs[b] = float(logit - log(double(winner.kept) / row.scale));
}

}  // namespace

int64_t sample_filter_workspace(int64_t B, int64_t V) {
  return B * (slices_of(V) * int64_t(sizeof(FilterPartial)) + padded(V) * int64_t(sizeof(float)));
}

cudaError_t sample_filter_cuda(const SampleArgs& a, const void* terms, void* workspace,
                               int device, cudaStream_t stream) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  const unsigned slices = unsigned(slices_of(a.V));
  const unsigned blocks = unsigned(a.B) * slices;
  FilterPartial* partials = static_cast<FilterPartial*>(workspace);
  float* mixed = reinterpret_cast<float*>(partials + a.B * slices);
  const SourceTerm* sources = static_cast<const SourceTerm*>(terms);
  with_types(a, [&](auto zero, auto how) {
    using T = decltype(zero);
    constexpr Mix kHow = decltype(how)::value;
    mix_slices_kernel<T, kHow>
        <<<blocks, kThreads, 0, stream>>>(a, slices, sources, partials, mixed);
  });
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;

  // Several blocks per row while rows are few; the bits do not depend on how many.
  unsigned ranks = 1;
  while (major >= 9 && ranks < kMaxRanks && ranks < slices && a.B * ranks < 128) ranks *= 2;
  const FilterArgs args{a, partials, mixed, slices, ranks};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ranks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(a.B) * ranks);
  config.blockDim = dim3(kSelectThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = ranks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, select_kernel, args);
}

}  // namespace clp
