#include "sample_filter.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "philox.h"

namespace clp {
namespace {

bool larger(const SampleCandidate& a, const SampleCandidate& b) { return a.z > b.z; }

int64_t gather(const FilterRow& row, const SampleKernels& kernels, const float* z, int64_t V, int bin,
               SampleCandidate* room) {
  int64_t found = 0;
  for (int64_t first = 0; first < V; first += kSampleSlice) {
    found += kernels.gather(z + first, first, std::min(kSampleSlice, V - first), row.maximum,
                            row.temperature, bin, room + found);
  }
  return found;
}

// The last z, going down the candidates, above which there is less than `need`, with `above` before
// them all.
float last_below(SampleCandidate* c, int64_t count, double above, double need) {
  int64_t begin = 0, end = count;
  while (end - begin > 64) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(c + begin, c + middle, c + end, larger);
    const double mass = mass_of(c + begin, middle - begin);
    if (above + mass < need) {
      begin = middle;
      above += mass;
    } else {
      end = middle;
    }
  }
  std::sort(c + begin, c + end, larger);
  float least = c[begin].z;
  for (int64_t i = begin; i < end && above < need; ++i) {
    least = c[i].z;
    above += c[i].mass;
  }
  return least;
}

// The least z that is at least min_p times as likely as the largest, by the rounding of the
// definition: log p >= log p_max + log min_p.
float least_likely(const FilterRow& row) {
  const double t = row.temperature, top = double(row.maximum) / t, log_total = std::log(row.total);
  const double least = -log_total + std::log(row.min_p);
  const auto stays = [&](float z) { return double(z) / t - top - log_total >= least; };
  const double guess = double(row.maximum) + std::log(row.min_p) * t;
  float z = guess > -FLT_MAX ? float(guess) : -FLT_MAX;
  while (z > -FLT_MAX && stays(z)) z = std::nextafterf(z, -INFINITY);
  while (!stays(z)) z = std::nextafterf(z, INFINITY);
  return z;
}

}  // namespace

double mass_of(const SampleCandidate* candidates, int64_t count) {
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += candidates[i].mass;
  return mass;
}

float filter_threshold(const FilterRow& row, const SampleKernels& kernels, const float* z, int64_t V,
                       const SampleBins& bins, SampleCandidate* room) {
  float least = -FLT_MAX;
  double total = row.total;
  int last = kSampleBins - 1;   // of the bins that top-k leaves
  int64_t left = -1;            // the candidates of that bin, in the room
  if (row.top_k > 0 && row.top_k < V) {
    int64_t above = 0;
    total = 0;
    for (last = 0; above + bins.count[last] < row.top_k; ++last) {
      above += bins.count[last];
      total += bins.mass[last];
    }
    const int64_t found = gather(row, kernels, z, V, last, room), nth = row.top_k - above - 1;
    std::nth_element(room, room + nth, room + found, larger);
    const float kth = room[nth].z;
    const auto stays = [&](const SampleCandidate& one) { return one.z >= kth; };
    left = std::partition(room, room + found, stays) - room;
    total += mass_of(room, left);
    least = std::max(least, kth);
  }
  if (row.top_p < 1) {
    const double need = row.top_p * total;
    double above = 0;
    int bin = 0;
    while (bin < last && above + bins.mass[bin] < need) above += bins.mass[bin++];
    if (bin < last || left < 0) left = gather(row, kernels, z, V, bin, room);
    // Rounding may leave the whole of the last bin below what is needed.
    if (left > 0) least = std::max(least, last_below(room, left, above, need));
  }
  return row.min_p > 0 ? std::max(least, least_likely(row)) : least;
}

const SampleCandidate& race(const FilterRow& row, int64_t seed, int64_t position,
                            const SampleCandidate* candidates, int64_t count) {
  const double top = double(row.maximum) / row.temperature;
  // What rounding can hide: then everything may tie and takes the exact score.
  const double slack = std::fabs(top) * 0x1p-50 + 1e-9;
  const SampleCandidate* best = nullptr;
  double score = -INFINITY, gain = INFINITY;
  for (const SampleCandidate* one = candidates; one < candidates + count; ++one) {
    const uint32_t word = philox_block(seed, position, one->id / 4).x[one->id % 4];
    // z/t + g > score is -log(u) < exp(z/t - score), and 1 - u <= -log(u).
    if ((double(~word) + 0.5) * 0x1p-32 > one->mass * gain) continue;
    const double value = double(one->z) / row.temperature + philox_gumbel(word);
    if (!(value > score)) continue;  // ids ascend
    best = one;
    score = value;
    gain = std::exp(std::fmin(top - score + slack, 700.0));
  }
  return *best;
}

}  // namespace clp
