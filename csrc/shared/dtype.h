// The element types that kernels read, in the order of native.DTYPES (clp_kernels/native.py).
#pragma once

#include <stdint.h>

namespace clp {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace clp
