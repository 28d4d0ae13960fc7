// Threads, sums over a row and choice of instruction set for mix_logits on the CPU.
#include "cpu/mix_logits/mix_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/mix_logits/isa.h"
#include "cpu/parallel.h"

namespace clp {
namespace {

// Logits, weighted by the passes made over them, below which one thread does it all: 25 us of work
// with AVX2, against 2 us to start a parallel region while the threads spin, 10 us if they sleep.
constexpr int64_t kSerialWork = 1 << 18;

const MixKernels& kernels_of(Isa isa) {
#ifdef CLP_X86
  // bfloat16 dot products are of no use here.
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) return kMixKernelsAvx512;
  if (isa == Isa::kAvx2) return kMixKernelsAvx2;
#endif
  (void)isa;
  return kMixKernelsScalar;
}

// What the threads that work on one row share.
struct Room {
  std::vector<MixSumExp> norms;     // by term and slice
  std::vector<double> sums;         // by slice and term
  std::unique_ptr<float[]> powers;  // by term and id, for probability mode

  Room(int64_t m, int64_t slices, bool probability)
      : norms(size_t(m * slices)), sums(size_t(m * slices)) {
    if (probability) powers.reset(new float[size_t(m * slices * kMixSlice)]);
  }
};

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// What a thread has of its own: one row at a time.
struct Source {
  std::vector<MixTerm> terms;
  std::vector<int64_t> left_out;  // terms of weight 0 that have no softmax
  MixRow row;
  double total_weight;
  bool valid;  // false: z is NaN throughout
};

struct Work {
  const MixArgs& a;
  const MixKernels& kernels;
  int64_t slices;
  bool relative = false;
  // Of the backward, else null.
  const char* dz = nullptr;
  char* d_logits = nullptr;
  float* d_weights = nullptr;

  bool backward() const { return dz != nullptr; }
  int64_t bytes(int64_t elements) const { return elements * element_size(a.dtype); }
  DType out() const { return relative ? DType::kFloat32 : a.dtype; }
  int64_t count(int64_t slice) const { return std::min(kMixSlice, a.V - slice * kMixSlice); }
  char* d_logits_of(int64_t i, int64_t b) const {
    return d_logits ? d_logits + bytes((i * a.B + b) * a.V) : nullptr;
  }

