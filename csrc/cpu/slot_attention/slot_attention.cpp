// Threads and choice of instruction set for slot_attention on the CPU.
#include "cpu/slot_attention/slot_attention.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "cpu/slot_attention/isa.h"

namespace clp {
namespace {

// Elements of keys and values a thread should have at least: 4 us of work with AVX2, twice what
// waking it costs.
constexpr int64_t kWorkPerThread = 1 << 15;
constexpr int64_t kOverhead = 16;  // of a head, in positions

const SlotAttentionKernels& kernels_of(Isa isa) {
#ifdef CLP_X86
  if (isa == Isa::kAvx512Bf16) return kSlotAttentionKernelsAvx512Bf16;
  if (isa == Isa::kAvx512) return kSlotAttentionKernelsAvx512;
  if (isa == Isa::kAvx2) return kSlotAttentionKernelsAvx2;
#endif
  (void)isa;
  return kSlotAttentionKernelsScalar;
}

void check(const SlotAttentionArgs& a) {
  if (a.first < 0 || a.first > a.slots - a.B) {
    throw std::invalid_argument("first: expected " + std::to_string(a.B) + " slots from it on of " +
                                std::to_string(a.slots) + ", got " + std::to_string(a.first));
  }
  for (int64_t b = 0; b < a.B; ++b) {
    if (a.lengths[b] < 0 || a.lengths[b] >= a.capacity) {
      throw std::invalid_argument("lengths[" + std::to_string(b) + "]: expected 0 to " +
                                  std::to_string(a.capacity - 1) + ", got " +
                                  std::to_string(a.lengths[b]));
    }
  }
}

// What a head of row b costs, in positions.
int64_t cost(const SlotAttentionArgs& a, int64_t b) {
  return a.lengths[b] + 1 - first_seen(a, a.lengths[b]) + kOverhead;
}

}  // namespace

void slot_attention_cpu(const SlotAttentionArgs& a, int num_threads, const char* isa) {
  const SlotAttentionKernels& kernels = kernels_of(resolve_isa(isa));
  check(a);
  int64_t total = 0;
  for (int64_t b = 0; b < a.B; ++b) total += cost(a, b) * a.heads;
  if (total == 0) return;
  const int64_t work = total * (a.d + a.dv);
  const int64_t most = std::min<int64_t>(num_threads, a.B * a.heads);
  const int threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, most));
  const int64_t bytes = (kernels.scratch(a) + 63) / 64 * 64;
  const std::unique_ptr<char[]> memory(new char[size_t(threads * bytes)]);
  parallel(threads, [&](const Team& team) {
    char* const scratch = memory.get() + team.rank * bytes;
    // Lengths differ: a member has the heads that begin within its share of the whole cost.
    const Range mine = team.part(total);
    int64_t at = 0;
    for (int64_t b = 0; b < a.B && at < mine.end; ++b) {
      const int64_t each = cost(a, b);
      if (at + each * a.heads <= mine.begin) {
        at += each * a.heads;
        continue;
      }
      for (int64_t h = 0; h < a.heads; ++h, at += each) {
        if (at < mine.begin || at >= mine.end) continue;
        kernels.head(a, scratch, b, h);
      }
    }
  });
}

}  // namespace clp
