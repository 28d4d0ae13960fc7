// Threads, fixed-order reduction and choice of instruction set for `sample` on the CPU.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "sample_filter.h"
#include "sample_isa.h"

namespace clp {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Logits, weighted by the passes made over them, below which one thread does it all: 25 us of work
// with AVX2, against 2 us to start a parallel region when the threads spin and 10 us when they sleep.
constexpr int64_t kSerialWork = 1 << 18;

struct Row {
  int64_t num_terms = 0;
  bool valid = true;
  float temperature = 0.0f;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
  // A greedy token is the largest, and stays in every filter.
  bool filtered() const {
    return temperature > 0.0f && (top_k > 0 || top_p < 1 || min_p > 0);
  }
};

// Terms and temperature of row b; terms of weight 0 are left out and never read.
Row read_row(const SampleArgs& a, int64_t b, SampleTerm* terms) {
  Row row;
  const char* logits = static_cast<const char*>(a.logits);
  for (int64_t i = 0; i < a.m; ++i) {
    const float weight = a.weights ? a.weights[b * a.m + i] : 1.0f;
    if (weight == 0.0f) continue;
    const int64_t offset = (i * a.stride_m + b * a.stride_b) * element_size(a.dtype);
    terms[row.num_terms++] = {logits + offset, weight, 0.0f, 0.0f};
    // Also NaN: the comparison is false.
    if (a.probability && !(weight > 0.0f)) row.valid = false;
  }
  if (a.probability && row.num_terms == 0) row.valid = false;
  const float t = a.temperature[b];
  if (!(t >= 0.0f && std::isfinite(t))) row.valid = false;
  row.temperature = t > 0.0f && t < kMinTemperature ? kMinTemperature : t;
  if (a.top_k && a.top_k[b] < a.V) row.top_k = a.top_k[b];
  if (a.top_p) row.top_p = double(a.top_p[b]);
  if (a.min_p) row.min_p = double(a.min_p[b]);
  return row;
}

struct Total {
  double maximum = -kInfinity;
  double sum = 0;  // of exp((z - maximum) / temperature); NaN: bad row
};

// In the order of the slices, whoever computed them.
Total combine(const SamplePartial* partials, int64_t slices, double temperature) {
  Total total;
  for (int64_t c = 0; c < slices; ++c) {
    total.maximum = std::fmax(total.maximum, double(partials[c].maximum));
  }
  for (int64_t c = 0; c < slices; ++c) {
    const double gap = double(partials[c].maximum) - total.maximum;
    // An all-masked slice has sum 0 and gap -inf or NaN.
    const double share = gap == 0.0 ? 1.0 : std::exp(gap / temperature);
    if (partials[c].sum != 0.0) total.sum += partials[c].sum * share;
  }
  if (!std::isfinite(total.maximum)) total.sum = kNaN;
  return total;
}

// Probability mode needs each source row's log-sum-exp before it can mix.
void normalise(const SampleArgs& a, const SampleKernels& kernels, int threads, int64_t slices,
               std::vector<SampleTerm>& terms, std::vector<Row>& rows) {
  std::vector<SamplePartial> partials(size_t(a.B * a.m * slices));
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.part(a.B * a.m * slices);
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t source = job / slices, first = job % slices * kSampleSlice;
      const Row& row = rows[size_t(source / a.m)];
      if (!row.valid || source % a.m >= row.num_terms) continue;
      const int64_t count = a.V - first < kSampleSlice ? a.V - first : kSampleSlice;
      kernels.sum_exp(terms[size_t(source)].logits, a.dtype, first, count, &partials[size_t(job)]);
    }
  });
  for (int64_t b = 0; b < a.B; ++b) {
    Row& row = rows[size_t(b)];
    if (!row.valid) continue;
    double least = kInfinity;
    std::vector<double> offsets;
    for (int64_t i = 0; i < row.num_terms; ++i) {
      SampleTerm& term = terms[size_t(b * a.m + i)];
      const Total total = combine(&partials[size_t((b * a.m + i) * slices)], slices, 1.0);
      if (std::isnan(total.sum)) row.valid = false;
      term.maximum = float(total.maximum);
      offsets.push_back(std::log(total.sum) - std::log(double(term.weight)));
      least = std::fmin(least, offsets.back());
    }
    // Only differences of z matter; the likeliest ids lie near 0 so, where floats are dense.
    for (int64_t i = 0; i < row.num_terms; ++i) {
      terms[size_t(b * a.m + i)].offset = float(offsets[size_t(i)] - least);
    }
  }
}