  void read(int64_t b, Source& s) const;
  void normalise(const Team& team, Room& room, Source& s) const;
  void enter(int64_t slice, const Room& room, Source& s) const;
  void fill(void* row, DType dtype, const Team& team, double value) const;
  void mix(int64_t b, const Team& team, Room& room, Source& s, char* z) const;
  void differentiate(int64_t b, const Team& team, Room& room, Source& s, char* scratch) const;
};

// The terms of row b: those that are mixed first; the others only where they have a gradient.
void Work::read(int64_t b, Source& s) const {
  s.terms.clear();
  s.left_out.clear();
  s.row = MixRow{nullptr, 0, 0, a.dtype, a.probability, relative, 0.0f};
  s.total_weight = 0;
  s.valid = true;
  for (const bool active : {true, false}) {
    for (int64_t i = 0; i < a.m && (active || backward()); ++i) {
      const float weight = a.weights[b * a.m + i];
      if ((weight != 0.0f) != active) continue;
      MixTerm term{};
      term.logits =
          static_cast<const char*>(a.logits) + bytes(i * a.stride_m + b * a.stride_b);
      term.d_logits = d_logits_of(i, b);
      term.index = i;
      term.weight = weight;
      s.terms.push_back(term);
      s.row.active += active;
      s.total_weight += double(weight);
      if (a.probability && !(weight >= 0.0f && std::isfinite(weight))) s.valid = false;
    }
  }
  s.row.terms = s.terms.data();
  s.row.count = int64_t(s.terms.size());
}

// In the order of the slices, whoever computed them.
MixSumExp combine(const MixSumExp* parts, int64_t slices) {
  MixSumExp all{-INFINITY, 0.0};
  for (int64_t c = 0; c < slices; ++c) all.maximum = std::max(all.maximum, parts[c].maximum);
  for (int64_t c = 0; c < slices; ++c) {
    // An all-masked slice has sum 0 and a gap of -inf or NaN.
    const double gap = double(parts[c].maximum) - double(all.maximum);
    if (parts[c].sum != 0.0) all.sum += parts[c].sum * (gap == 0.0 ? 1.0 : std::exp(gap));
  }
  return all;
}

void Work::normalise(const Team& team, Room& room, Source& s) const {
  const Range jobs = team.part(s.row.count * slices);
  for (int64_t job = jobs.begin; job < jobs.end; ++job) {
    const int64_t slice = job % slices;
    kernels.sum_exp(s.terms[size_t(job / slices)].logits, a.dtype, slice * kMixSlice,
                    count(slice), room.powers.get() + job * kMixSlice, &room.norms[size_t(job)]);
  }
  team.wait();
  std::vector<MixSumExp> norms;
  for (int64_t t = 0; t < s.row.count; ++t) {
    norms.push_back(combine(&room.norms[size_t(t * slices)], slices));
  }
  double unit = relative ? 0.0 : 1.0;  // of the coefficients
  for (int64_t t = 0; t < s.row.count && relative; ++t) {
    const double coefficient = double(s.terms[size_t(t)].weight) / s.total_weight / norms[size_t(t)].sum;
    unit = std::max(unit, coefficient);
  }
  std::vector<MixTerm> terms;
  for (int64_t t = 0; t < s.row.count; ++t) {
    MixTerm term = s.terms[size_t(t)];
    const MixSumExp& all = norms[size_t(t)];
    if (!(all.sum > 0.0 && std::isfinite(all.maximum))) {
      if (t < s.row.active) s.valid = false;
      if (t >= s.row.active) s.left_out.push_back(term.index);
      if (t >= s.row.active) continue;
    }
    const double share = double(term.weight) / s.total_weight;
    term.weight = float(share);
    term.maximum = all.maximum;
    term.whole.inverse_sum = float(1.0 / all.sum);
    term.whole.coefficient =
        std::max(float(share / all.sum / unit), std::numeric_limits<float>::min());
    term.powers = room.powers.get() + t * slices * kMixSlice;
    if (t == 0) s.row.log_total = float(std::log(s.total_weight) - std::log(all.sum));
    terms.push_back(term);
  }
  s.terms.swap(terms);
  s.row.terms = s.terms.data();
  s.row.count = int64_t(s.terms.size());
  if (s.row.active != 1) s.row.log_total = float(std::log(s.total_weight));
  if (relative) s.row.log_total = 0.0f;
}

// The factors of the terms for a slice.
void Work::enter(int64_t slice, const Room& room, Source& s) const {
  for (MixTerm& term : s.terms) {
    const int64_t first = term.powers - room.powers.get();
    const MixSumExp& norm = room.norms[size_t(first / kMixSlice + slice)];
    const double scale = std::exp(double(norm.maximum) - double(term.maximum));
    term.slice = {float(scale * double(term.whole.inverse_sum)),
                  float(scale * double(term.whole.coefficient)),
                  float(scale * double(term.whole.pull))};
  }
}

// This member's share of the row's slices; value: 0, -inf or NaN.
void Work::fill(void* row, DType dtype, const Team& team, double value) const {
  const bool nan = std::isnan(value), zero = value == 0.0;
  const Range mine = team.part(slices);
  const int64_t begin = mine.begin * kMixSlice, end = std::min(mine.end * kMixSlice, a.V);
  if (dtype == DType::kFloat32) {
    std::fill(static_cast<float*>(row) + begin, static_cast<float*>(row) + end, float(value));
    return;
  }
  const bool brain = dtype == DType::kBFloat16;
  const int word = zero ? 0 : brain ? (nan ? 0x7fc0 : 0xff80) : (nan ? 0x7e00 : 0xfc00);
  std::fill(static_cast<uint16_t*>(row) + begin, static_cast<uint16_t*>(row) + end,
            uint16_t(word));
}

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void Work::mix(int64_t b, const Team& team, Room& room, Source& s, char* z) const {
  read(b, s);
  if (a.probability) normalise(team, room, s);
  char* const row = z + b * a.V * element_size(out());
  const Range mine = team.part(slices);
  if (!s.valid) {
    fill(row, out(), team, kNaN);
  } else if (a.probability && s.row.active == 0) {
    fill(row, out(), team, -INFINITY);
  } else {
    for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
      if (a.probability) enter(slice, room, s);
      kernels.mix(s.row, slice * kMixSlice, count(slice), row);
    }
  }
  if (a.probability) team.wait();  // before the room is used again
}

