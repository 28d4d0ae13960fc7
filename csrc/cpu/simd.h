// Sixteen lanes at a time, for kernels that are compiled once for each instruction set. Before
// including, CLP_ISA names the namespace and CLP_ISA_LEVEL is 0 (scalar), 1 (AVX2), 2 or more (AVX-512).
//
//   Floats  16 x float32      Words  16 x uint32      Wides  8 x uint64      Sum  16 x float64
//
// Every operation rounds as its scalar counterpart does, none is fused (-ffp-contract=off), and a
// reduction keeps sixteen partial results on every instruction set. So all builds give the same
// bits. maximum(a, b) is a > b ? a : b, hence b where either is NaN.
//
// Nothing here or in the files that include this may have external linkage beyond the table it
// exports: the linker would keep one copy of a shared inline function, possibly the AVX-512 one.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/narrow.h"
#include "shared/dtype.h"
#include "shared/philox.h"

#if CLP_ISA_LEVEL >= 2
#include "cpu/simd_avx512.h"
#elif CLP_ISA_LEVEL == 1
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_scalar.h"
#endif

namespace clp {
namespace CLP_ISA {

// 2^y for y in [-126, 127], at most 1.2 ulp off; NaN stays NaN. Polynomial: relative minimax of
// degree 6 on [-1/2, 1/2], 2e-9 off before rounding.
static inline Floats exp2(Floats y) {
  // Adding 1.5 * 2^23 rounds y to an integer, which then stands in the low bits of the sum.
  const Floats magic = all(12582912.0f);
  const Floats shifted = y + magic;
  const Floats f = y - (shifted - magic);
  Floats p = all(0x1.41fbbcp-13f);
  p = p * f + all(0x1.5f3e52p-10f);
  p = p * f + all(0x1.3b2d4cp-7f);
  p = p * f + all(0x1.c6aee8p-5f);
  p = p * f + all(0x1.ebfbdcp-3f);
  p = p * f + all(0x1.62e430p-1f);
  p = p * f + all(1.0f);
  return from_bits(bits(p) + shift_left<23>(bits(shifted)));
}

// e^d for d in [-87.3, 88], at most 1.2 ulp off however large d is, where exp2(d * log2(e)) is off
// by 1e-6 at d = -20; NaN stays NaN. Polynomial: exp2's, times powers of log2(e).
static inline Floats exponential(Floats d) {
  const Floats magic = all(12582912.0f);
  const Floats shifted = d * all(1.44269504f) + magic;
  const Floats k = shifted - magic;
  // 0.693359375 - 2.12194440e-4 is log 2 in two parts; k times the first is exact.
  const Floats f = d - k * all(0.693359375f) - k * all(-2.12194440e-4f);
  Floats p = all(0x1.6ae73p-10f);
  p = p * f + all(0x1.12678p-7f);
  p = p * f + all(0x1.555822p-5f);
  p = p * f + all(0x1.555418p-3f);
  p = p * f + all(0x1.fffffcp-2f);
  p = p * (f * f) + f + all(1.0f);
  return from_bits(bits(p) + shift_left<23>(bits(shifted)));
}

// log(s) for finite normal s > 0, at most 2e-7 off plus one rounding. Polynomial: Cephes logf.
static inline Floats log(Floats s) {
  // s = 2^k f with f in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2). 128 keeps k positive until
  // the shift, which knows no sign.
  const Words rest = bits(s) + all_words((128u << 23) - 0x3f3504f3u);
  const Floats k = to_floats(shift_right<23>(rest)) - all(128.0f);
  const Floats f =
      from_bits((rest & all_words(0x007fffffu)) + all_words(0x3f3504f3u)) - all(1.0f);
  const Floats square = f * f;
  Floats p = all(7.0376836292e-2f);
  p = p * f + all(-1.1514610310e-1f);
  p = p * f + all(1.1676998740e-1f);
  p = p * f + all(-1.2420140846e-1f);
  p = p * f + all(1.4249322787e-1f);
  p = p * f + all(-1.6668057665e-1f);
  p = p * f + all(2.0000714765e-1f);
  p = p * f + all(-2.4999993993e-1f);
  p = p * f + all(3.3333331174e-1f);
  // 0.693359375 - 2.12194440e-4 is log 2 in two parts; k times the first is exact.
  const Floats tail = p * f * square + k * all(-2.12194440e-4f) - square * all(0.5f);
  return f + tail + k * all(0.693359375f);
}

struct PhiloxKeys {
  uint64_t key0[kPhiloxRounds], key1[kPhiloxRounds];
  uint32_t position_low, position_high;
};

static inline PhiloxKeys philox_keys(int64_t seed, int64_t position) {
  PhiloxKeys keys;
  uint32_t key0 = uint32_t(uint64_t(seed)), key1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = key0 + uint32_t(round) * kPhiloxWeyl0;
    keys.key1[round] = key1 + uint32_t(round) * kPhiloxWeyl1;
  }
  keys.position_low = uint32_t(uint64_t(position));
  keys.position_high = uint32_t(uint64_t(position) >> 32);
  return keys;
}

// The words of the 64 vocabulary ids from 4 * block on, in their order. Each counter lies in the
// low half of a 64-bit lane, where a widening multiply takes it and leaves both product halves.
static inline void philox64(const PhiloxKeys& keys, uint32_t block, Words out[4]) {
  const Wides mul0 = all_wides(kPhiloxMul0), mul1 = all_wides(kPhiloxMul1);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Wides x[4] = {block_order() + all_wides(block + uint32_t(8 * half)),
                  all_wides(keys.position_low), all_wides(keys.position_high), all_wides(0)};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Wides p0 = multiply_low(x[0], mul0), p1 = multiply_low(x[2], mul1);
      x[0] = high_half(p1) ^ x[1] ^ all_wides(keys.key0[round]);
      x[2] = high_half(p0) ^ x[3] ^ all_wides(keys.key1[round]);
      x[1] = p1;
      x[3] = p0;
    }
    interleave(x, out + 2 * half);
  }
}

}  // namespace CLP_ISA
}  // namespace clp
