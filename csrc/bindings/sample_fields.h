// The fields of clp::SampleArgs, for both modules.
#pragma once

#include "bindings/fields.h"
#include "shared/sample.h"

#define CLP_SAMPLE_FIELDS(F)                                                              \
  F(logits) F(dtype) F(m) F(B) F(V) F(stride_m) F(stride_b) F(weights) F(probability)     \
  F(temperature) F(seed) F(position) F(top_k) F(top_p) F(min_p) F(tokens) F(logprobs)     \
  F(filtered_logprobs)
