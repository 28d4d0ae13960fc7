// Threads, fixed-order reduction and choice of instruction set for `sample` on the CPU.
#include "sample.h"

#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
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

void finish_row(const SampleArgs& a, int64_t b, const Row& row, const SamplePartial* partials,
                int64_t slices) {
  a.tokens[b] = -1;
  a.logprobs[b] = float(kNaN);
  if (!row.valid) return;
  const double temperature = row.temperature == 0.0f ? 1.0 : double(row.temperature);
  const Total total = combine(partials, slices, temperature);
  if (std::isnan(total.sum)) return;
  const SamplePartial* best = partials;
  for (const SamplePartial* p = partials; p < partials + slices; ++p) {
    if (p->token >= 0 && p->score > best->score) best = p;
  }
  a.tokens[b] = best->token;
  const double scaled = (double(best->logit) - total.maximum) / temperature;
  a.logprobs[b] = float(scaled - std::log(total.sum));
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
  std::vector<SamplePartial> partials(size_t(a.B * slices));
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.part(a.B * slices);
    double to_beat = -kInfinity;
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t b = job / slices, first = job % slices * kSampleSlice;
      // What this range has found in earlier slices of the row; it only prunes.
      if (first == 0) to_beat = -kInfinity;
      const Row& row = rows[size_t(b)];
      if (!row.valid) continue;
      const int64_t count = a.V - first < kSampleSlice ? a.V - first : kSampleSlice;
      SamplePartial& out = partials[size_t(job)];
      kernels.slice({terms.data() + b * a.m, row.num_terms, a.dtype, a.probability,
                     row.temperature, a.seed[b], a.position[b], first, count},
                    to_beat, &out);
      to_beat = std::fmax(to_beat, out.score);
    }
  });
  for (int64_t b = 0; b < a.B; ++b) {
    finish_row(a, b, rows[size_t(b)], partials.data() + b * slices, slices);
  }
}

}  // namespace clp
