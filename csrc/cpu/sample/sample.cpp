// Threads, fixed-order reduction and choice of instruction set for `sample` on the CPU.
#include "shared/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/mix_logits/mix_logits.h"
#include "cpu/parallel.h"
#include "cpu/sample/filter.h"
#include "cpu/sample/isa.h"

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
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
  // A greedy token is the largest, and stays in every filter.
  bool filtered() const {
    return temperature > 0 && (top_k > 0 || top_p < 1 || min_p > 0);
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
    terms[row.num_terms++] = {logits + offset, weight};
  }
  const double t = a.temperature[b];
  if (!(t >= 0 && std::isfinite(t))) row.valid = false;
  row.temperature = t > 0 && t < kMinTemperature ? kMinTemperature : t;
  if (a.top_k && a.top_k[b] < a.V) row.top_k = a.top_k[b];
  if (a.top_p) row.top_p = a.top_p[b];
  if (a.min_p) row.min_p = a.min_p[b];
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
  const double temperature = row.temperature == 0 ? 1.0 : row.temperature;
  const Total total = combine(partials, slices, temperature);
  if (std::isnan(total.sum)) return;
  const SamplePartial& best = winner(partials, slices);
  a.tokens[b] = best.token;
  const double scaled = (double(best.logit) - total.maximum) / temperature;
  a.logprobs[b] = float(scaled - std::log(total.sum));
  a.filtered_logprobs[b] = row.temperature == 0 ? 0.0f : a.logprobs[b];
}

// What one row with filters needs while it is worked on.
struct FilterRoom {
  std::vector<float> z, maxima;  // maxima: of each slice; +inf marks a bad one
  std::vector<SampleCandidate> candidates;
  std::vector<SamplePartial> partials;
  std::vector<SampleBins> bins;  // of each member of the team
  FilterResult result{};

  void fit(int64_t V, int64_t slices, int64_t members) {
    if (int64_t(candidates.size()) < V + 1) {
      z.resize(size_t(V + kSampleGroup));
      candidates.resize(size_t(V + 1));
    }
    maxima.resize(size_t(slices));
    partials.resize(size_t(slices));
    bins.resize(size_t(members));
  }
};

// A thread keeps its room, 20 bytes for each id of the largest vocabulary so far: fresh memory
// costs 160 page faults a call at 152,000 ids, a tenth of the time.
FilterRoom& own_room() {
  static thread_local FilterRoom room;
  return room;
}

// Ids up to which the draw is made among them alone, one by one: 20 ns each, against 1 ns for every
// id of the vocabulary.
int64_t few(int64_t V) { return V / 32 + 64; }

