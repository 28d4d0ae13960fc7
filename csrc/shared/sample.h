// Mixes m rows of logits per batch row, draws one token and gives its log-probability.
//
//   z_v   = sum_i w_i l_i[v]                    (geometric), or log sum_i w_i softmax(l_i)[v]
//   token = argmax_v (z_v / temperature + g_v)  (lowest index on ties), g_v of philox.h
//   logprob = log_softmax(z / temperature)[token];  at temperature 0: argmax z, log_softmax(z)
//
// Filters keep, one after the other: the top_k largest z; of these, every id above which there is
// less than top_p of their mass; of these, what has at least min_p of the largest probability. Ids
// that tie with the last one kept are kept. The argmax is over the kept ids, and filtered_logprob
// is the log-probability among them (0 at temperature 0).
//
// z is float32, products and sums rounded one by one in the order of i; a term of weight 0 is left
// out; an active -inf gives -inf. A row with a NaN or +inf z, or without a finite one, gives
// token -1 and NaN. A row's bits do not depend on the other rows or on the number of threads.
#pragma once

#include <cstdint>

#include "shared/dtype.h"

namespace clp {

// Scores z / temperature stay far inside float64 from here on.
constexpr double kMinTemperature = 1e-30;

struct SampleArgs {
  const void* logits;  // [m, B, V], last axis contiguous, strides in elements
  DType dtype;
  int64_t m, B, V;
  int64_t stride_m, stride_b;
  const float* weights;      // [B, m], or null for m = 1 and weight 1
  bool probability;          // the mixing mode
  const double* temperature;  // [B]; below kMinTemperature, but for 0, that
  const int64_t* seed;       // [B]
  const int64_t* position;   // [B]
  const int64_t* top_k;      // [B], or null; 0 keeps all. The same for the next two
  const double* top_p;       // [B], 1 keeps all
  const double* min_p;       // [B], 0 keeps all
  int64_t* tokens;           // [B]
  float* logprobs;           // [B]
  float* filtered_logprobs;  // [B]
};

// isa: "scalar", "avx2", "avx512", or "" for the one chosen at load. Throws std::invalid_argument.
void sample_cpu(const SampleArgs& args, int num_threads, const char* isa);

// Bytes of scratch memory that sample_cuda needs on the device, aligned to 16. filters: whether any
// of top_k, top_p and min_p is given.
int64_t sample_cuda_workspace(int64_t m, int64_t B, int64_t V, bool probability, bool filters);

// Enqueues on `stream`; every pointer is a device pointer and nothing is read on the host.
// Returns null, or a message that stays valid.
const char* sample_cuda(const SampleArgs& args, void* workspace, int device, void* stream);

}  // namespace clp
