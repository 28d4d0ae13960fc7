// What sample.cpp (threads, reduction) and sample_isa.cpp (one slice of one row, compiled for each
// instruction set) agree on.
#pragma once

#include "cpu_isa.h"
#include "sample.h"

namespace clp {

// Vocabulary ids a slice. Constant, because the order of the sums must not depend on the machine;
// 4096 mixed logits are 16 KB and stay in the first-level cache between the two passes.
constexpr int64_t kSampleSlice = 4096;
constexpr int64_t kSampleGroup = 64;  // ids that one step reads

// A source row of the mixture whose weight is not 0. Probability mode adds the row's maximum and
// offset = log sum exp(l - maximum) - log(weight), less the least offset of the batch row.
struct SampleTerm {
  const void* logits;
  float weight;
  float maximum;
  float offset;
};

struct SampleTask {
  const SampleTerm* terms;
  int64_t num_terms;
  DType dtype;
  bool probability;
  float temperature;  // 0: greedy; else at least kMinTemperature
  int64_t seed, position;
  int64_t first, count;  // the slice; first is a multiple of kSampleSlice
};

// Below this, 1 / temperature leaves float32; distinct logits are 1e-28 apart there or greedy.
constexpr float kMinTemperature = 1e-30f;

struct SamplePartial {
  float maximum;  // of z
  float logit;    // z of the token
  double sum;     // of exp((z - maximum) / temperature); NaN marks a bad row, 0 an all-masked slice
  double score;   // of the token; greedy: its z
  int64_t token;  // -1: nothing in the slice scores above `to_beat`
};

// An id that a filter may keep.
struct SampleCandidate {
  float z;
  uint32_t id;
  double mass;  // exp((z - maximum) / temperature)
};

// The ids of a slice by their distance from the largest logit, in steps of a quarter of the
// temperature; the last bin takes the rest. Quarters, because one bin is selected from.
constexpr int kSampleBins = 256;
struct SampleBins {
  double mass[kSampleBins];
  int64_t count[kSampleBins];
};

struct SampleKernels {
  void (*slice)(const SampleTask& task, double to_beat, SamplePartial* out);
  // Maximum and sum alone, of one source row at temperature 1.
  void (*sum_exp)(const void* logits, DType dtype, int64_t first, int64_t count,
                  SamplePartial* out);
  // For filtered rows, a slice each. Mixes into z, -inf up to a multiple of kSampleGroup; false where
  // a NaN or +inf is in it.
  bool (*mix)(const SampleTask& task, float* z, float* maximum);
  // Sum of exp((z - maximum) / temperature), in float64, and by bin.
  double (*mass)(const float* z, int64_t count, float maximum, double temperature,
                 SampleBins* bins);
  // The ids of one bin in ascending order; returns how many.
  int64_t (*gather)(const float* z, int64_t first, int64_t count, float maximum,
                    double temperature, int bin, SampleCandidate* out);
  // The ids with z >= least in ascending order; returns how many, writes up to `limit`.
  int64_t (*keep)(const float* z, int64_t first, int64_t count, float maximum,
                  double temperature, float least, int64_t limit, SampleCandidate* out);
  // As `slice`, over the ids with z >= least of mixed logits; the others become -inf.
  void (*draw)(const SampleTask& task, double to_beat, float least, float* z, SamplePartial* out);
  // For tests: the pieces that must agree with their definition to the bit, or to 1.2 ulp.
  void (*uniform)(int64_t seed, int64_t position, int64_t count, double* out);
  void (*exp2)(const float* y, int64_t count, float* out);
};

extern const SampleKernels kSampleKernelsScalar, kSampleKernelsAvx2, kSampleKernelsAvx512;

const SampleKernels& sample_kernels(Isa isa);

}  // namespace clp
