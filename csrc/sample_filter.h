// top-k, top-p and min-p on one row of mixed logits: the logit down to which they keep. Exact and
// without a sort: a histogram leaves one bin for each of the first two to select from.
#pragma once

#include <cstdint>

#include "sample_isa.h"

namespace clp {

struct FilterRow {
  float maximum;  // of the mixed logits z, finite
  double total;   // of exp((z - maximum) / temperature)
  double temperature;
  int64_t top_k;  // 0: all
  double top_p, min_p;
};

// The least z that is kept; what ties with it stays. z [V]; bins: of all its slices; room: V + 1
// candidates.
float filter_threshold(const FilterRow& row, const SampleKernels& kernels, const float* z, int64_t V,
                       const SampleBins& bins, SampleCandidate* room);

// argmax of z / temperature + noise over the candidates, the lowest id on ties.
const SampleCandidate& race(const FilterRow& row, int64_t seed, int64_t position,
                            const SampleCandidate* candidates, int64_t count);

double mass_of(const SampleCandidate* candidates, int64_t count);

}  // namespace clp
