#include "cpu/sample/filter.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>

#include "shared/philox.h"

namespace clp {
namespace {

bool larger(const SampleCandidate& a, const SampleCandidate& b) { return a.z > b.z; }

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

// Finite floats as integers of the same order; both zeros are 0.
int64_t key_of(float z) {
  uint32_t bits;
  memcpy(&bits, &z, sizeof(bits));
  const int64_t magnitude = bits & 0x7fffffffu;
  return bits >> 31 ? -magnitude : magnitude;
}

float value_of(int64_t key) {
  const uint32_t bits = key < 0 ? uint32_t(-key) | 0x80000000u : uint32_t(key);
  float z;
  memcpy(&z, &bits, sizeof(z));
  return z;
}

// The least z that is at least min_p times as likely as the largest, by the rounding of the
// definition: (z - z_max) / temperature >= log min_p. At most 32 steps: near zero there are a billion
// floats that do not differ in it.
float least_likely(const FilterRow& row) {
  const double log_min_p = std::log(row.min_p);
  int64_t low = key_of(-FLT_MAX), high = key_of(row.maximum);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if ((double(value_of(middle)) - double(row.maximum)) / row.temperature >= log_min_p) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return value_of(low);
}

}  // namespace

double mass_of(const SampleCandidate* candidates, int64_t count) {
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += candidates[i].mass;
  return mass;
}

const double* sample_bin_masses() {
  static const auto masses = [] {
    std::array<double, kSampleBins> all;
    for (int bin = 0; bin < kSampleBins; ++bin) all[size_t(bin)] = std::exp(bin / -16.0);
    return all;
  }();
  return masses.data();
}

FilterResult filter(const FilterRow& row, const SampleKernels& kernels, const float* z, int64_t V,
                    const SampleBins& bins, SampleCandidate* room) {
  double masses[kSampleBins];
  for (int bin = 0; bin < kSampleBins; ++bin) {
    masses[bin] = double(bins.mass[0][bin] + bins.mass[1][bin]) * kSampleMassUnit *
                  sample_bin_masses()[bin];
  }
  const double total = std::accumulate(masses, masses + kSampleBins, 0.0);
  FilterResult result{-FLT_MAX, total, total, V};
  // The last bin that something is kept of, and what is kept of it, in the room once it is needed.
  int last = kSampleBins - 1, counted = -1;
  int64_t left = 0;
  const auto take = [&](int bin) {
    last = bin;
    if (counted == bin) return;
    counted = bin;
    left = 0;
    for (int64_t first = 0; first < V; first += kSampleSlice) {
      left += kernels.gather(z + first, first, std::min(kSampleSlice, V - first), row.maximum,
                             row.temperature, bin, room + left);
    }
  };
  const auto cut = [&](float least) {
    left = std::partition(room, room + left, [&](const auto& one) { return one.z >= least; }) - room;
    result.least = least;
    result.kept = std::accumulate(masses, masses + last, 0.0) + mass_of(room, left);
  };
  if (row.top_k > 0 && row.top_k < V) {
    int64_t missing = row.top_k;
    const auto count = [&](int bin) { return bins.count[0][bin] + bins.count[1][bin]; };
    int bin = 0;
    for (; count(bin) < missing; ++bin) missing -= count(bin);
    take(bin);
    std::nth_element(room, room + missing - 1, room + left, larger);
    cut(room[missing - 1].z);
  }
  if (row.top_p < 1) {
    const double need = row.top_p * result.kept;
    double above = 0;
    int bin = 0;
    while (bin < last && above + masses[bin] < need) above += masses[bin++];
    take(bin);
    // Rounding may leave the whole of the last bin below what is needed.
    if (left > 0) cut(last_below(room, left, above, need));
  }
  if (row.min_p > 0) {
    const float least = least_likely(row);
    if (least > result.least) {
      // As the kernels place an id.
      const double steps = (double(row.maximum) - double(least)) * (16 / row.temperature);
      take(int(std::nearbyint(std::fmin(steps, kSampleBins - 1))));
      cut(least);
    }
  }
  if (counted >= 0) {
    double above = 0;
    for (int bin = 0; bin < last; ++bin) above += masses[bin] / sample_bin_masses()[bin];
    result.count = int64_t(above) + left;
  }
  return result;
}

const SampleCandidate& best_candidate(const FilterRow& row, int64_t seed, int64_t position,
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
