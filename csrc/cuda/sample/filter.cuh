// Rows of `sample` with filters on CUDA; called by sample.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared/sample.h"
#include "cuda/sample/mix.cuh"

namespace clp {

// Bytes of scratch memory, aligned to 16.
int64_t sample_filter_workspace(int64_t B, int64_t V);

// Enqueues the draw of every row to which a filter applies, on the current device. `terms` is
// [B, m] in probability mode and unused otherwise.
cudaError_t sample_filter_cuda(const SampleArgs& args, const void* terms, void* workspace,
                               int device, cudaStream_t stream);

}  // namespace clp
