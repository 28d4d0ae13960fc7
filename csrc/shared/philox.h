// Philox4x32-10 and the noise made from it, shared by C++ and CUDA so that every backend draws the
// same tokens. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// Keying: key = the low and high word of the seed; counter = (v / 4, low and high word of the
// position, 0); vocabulary id v reads lane v % 4. Batch row, tile, thread and device do not enter.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define CLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
// static: the instruction-set files must not share one linker-chosen copy.
#define CLP_HOST_DEVICE static inline
#endif

namespace clp {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Bounds of -log(-log(u)) over u = (x + 0.5) / 2^32: at x = 0xffffffff it is 33 log 2 = 22.8739,
// at x = 0 it is -log(33 log 2) = -3.1301. Rounded outwards.
constexpr double kGumbelMax = 22.9, kGumbelMin = -3.14;

struct Philox4 {
  uint32_t x[4];
};

CLP_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMul0) * counter.x[0];
    const uint64_t p1 = uint64_t(kPhiloxMul1) * counter.x[2];
    counter = {{uint32_t(p1 >> 32) ^ counter.x[1] ^ key0, uint32_t(p1),
                uint32_t(p0 >> 32) ^ counter.x[3] ^ key1, uint32_t(p0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// The four words of vocabulary ids 4 * block ... 4 * block + 3.
CLP_HOST_DEVICE Philox4 philox_block(int64_t seed, int64_t position, uint32_t block) {
  const uint64_t s = uint64_t(seed), p = uint64_t(position);
  return philox4x32_10({{block, uint32_t(p), uint32_t(p >> 32), 0u}}, uint32_t(s),
                       uint32_t(s >> 32));
}

// (x + 0.5) / 2^32, exact in float64, never 0 or 1.
CLP_HOST_DEVICE double philox_uniform(uint32_t x) { return (double(x) + 0.5) * 0x1p-32; }

// -log(-log(u)). Above one half, 1 - u is exact and log1p keeps the digits that log(u) would lose.
CLP_HOST_DEVICE double philox_gumbel(uint32_t x) {
  const double e = x >= 0x80000000u ? -log1p(-((double(0xffffffffu - x) + 0.5) * 0x1p-32))
                                    : -log(philox_uniform(x));
  return -log(e);
}

}  // namespace clp