void Work::differentiate(int64_t b, const Team& team, Room& room, Source& s,
                         char* scratch) const {
  read(b, s);
  if (a.probability) normalise(team, room, s);
  const bool empty = a.probability && s.row.active == 0;
  const char* const upstream = dz + bytes(b * a.V);
  const Range mine = team.part(slices);
  const auto pass = [&](bool out, bool sums) {
    for (int64_t slice = mine.begin; slice < mine.end; ++slice) {
      if (a.probability) enter(slice, room, s);
      kernels.gradients(s.row, upstream, slice * kMixSlice, count(slice), out, scratch,
                        sums ? &room.sums[size_t(slice * s.row.count)] : nullptr);
    }
  };
  const bool needs_sums = d_weights != nullptr || a.probability;
  if (s.valid && !empty) pass(d_logits != nullptr && !a.probability, needs_sums);
  team.wait();
  std::vector<double> sums(size_t(a.m), s.valid ? 0.0 : kNaN);
  for (MixTerm& term : s.terms) {
    if (!needs_sums || !s.valid || empty) break;
    const int64_t t = &term - s.terms.data();
    double sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) {
      sum += room.sums[size_t(slice * s.row.count + t)];
    }
    term.whole.pull = float(double(term.whole.coefficient) * sum);
    sums[size_t(term.index)] = a.probability ? sum / s.total_weight : sum;
  }
  for (const int64_t i : s.left_out) {
    if (!empty) sums[size_t(i)] = kNaN;
    if (d_logits) fill(d_logits_of(i, b), a.dtype, team, kNaN);
  }
  if (d_logits && a.probability) {
    if (s.valid && !empty) {
      pass(true, false);
    } else {
      for (const MixTerm& term : s.terms) {
        const bool mixed = &term - s.terms.data() < s.row.active;
        fill(term.d_logits, a.dtype, team, mixed ? kNaN : 0.0);
      }
    }
  }
  if (d_weights && team.rank == 0) {
    for (int64_t i = 0; i < a.m; ++i) d_weights[b * a.m + i] = float(sums[size_t(i)]);
  }
  team.wait();  // before the room is used again
}

// Calls body(b, team of those who work on row b, their room). A row is worked on by one thread, so
// that its second pass finds it in the cache; the rows left over by all.
template <class Body>
void each_row(const MixArgs& a, int64_t passes, int64_t slices, int num_threads,
              const Body& body) {
  const int64_t work = a.B * a.V * (a.m + 1) * passes;
  Room shared(a.m, slices, a.probability);
  parallel(work < kSerialWork ? 1 : num_threads, [&](const Team& team) {
    const int64_t whole = a.B / team.size * team.size;
    Room own(whole > 0 ? a.m : 0, slices, a.probability);
    Source source;
    const std::unique_ptr<char[], Free> scratch(static_cast<char*>(
        ::operator new[](size_t(a.m * kMixScratch) + 1, std::align_val_t(64))));
    for (int64_t b = team.rank; b < whole; b += team.size) {
      body(b, Team{0, 1}, own, source, scratch.get());
    }
    for (int64_t b = whole; b < a.B; ++b) body(b, team, shared, source, scratch.get());
  });
}

void forward(const MixLogitsArgs& a, bool relative, int num_threads, const char* isa) {
  const int64_t slices = (a.V + kMixSlice - 1) / kMixSlice;
  const Work work{a, kernels_of(resolve_isa(isa)), slices, relative};
  each_row(a, a.probability ? 8 : 1, slices, num_threads,
           [&](int64_t b, const Team& team, Room& room, Source& source, char*) {
             work.mix(b, team, room, source, static_cast<char*>(a.z));
           });
}

}  // namespace

void mix_logits_cpu(const MixLogitsArgs& a, int num_threads, const char* isa) {
  forward(a, false, num_threads, isa);
}

void mix_logits_relative_cpu(const MixLogitsArgs& a, int num_threads, const char* isa) {
  forward(a, true, num_threads, isa);
}

void mix_logits_backward_cpu(const MixLogitsBackwardArgs& a, int num_threads, const char* isa) {
  const int64_t slices = (a.V + kMixSlice - 1) / kMixSlice;
  const Work work{a,
                  kernels_of(resolve_isa(isa)),
                  slices,
                  false,
                  static_cast<const char*>(a.dz),
                  static_cast<char*>(a.d_logits),
                  a.d_weights};
  each_row(a, a.probability ? 16 : 2, slices, num_threads,
           [&](int64_t b, const Team& team, Room& room, Source& source, char* scratch) {
             work.differentiate(b, team, room, source, scratch);
           });
}

}  // namespace clp