// The slices are shared among the team; the first member does what is not shared.
void filtered_row(const SampleArgs& a, const SampleKernels& kernels, int64_t b, const Row& row,
                  const SampleTerm* terms, const Team& team, FilterRoom& room) {
  const int64_t slices = int64_t(room.maxima.size());
  const Range mine = team.part(slices);
  const double temperature = row.temperature;
  const auto task = [&](int64_t slice) {
    const int64_t first = slice * kSampleSlice;
    return SampleTask{terms,     row.num_terms,   a.dtype, row.temperature,
                      a.seed[b], a.position[b], first,   std::min(kSampleSlice, a.V - first)};
  };
  float* const z = room.z.data();
  for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
    float& maximum = room.maxima[size_t(slice)];
    if (!kernels.mix(task(slice), z + slice * kSampleSlice, &maximum)) maximum = INFINITY;
  }
  team.wait();
  const float maximum = *std::max_element(room.maxima.begin(), room.maxima.end());
  if (std::isinf(maximum)) return team.wait();  // a bad row: before the room is used again
  SampleBins& bins = room.bins[size_t(team.rank)];
  bins = {};
  for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
    const SampleTask t = task(slice);
    kernels.mass(z + t.first, t.count, maximum, temperature, row.top_k > 0, &bins);
  }
  team.wait();
  const FilterRow limits{maximum, temperature, row.top_k, row.top_p, row.min_p};
  SampleCandidate* const candidates = room.candidates.data();
  if (team.rank == 0) {
    for (int64_t member = 1; member < team.size; ++member) {
      for (int half : {0, 1}) {
        for (int bin = 0; bin < kSampleBins; ++bin) {
          bins.mass[half][bin] += room.bins[size_t(member)].mass[half][bin];
          bins.count[half][bin] += room.bins[size_t(member)].count[half][bin];
        }
      }
    }
    room.result = filter(limits, kernels, z, a.V, bins, candidates);
  }
  team.wait();
  const FilterResult& result = room.result;
  const bool one_by_one = result.count <= few(a.V);
  double to_beat = -kInfinity;
  for (int64_t slice = mine.begin; slice < mine.end && !one_by_one; ++slice) {
    SamplePartial& out = room.partials[size_t(slice)];
    kernels.draw(task(slice), to_beat, maximum, room.maxima[size_t(slice)], result.least,
                 z + slice * kSampleSlice, &out);
    to_beat = std::fmax(to_beat, out.score);
  }
  team.wait();
  if (team.rank == 0) {
    double logit = 0;
    if (one_by_one) {
      int64_t kept = 0;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const SampleTask t = task(slice);
        kept += kernels.keep(z + t.first, t.first, t.count, maximum, temperature, result.least,
                             candidates + kept);
      }
      const SampleCandidate& best = best_candidate(limits, a.seed[b], a.position[b], candidates, kept);
      a.tokens[b] = int64_t(best.id);
      logit = double(best.z);
    } else {
      const SamplePartial& best = winner(room.partials.data(), slices);
      a.tokens[b] = best.token;
      logit = double(best.logit);
    }
    const double scaled = logit / temperature - double(maximum) / temperature;
    a.logprobs[b] = float(scaled - std::log(result.total));
    a.filtered_logprobs[b] = float(scaled - std::log(result.kept));
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
  FilterRoom& shared = own_room();
  // A row is worked on by one thread, in its cache; those left over by all.
  parallel(threads, [&](const Team& team) {
    const int64_t whole = count / team.size * team.size;
    const auto work = [&](int64_t i, const Team& workers, FilterRoom& room) {
      const int64_t b = todo[size_t(i)];
      filtered_row(a, kernels, b, rows[size_t(b)], terms.data() + b * a.m, workers, room);
    };
    if (whole > 0) own_room().fit(a.V, slices, 1);
    for (int64_t i = team.rank; i < whole; i += team.size) work(i, Team{0, 1}, own_room());
    if (whole == count) return;
    team.wait();
    if (team.rank == 0) shared.fit(a.V, slices, team.size);
    team.wait();
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

namespace {

// Some rows of a batch, from the logits given for them.
SampleArgs part(const SampleArgs& a, int64_t first, int64_t count, const float* z) {
  const auto from = [&](auto* rows) { return rows ? rows + first : nullptr; };
  return {z,
          DType::kFloat32,
          1,
          count,
          a.V,
          0,
          a.V,
          nullptr,
          false,
          a.temperature + first,
          a.seed + first,
          a.position + first,
          from(a.top_k),
          from(a.top_p),
          from(a.min_p),
          a.tokens + first,
          a.logprobs + first,
          a.filtered_logprobs + first};
}

// Mixes probabilities as `mix_logits` does, some rows at a time, and samples from their logarithm.
void sample_mixture(const SampleArgs& a, int num_threads, const char* isa) {
  // 4 MB stay in a cache until they are read again.
  const int64_t step = std::max<int64_t>(num_threads, (int64_t(1) << 20) / a.V);
  static thread_local std::vector<float> z;
  z.resize(size_t(std::min(step, a.B) * a.V));
  for (int64_t first = 0; first < a.B; first += step) {
    const int64_t count = std::min(step, a.B - first);
    const char* const logits =
        static_cast<const char*>(a.logits) + first * a.stride_b * element_size(a.dtype);
    const MixLogitsArgs rows{{logits, a.dtype, a.m, count, a.V, a.stride_m, a.stride_b,
                              a.weights + first * a.m, true},
                             z.data()};
    mix_logits_relative_cpu(rows, num_threads, isa);
    sample_cpu(part(a, first, count, z.data()), num_threads, isa);
  }
}

}  // namespace

void sample_cpu(const SampleArgs& a, int num_threads, const char* isa) {
  if (a.probability && a.weights) return sample_mixture(a, num_threads, isa);
  const SampleKernels& kernels = sample_kernels(resolve_isa(isa));
  const int64_t slices = (a.V + kSampleSlice - 1) / kSampleSlice;
  const int64_t passes = a.m + 8;
  const int threads = a.B * a.V * passes < kSerialWork ? 1 : num_threads;
  std::vector<SampleTerm> terms(size_t(a.B * a.m));
  std::vector<Row> rows;
  for (int64_t b = 0; b < a.B; ++b) rows.push_back(read_row(a, b, terms.data() + b * a.m));
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
      kernels.slice({terms.data() + b * a.m, row.num_terms, a.dtype, row.temperature, a.seed[b],
                     a.position[b], first, count},
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
