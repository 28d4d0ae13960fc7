// What linear_logprob.cpp (threads) and isa.cpp (one row, compiled for each
// instruction set) agree on.
#pragma once

#include "cpu/isa.h"
#include "cpu/linear_logprob/linear_logprob.h"

namespace clp {

struct LogprobRow {
  void (*forward)(const LogprobArgs& args, int64_t row);
  void (*backward)(const LogprobBackwardArgs& args, int64_t row);
};

extern const LogprobRow kLogprobRowScalar, kLogprobRowAvx2, kLogprobRowAvx512;

}  // namespace clp
