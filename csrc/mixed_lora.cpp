// Threads and choice of instruction set for mixed_lora on the CPU.
#include "mixed_lora.h"

#include <algorithm>
#include <memory>

#include "mixed_lora_isa.h"
#include "parallel.h"

namespace clp {
namespace {

// Rows that share one pass over the adapters. Sixteen operands of 4096 features are 256 KB.
constexpr int64_t kRows = 16;

// Multiply-adds a thread should have at least: 4 us of work with AVX2, twice what waking it costs.
constexpr int64_t kWorkPerThread = 1 << 16;

const MixedLoraKernels& kernels_of(Isa isa) {
#ifdef CLP_X86
  if (isa == Isa::kAvx512Bf16) return kMixedLoraKernelsAvx512Bf16;
  if (isa == Isa::kAvx512) return kMixedLoraKernelsAvx512;
  if (isa == Isa::kAvx2) return kMixedLoraKernelsAvx2;
#endif
  (void)isa;
  return kMixedLoraKernelsScalar;
}

}  // namespace

void mixed_lora_cpu(const MixedLoraArgs& a, int num_threads, const char* isa) {
  const MixedLoraKernels& kernels = kernels_of(resolve_isa(isa));
  const int64_t R = a.m * a.r, work = a.T * R * (a.K + a.N);
  const int threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, num_threads));
  // With rows enough for all, each thread does its own from end to end. With few, all threads share
  // them, and the columns of each half are split; then the second half must wait for the first.
  const bool by_row = a.T >= 8 * threads;
  const int64_t bytes = kernels.scratch(a, std::min(kRows, a.T));
  const std::unique_ptr<char[]> memory(new char[size_t(threads * bytes)]);
  parallel(threads, [&](const Team& team) {
    char* const scratch = memory.get() + team.rank * bytes;
    const Range rows = by_row ? team.part(a.T) : Range{0, a.T};
    const Range columns = by_row ? Range{0, R} : team.part(R);
    const Range outputs = by_row ? Range{0, a.N} : team.part(a.N, 64);
    if (by_row) {
      for (int64_t t = rows.begin; t < rows.end; t += kRows) {
        const int64_t count = std::min(kRows, rows.end - t);
        kernels.shrink(a, scratch, t, count, columns.begin, columns.end);
        kernels.expand(a, scratch, t, count, outputs.begin, outputs.end);
      }
      return;
    }
    for (int64_t t = 0; t < a.T; t += kRows) {
      kernels.shrink(a, scratch, t, std::min(kRows, a.T - t), columns.begin, columns.end);
    }
    team.wait();
    for (int64_t t = 0; t < a.T; t += kRows) {
      kernels.expand(a, scratch, t, std::min(kRows, a.T - t), outputs.begin, outputs.end);
    }
  });
}

}  // namespace clp
