// top-k, top-p and min-p on one row of mixed logits: the logit down to which they keep. Exact and
// without a sort: a histogram leaves one bin for each of the first two to select from.
#pragma once

#include <cstdint>

#include "cpu/sample/isa.h"

namespace clp {

struct FilterRow {
  float maximum;  // of the mixed logits z, finite
  double temperature;
  int64_t top_k;  // 0: all
  double top_p, min_p;
};

// What is kept: the ids with z >= least. Masses are sums of exp((z - maximum) / temperature).
struct FilterResult {
  float least;
  double total;    // mass of all ids
  double kept;     // mass of what is kept
  int64_t count;   // of what is kept, 4 % off
};

// What ties with the last one stays. z [V]; bins: of the row, counted where top_k is given; room: V + 1
// candidates.
FilterResult filter(const FilterRow& row, const SampleKernels& kernels, const float* z, int64_t V,
                    const SampleBins& bins, SampleCandidate* room);

// argmax of z / temperature + noise over the candidates, the lowest id on ties.
const SampleCandidate& best_candidate(const FilterRow& row, int64_t seed, int64_t position,
                            const SampleCandidate* candidates, int64_t count);

double mass_of(const SampleCandidate* candidates, int64_t count);

}  // namespace clp
