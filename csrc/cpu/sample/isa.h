// What sample.cpp (threads, reduction) and isa.cpp (one slice of one row, compiled for each
// instruction set) agree on.
#pragma once

#include "cpu/isa.h"
#include "shared/sample.h"

namespace clp {

// Vocabulary ids per slice. Constant, because the order of the sums must not depend on the machine;
// 4096 mixed logits are 16 KB and stay in the first-level cache between the two passes.
constexpr int64_t kSampleSlice = 4096;
constexpr int64_t kSampleGroup = 64;  // ids that one step reads

// A source row of the sum whose weight is not 0.
struct SampleTerm {
  const void* logits;
  float weight;
};

struct SampleTask {
  const SampleTerm* terms;
  int64_t num_terms;
  DType dtype;
  double temperature;  // 0: greedy; else at least kMinTemperature
  int64_t seed, position;
  int64_t first, count;  // the slice; first is a multiple of kSampleSlice
};

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

// The ids of a row by their distance from the largest logit, in steps of a sixteenth of the
// temperature; the last bin takes the rest. Sixteenths, because one bin is selected from: at 152,000
// ids of spread 2 it holds 2,000. Masses are integers, so that their sum knows no order.
constexpr int kSampleBins = 1024;
struct SampleBins {
  // In units of 2^-36 sample_bin_mass(bin), which 10^8 ids do not overflow; two of each, to be added,
  // so that neighbours of one bin wait for each other half as often.
  int64_t mass[2][kSampleBins];
  int64_t count[2][kSampleBins];
};
constexpr double kSampleMassUnit = 0x1p-36;

// exp(-bin / 16), of every bin.
const double* sample_bin_masses();

struct SampleKernels {
  void (*slice)(const SampleTask& task, double to_beat, SamplePartial* out);
  // For filtered rows, a slice each. Mixes into z, -inf up to a multiple of kSampleGroup; false where
  // a NaN or +inf is in it.
  bool (*mix)(const SampleTask& task, float* z, float* maximum);
  // Adds a slice to the bins: its masses and, where asked, its counts.
  void (*mass)(const float* z, int64_t count, float maximum, double temperature, bool counted,
               SampleBins* bins);
  // The ids of one bin in ascending order; returns how many.
  int64_t (*gather)(const float* z, int64_t first, int64_t count, float maximum,
                    double temperature, int bin, SampleCandidate* out);
  // The ids with z >= least in ascending order; returns how many.
  int64_t (*keep)(const float* z, int64_t first, int64_t count, float maximum,
                  double temperature, float least, SampleCandidate* out);
  // The best of the ids with z >= least; sum is left alone. peak: the largest z of the slice.
  void (*draw)(const SampleTask& task, double to_beat, float maximum, float peak, float least,
               const float* z, SamplePartial* out);
  // For tests: the pieces that must agree with their definition to the bit, or to 1.2 ulp.
  void (*uniform)(int64_t seed, int64_t position, int64_t count, double* out);
  void (*exp2)(const float* y, int64_t count, float* out);
  void (*exponential)(const float* d, int64_t count, float* out);
};

extern const SampleKernels kSampleKernelsScalar, kSampleKernelsAvx2, kSampleKernelsAvx512;

const SampleKernels& sample_kernels(Isa isa);

}  // namespace clp
