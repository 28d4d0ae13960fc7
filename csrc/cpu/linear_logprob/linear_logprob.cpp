// Threads and choice of instruction set for linear_logprob on the CPU.
#include "cpu/linear_logprob/linear_logprob.h"

#include "cpu/linear_logprob/isa.h"
#include "cpu/parallel.h"

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

template <class Args>
void each_row(void (*row)(const Args&, int64_t), const Args& args, int num_threads) {
  parallel(num_threads, [&](const Team& team) {
    const Range mine = team.part(args.n);
    for (int64_t t = mine.begin; t < mine.end; ++t) row(args, t);
  });
}

}  // namespace

void linear_logprob_cpu(const LogprobArgs& args, int num_threads, const char* isa) {
  each_row(row_of(resolve_isa(isa)).forward, args, num_threads);
}

void linear_logprob_backward_cpu(const LogprobBackwardArgs& args, int num_threads,
                                 const char* isa) {
  each_row(row_of(resolve_isa(isa)).backward, args, num_threads);
}

}  // namespace clp
