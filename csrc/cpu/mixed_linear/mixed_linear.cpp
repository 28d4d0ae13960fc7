// Threads and choice of instruction set for mixed_linear on the CPU.
#include "cpu/mixed_linear/mixed_linear.h"

#include <algorithm>
#include <memory>

#include "cpu/mixed_linear/isa.h"
#include "cpu/parallel.h"

namespace clp {
namespace {

// Rows that share one pass over the matrices. 64 operands of 4096 features are 1 MB.
constexpr int64_t kRows = 64;
constexpr int64_t kStep = 16;  // output columns are shared out in multiples of it

// Multiply-adds a thread should have at least: 4 us of work with AVX2, twice what waking it costs.
constexpr int64_t kWorkPerThread = 1 << 18;

const MixedLinearKernels& kernels_of(Isa isa) {
#ifdef CLP_X86
  if (isa == Isa::kAvx512Bf16) return kMixedLinearKernelsAvx512Bf16;
  if (isa == Isa::kAvx512) return kMixedLinearKernelsAvx512;
  if (isa == Isa::kAvx2) return kMixedLinearKernelsAvx2;
#endif
  (void)isa;
  return kMixedLinearKernelsScalar;
}

}  // namespace

void mixed_linear_cpu(const MixedLinearArgs& a, int num_threads, const char* isa) {
  const MixedLinearKernels& kernels = kernels_of(resolve_isa(isa));
  const int64_t work = a.T * a.m * a.N * a.K;
  const int threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, num_threads));
  const int64_t bytes = kernels.scratch(a, std::min(kRows, a.T));
  const std::unique_ptr<char[]> memory(new char[size_t(threads * bytes)]);
  parallel(threads, [&](const Team& team) {
    char* const scratch = memory.get() + team.rank * bytes;
    const Range outputs = team.part(a.N, kStep);
    for (int64_t t = 0; t < a.T; t += kRows) {
      kernels.block(a, scratch, t, std::min(kRows, a.T - t), outputs.begin, outputs.end);
    }
  });
}

}  // namespace clp