// The best score, the lowest id on ties.
const SamplePartial& winner(const SamplePartial* partials, int64_t slices) {
  const SamplePartial* best = partials;
  for (const SamplePartial* p = partials; p < partials + slices; ++p) {
    if (p->token >= 0 && p->score > best->score) best = p;
  }
  return *best;
}

void finish_row(const SampleArgs& a, int64_t b, const Row& row, const SamplePartial* partials,
                int64_t slices) {
  if (!row.valid) return;
  const double temperature = row.temperature == 0.0f ? 1.0 : double(row.temperature);
  const Total total = combine(partials, slices, temperature);
  if (std::isnan(total.sum)) return;
  const SamplePartial& best = winner(partials, slices);
  a.tokens[b] = best.token;
  const double scaled = (double(best.logit) - total.maximum) / temperature;
  a.logprobs[b] = float(scaled - std::log(total.sum));
  a.filtered_logprobs[b] = row.temperature == 0.0f ? 0.0f : a.logprobs[b];
}

// What one row with filters needs while it is worked on.
struct FilterRoom {
  std::unique_ptr<float[]> z;
  std::unique_ptr<SampleCandidate[]> candidates;
  // Of each slice. A maximum of +inf marks a bad one.
  std::vector<float> maxima;
  std::vector<double> masses;
  std::vector<SampleBins> bins;
  std::vector<SamplePartial> partials;
  float least = 0;      // what is kept
  int64_t kept = 0;
  FilterRoom(int64_t V, int64_t slices)
      : z(new float[size_t(V + kSampleGroup)]),
        candidates(new SampleCandidate[size_t(V + 1)]),
        maxima(size_t(slices)),
        masses(size_t(slices)),
        bins(size_t(slices)),
        partials(size_t(slices)) {}
};

// Candidates up to which the draw is made among them alone, one by one; 20 ns each against 2 ns for
// every id of the vocabulary.
int64_t few(int64_t V) { return V / 16 + 64; }

// The slices are shared among the team; every member comes to the same thresholds' inputs, and the
// first one does what is not shared.
void filtered_row(const SampleArgs& a, const SampleKernels& kernels, int64_t b, const Row& row,
                  const SampleTerm* terms, const Team& team, FilterRoom& room) {
  const int64_t slices = int64_t(room.maxima.size());
  const Range mine = team.part(slices);
  const double temperature = double(row.temperature);
  const auto task = [&](int64_t slice) {
    const int64_t first = slice * kSampleSlice;
    return SampleTask{terms,     row.num_terms,    a.dtype,       a.probability, row.temperature,
                      a.seed[b], a.position[b], first, std::min(kSampleSlice, a.V - first)};
  };
  float* const z = room.z.get();
  for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
    float& maximum = room.maxima[size_t(slice)];
    if (!kernels.mix(task(slice), z + slice * kSampleSlice, &maximum)) maximum = INFINITY;
  }
  team.wait();
  float maximum = -INFINITY;
  for (float one : room.maxima) maximum = std::max(maximum, one);
  if (std::isinf(maximum)) return team.wait();  // a bad row: before the room is used again
  for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
    const SampleTask t = task(slice);
    room.masses[size_t(slice)] =
        kernels.mass(z + t.first, t.count, maximum, temperature, &room.bins[size_t(slice)]);
  }
  team.wait();
  FilterRow filter{maximum, 0, temperature, row.top_k, row.top_p, row.min_p};
  for (double mass : room.masses) filter.total += mass;
  SampleCandidate* const candidates = room.candidates.get();
  if (team.rank == 0) {
    SampleBins all = room.bins[0];
    for (int64_t slice = 1; slice < slices; ++slice) {
      for (int bin = 0; bin < kSampleBins; ++bin) {
        all.mass[bin] += room.bins[size_t(slice)].mass[bin];
        all.count[bin] += room.bins[size_t(slice)].count[bin];
      }
    }
    room.least = filter_threshold(filter, kernels, z, a.V, all, candidates);
    room.kept = 0;
    for (int64_t slice = 0; slice < slices && room.kept <= few(a.V); ++slice) {
      const SampleTask t = task(slice);
      room.kept += kernels.keep(z + t.first, t.first, t.count, maximum, temperature, room.least,
                                few(a.V) - room.kept, candidates + room.kept);
    }
  }
  team.wait();
  const bool one_by_one = room.kept <= few(a.V);
  double to_beat = -kInfinity;
  for (int64_t slice = mine.begin; slice < mine.end && !one_by_one; ++slice) {
    SamplePartial& out = room.partials[size_t(slice)];
    kernels.draw(task(slice), to_beat, room.least, z + slice * kSampleSlice, &out);
    to_beat = std::fmax(to_beat, out.score);
  }
  team.wait();
  if (team.rank == 0) {
    double log_kept = 0, logit = 0;
    if (one_by_one) {
      const SampleCandidate& best =
          race(filter, a.seed[b], a.position[b], candidates, room.kept);
      a.tokens[b] = int64_t(best.id);
      logit = double(best.z);
      log_kept = std::log(mass_of(candidates, room.kept));
    } else {
      const SamplePartial& best = winner(room.partials.data(), slices);
      a.tokens[b] = best.token;
      logit = double(best.logit);
      log_kept = std::log(combine(room.partials.data(), slices, temperature).sum);
    }
    const double scaled = logit / temperature - double(maximum) / temperature;
    a.logprobs[b] = float(scaled - std::log(filter.total));
    a.filtered_logprobs[b] = float(scaled - log_kept);
  }
  team.wait();  // before the room is used again
}

