// Rounds float32 to bfloat16 and float16, to nearest even; NaN becomes a quiet NaN. For lanes.h and
// simd.h: CLP_ISA and CLP_ISA_LEVEL are as there, and nothing has external linkage.
#pragma once

#include <stdint.h>
#include <string.h>

#if CLP_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#include "shared/dtype.h"

namespace clp {
namespace CLP_ISA {

static inline float float_from(uint32_t word) {
  float x;
  memcpy(&x, &word, 4);
  return x;
}
static inline uint32_t word_from(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  return word;
}

#if CLP_ISA_LEVEL >= 2

static inline void narrow(__m512 a, BFloat16* p) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_set1_epi32(near, nan, 0x7fc00000);
  _mm256_storeu_epi16(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void narrow(__m512 a, Float16* p) {
  _mm256_storeu_epi16(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#elif CLP_ISA_LEVEL == 1

static inline void narrow(__m256 a, BFloat16* p) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256i rounded =
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(near), quiet, nan));
  const __m256i words = _mm256_srli_epi32(rounded, 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
static inline void narrow(__m256 a, Float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#else

static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, BFloat16* p) {
  const uint32_t bits = word_from(x);
  p->bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void narrow(float x, Float16* p) {
  const uint32_t bits = word_from(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520, from where on the nearest half is infinite
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the rounded subnormal in place
    half = word_from(float_from(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

#endif

}  // namespace CLP_ISA
}  // namespace clp
