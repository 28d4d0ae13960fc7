// What linear_logprob makes of a block of logits on the CPU, n tokens times C ids of the vocabulary
// from `first` on, while it is in the cache. The blocks of a token come one after the other, and its
// sums are taken relative to the largest logit so far:
//
//   e_v = exp((z_v - top) / t),   mass = sum e,   weighted = sum e log2 e,
//   apart = sum e (z - z' - shift)
//
// and top', mass' of the reference's logits z'. The shift is the mean of z - z' so far: without it
// the gradient of the KL would be a small difference of large sums. If a block has a larger logit,
// the sums before it are multiplied by `factor`; `moved` is the shift before less the shift after,
// for the caller's own sums. With `gradient` z becomes e, and z' becomes e (z - z' - shift): what
// the products with the head need. An e below 2^-125 is 0 and has no part in any sum. float32, sums
// in float64; a token's bits depend only on the token and the size of the blocks.
#pragma once

#include <cstdint>

namespace clp {

struct LogprobState {
  double top, mass, weighted, apart, ref_top, ref_mass;
  double shift;
  double at_target;  // its z
};

struct LogprobArgs {
  float* logits;      // z [n, C], contiguous
  float* ref_logits;  // z' [n, C], or null
  int64_t n, C, first;
  const int64_t* targets;    // [n]; one outside of the block is left alone
  const float* temperature;  // [n]
  bool gradient;
  LogprobState* state;  // [n]; a first block (first = 0) reads nothing of it
  float *factor, *moved;  // [n]
};

// The backward: what a loss's derivatives by logprob, entropy and kl say of z and z', with
// p = e / mass, q = e' / mass', H the entropy:
//
//   dz  = (d_logprob (onehot - p) - d_entropy p (log p + H) + d_kl p (log p/q - kl)) / t
//   dz' = d_kl (q - p) / t
//
// All 0 for an ignored token (target -100). A token's bits depend on nothing but the token and its
// state.
struct LogprobBackwardArgs {
  float* logits;      // z [n, C], contiguous; becomes dz
  float* ref_logits;  // z' [n, C], becomes dz'; or null
  int64_t n, C, first;
  const int64_t* targets;     // [n]
  const float* temperature;   // [n]
  const LogprobState* state;  // [n], after the last block
  // [n]; d_entropy may be null, d_kl is null where ref_logits is.
  const float *d_logprobs, *d_entropy, *d_kl;
};

// isa: "scalar", "avx2", "avx512", or "" for the one chosen at load. Throws std::invalid_argument.
void linear_logprob_cpu(const LogprobArgs& args, int num_threads, const char* isa);
void linear_logprob_backward_cpu(const LogprobBackwardArgs& args, int num_threads,
                                 const char* isa);

}  // namespace clp
