// Threads and choice of instruction set for linear_logprob on the CPU.
#include "linear_logprob.h"

#include "linear_logprob_isa.h"
#include "parallel.h"

namespace clp {
namespace {

LogprobRow row_of(Isa isa) {
#ifdef CLP_X86
  // bfloat16 dot products are of no use here.
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) return kLogprobRowAvx512;
  if (isa == Isa::kAvx2) return kLogprobRowAvx2;
#endif
  (void)isa;
  return kLogprobRowScalar;
}

}  // namespace

void linear_logprob_cpu(const LogprobArgs& a, int num_threads, const char* isa) {
  const LogprobRow row = row_of(resolve_isa(isa));
  parallel(num_threads, [&](const Team& team) {
    const Range mine = team.part(a.n);
    for (int64_t t = mine.begin; t < mine.end; ++t) row(a, t);
  });
}

}  // namespace clp
