// Threads and choice of instruction set for mixed_lora on the CPU.
#include "cpu/mixed_lora/mixed_lora.h"

#include <string.h>

#include <algorithm>
#include <memory>

#include "cpu/mixed_lora/isa.h"
#include "cpu/parallel.h"

namespace clp {
namespace {

// Rows that share one pass over the adapters, and over the base matrix too. Sixteen operands of 4096
// features are 256 KB; 64 keep a thread's reading of the base matrix to 2 GB/s.
constexpr int64_t kRows = 16, kBaseRows = 64;

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

// Whether an element is not zero; the first one mostly is not.
template <class Word>
bool any(const void* elements, int64_t size, Word sign) {
  const Word* const words = static_cast<const Word*>(elements);
  return std::any_of(words, words + size, [&](Word word) { return (word & ~sign) != 0; });
}

}  // namespace

bool has_bare_rows(const float* weights, int64_t examples, int64_t m, const void* lora_B,
                   DType lora_dtype, int64_t size) {
  for (int64_t b = 0; b < examples; ++b) {
    if (!any(weights + b * m, m, uint32_t(1) << 31)) return true;
  }
  return lora_dtype == DType::kFloat32 ? !any(lora_B, size, uint32_t(1) << 31)
                                       : !any(lora_B, size, uint16_t(1 << 15));
}

void mix_rank(const MixRankArgs& a) {
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t row = !a.example_ids ? t / a.tokens_per_example
                        : a.wide_ids   ? static_cast<const int64_t*>(a.example_ids)[t]
                                       : static_cast<const int32_t*>(a.example_ids)[t];
    for (int64_t i = 0; i < a.m; ++i) {
      const float w = a.weights[row * a.m + i];
      const int64_t begin = (t * a.m + i) * a.r;
      for (int64_t j = begin; j < begin + a.r; ++j) a.z[j] = w == 0.0f ? 0.0f : w * a.u[j];
    }
  }
}

void stack(const StackArgs& a) {
  const size_t row = size_t(a.r * a.bytes);
  const char* from = static_cast<const char*>(a.lora_B);
  for (int64_t i = 0; i < a.m; ++i) {
    char* to = static_cast<char*>(a.stacked) + size_t(i) * row;
    for (int64_t n = 0; n < a.N; ++n, from += row, to += size_t(a.m) * row) memcpy(to, from, row);
  }
}

void mixed_lora_cpu(const MixedLoraArgs& a, int num_threads, const char* isa) {
  const MixedLoraKernels& kernels = kernels_of(resolve_isa(isa));
  const int64_t R = a.m * a.r;
  const int64_t work = a.T * (R * (a.K + a.N) + (a.base_weight ? a.K * a.N : 0));
  const int threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, num_threads));
  // With rows enough for all, each thread does its own from end to end. With fewer, all threads share
  // them, and the columns of each half are split; then the second half must wait for the first.
  const int64_t most = a.base_weight ? kBaseRows : kRows, block = std::min(most, a.T);
  const bool shrink_by_row = a.T >= 8 * threads;
  const bool by_row = a.base_weight ? a.T >= kBaseRows * threads : shrink_by_row;
  const int64_t bytes = kernels.scratch(a, block);
  const std::unique_ptr<char[]> memory(new char[size_t(threads * bytes)]);
  parallel(threads, [&](const Team& team) {
    char* const scratch = memory.get() + team.rank * bytes;
    const Range all{0, a.T}, mine = team.part(a.T);
    if (by_row) {
      for (int64_t t = mine.begin; t < mine.end; t += block) {
        const int64_t count = std::min(block, mine.end - t);
        kernels.shrink(a, scratch, t, count, 0, R);
        kernels.expand(a, scratch, t, count, 0, a.N);
      }
      return;
    }
    const Range rows = shrink_by_row ? mine : all;
    const Range columns = shrink_by_row ? Range{0, R} : team.part(R), outputs = team.part(a.N, 16);
    for (int64_t t = rows.begin; t < rows.end; t += block) {
      const int64_t count = std::min(block, rows.end - t);
      kernels.shrink(a, scratch, t, count, columns.begin, columns.end);
    }
    team.wait();
    for (int64_t t = 0; t < a.T; t += block) {
      kernels.expand(a, scratch, t, std::min(block, a.T - t), outputs.begin, outputs.end);
    }
  });
}

}  // namespace clp
