// What mixed_linear.cpp (threads) and isa.cpp (a block of outputs, compiled for each
// instruction set) agree on.
#pragma once

#include "cpu/isa.h"
#include "cpu/mixed_linear/mixed_linear.h"

namespace clp {

struct MixedLinearKernels {
  // Bytes of scratch for `rows` rows.
  int64_t (*scratch)(const MixedLinearArgs& args, int64_t rows);
  // y of rows [row, row + rows) and output columns [begin, end).
  void (*block)(const MixedLinearArgs& args, void* scratch, int64_t row, int64_t rows,
                int64_t begin, int64_t end);
};

extern const MixedLinearKernels kMixedLinearKernelsScalar, kMixedLinearKernelsAvx2,
    kMixedLinearKernelsAvx512, kMixedLinearKernelsAvx512Bf16;

}  // namespace clp
