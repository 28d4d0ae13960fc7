// What mixed_lora.cpp (threads) and isa.cpp (a block of rows, compiled for each
// instruction set) agree on.
#pragma once

#include "cpu/isa.h"
#include "cpu/mixed_lora/mixed_lora.h"

namespace clp {

struct MixedLoraKernels {
  // Bytes of scratch for `rows` rows: x and z as operands, a block of the update and of the product.
  int64_t (*scratch)(const MixedLoraArgs& args, int64_t rows);
  // u of rows [row, row + rows) and adapter columns [begin, end).
  void (*shrink)(const MixedLoraArgs& args, void* scratch, int64_t row, int64_t rows,
                 int64_t begin, int64_t end);
  // y of the same rows and output columns [begin, end), from u.
  void (*expand)(const MixedLoraArgs& args, void* scratch, int64_t row, int64_t rows,
                 int64_t begin, int64_t end);
};

extern const MixedLoraKernels kMixedLoraKernelsScalar, kMixedLoraKernelsAvx2,
    kMixedLoraKernelsAvx512, kMixedLoraKernelsAvx512Bf16;

}  // namespace clp