void filtered_rows(const SampleArgs& a, const SampleKernels& kernels, int threads, int64_t slices,
                   const std::vector<SampleTerm>& terms, const std::vector<Row>& rows) {
  std::vector<int64_t> todo;
  for (int64_t b = 0; b < a.B; ++b) {
    if (rows[size_t(b)].valid && rows[size_t(b)].filtered()) todo.push_back(b);
  }
  if (todo.empty()) return;
  const int64_t count = int64_t(todo.size());
  FilterRoom shared(a.V, slices);
  // A row is worked on by one thread, in its cache; those left over by all.
  parallel(threads, [&](const Team& team) {
    const int64_t whole = count / team.size * team.size;
    const std::unique_ptr<FilterRoom> own(whole > 0 ? new FilterRoom(a.V, slices) : nullptr);
    const auto work = [&](int64_t i, const Team& workers, FilterRoom& room) {
      const int64_t b = todo[size_t(i)];
      filtered_row(a, kernels, b, rows[size_t(b)], terms.data() + b * a.m, workers, room);
    };
    for (int64_t i = team.rank; i < whole; i += team.size) work(i, Team{0, 1}, *own);
    for (int64_t i = whole; i < count; ++i) work(i, team, shared);
  });
}

}  // namespace

const SampleKernels& sample_kernels(Isa isa) {
#ifdef CLP_X86
  // bfloat16 dot products are of no use here.
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) return kSampleKernelsAvx512;
  if (isa == Isa::kAvx2) return kSampleKernelsAvx2;
#endif
  (void)isa;
  return kSampleKernelsScalar;
}

void sample_cpu(const SampleArgs& a, int num_threads, const char* isa) {
  const SampleKernels& kernels = sample_kernels(resolve_isa(isa));
  const int64_t slices = (a.V + kSampleSlice - 1) / kSampleSlice;
  const int64_t passes = a.m * (a.probability ? 8 : 1) + 8;
  const int threads = a.B * a.V * passes < kSerialWork ? 1 : num_threads;
  std::vector<SampleTerm> terms(size_t(a.B * a.m));
  std::vector<Row> rows;
  for (int64_t b = 0; b < a.B; ++b) rows.push_back(read_row(a, b, terms.data() + b * a.m));
  if (a.probability) normalise(a, kernels, threads, slices, terms, rows);
  std::fill_n(a.tokens, a.B, -1);
  std::fill_n(a.logprobs, a.B, float(kNaN));
  std::fill_n(a.filtered_logprobs, a.B, float(kNaN));
  filtered_rows(a, kernels, threads, slices, terms, rows);
  std::vector<SamplePartial> partials(size_t(a.B * slices));
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.part(a.B * slices);
    double to_beat = -kInfinity;
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t b = job / slices, first = job % slices * kSampleSlice;
      // What this range has found in earlier slices of the row; it only prunes.
      if (first == 0) to_beat = -kInfinity;
      const Row& row = rows[size_t(b)];
      if (!row.valid || row.filtered()) continue;
      const int64_t count = a.V - first < kSampleSlice ? a.V - first : kSampleSlice;
      SamplePartial& out = partials[size_t(job)];
      kernels.slice({terms.data() + b * a.m, row.num_terms, a.dtype, a.probability,
                     row.temperature, a.seed[b], a.position[b], first, count},
                    to_beat, &out);
      to_beat = std::fmax(to_beat, out.score);
    }
  });
  for (int64_t b = 0; b < a.B; ++b) {
    const Row& row = rows[size_t(b)];
    if (row.filtered()) continue;
    finish_row(a, b, row, partials.data() + b * slices, slices);
  }
}

}  // namespace clp
