// A team of threads with fixed shares: who computes what depends on the numbers alone, never on
// arrival. OpenMP's pool is PyTorch's too, so no second set of threads competes with it.
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clp {

struct Range {
  int64_t begin, end;
};

struct Team {
  int64_t rank, size;

  // This member's contiguous share of [0, count), cut at multiples of `step`.
  Range part(int64_t count, int64_t step = 1) const {
    const int64_t steps = (count + step - 1) / step;
    const int64_t begin = steps * rank / size * step, end = steps * (rank + 1) / size * step;
    return {begin < count ? begin : count, end < count ? end : count};
  }

  // Returns when every member has called it.
  void wait() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Runs body(team) on each member of a team of up to `threads`.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  (void)threads;
  body(Team{0, 1});
}

}  // namespace clp
