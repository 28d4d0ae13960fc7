// One register of float32 lanes, as wide as the instruction set has it: for the matrix products,
// where simd.h's fixed sixteen lanes would leave too few registers for accumulators on AVX2. Before
// including, CLP_ISA names the namespace and CLP_ISA_LEVEL is 0 (scalar), 1 (AVX2), 2 (AVX-512) or
// 3 (AVX-512 with bfloat16 dot products).
//
//   Lanes  kLanes x float32        Pairs  2 kLanes x bfloat16, level 3 only
//
// Loads widen exactly, stores round to nearest even (NaN becomes the quiet NaN), multiply_add rounds
// once where the machine has it. So builds differ in the last bits, and in the order of a dot
// product; one build always sums in the same order. As in simd.h, nothing has external linkage. The
// namespace is lanes, because simd.h has functions of the same names.
#pragma once

#include <stdint.h>
#include <string.h>

#if CLP_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#include "cpu/narrow.h"
#include "shared/dtype.h"

namespace clp::CLP_ISA::lanes {

#if CLP_ISA_LEVEL >= 2

constexpr int kLanes = 16;
struct Lanes {
  __m512 v;
};

static inline Lanes zero() { return {_mm512_setzero_ps()}; }
static inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
static inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
  return {_mm512_fmadd_ps(a.v, b.v, sum.v)};
}

static inline Lanes widen_bfloat16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
static inline __mmask16 first(int count) { return __mmask16((1u << count) - 1); }
static inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Lanes load(const BFloat16* p) { return widen_bfloat16(_mm256_loadu_epi16(p)); }
static inline Lanes load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_epi16(p))}; }
// The first `count` < kLanes lanes from memory, zeros beyond.
static inline Lanes load_part(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(first(count), p)};
}
static inline Lanes load_part(const BFloat16* p, int count) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first(count), p));
}
static inline Lanes load_part(const Float16* p, int count) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))};
}

static inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
static inline void store(BFloat16* p, Lanes a) { narrow(a.v, p); }
static inline void store(Float16* p, Lanes a) { narrow(a.v, p); }

static inline __m256 halves(Lanes a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}

#elif CLP_ISA_LEVEL == 1

constexpr int kLanes = 8;
struct Lanes {
  __m256 v;
};

static inline Lanes zero() { return {_mm256_setzero_ps()}; }
static inline Lanes all(float x) { return {_mm256_set1_ps(x)}; }
static inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
  return {_mm256_fmadd_ps(a.v, b.v, sum.v)};
}

static inline __m128i load_words(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
// The first `count` < 8 words from memory, zeros beyond.
static inline __m128i load_words_part(const void* p, int count) {
  alignas(16) static const uint16_t kMask[16] = {0xffff, 0xffff, 0xffff, 0xffff,
                                                 0xffff, 0xffff, 0xffff, 0xffff};
  // Sixteen bytes within one page can be read whoever owns them; a copy costs several times more.
  if ((uintptr_t(p) & 4095) <= 4096 - 16) {
    return _mm_and_si128(load_words(p), load_words(kMask + 8 - count));
  }
  uint16_t words[8] = {};
  memcpy(words, p, size_t(count) * 2);
  return load_words(words);
}
static inline Lanes widen_bfloat16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
static inline Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Lanes load(const BFloat16* p) { return widen_bfloat16(load_words(p)); }
static inline Lanes load(const Float16* p) { return {_mm256_cvtph_ps(load_words(p))}; }
static inline Lanes load_part(const float* p, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane))};
}
static inline Lanes load_part(const BFloat16* p, int count) {
  return widen_bfloat16(load_words_part(p, count));
}
static inline Lanes load_part(const Float16* p, int count) {
  return {_mm256_cvtph_ps(load_words_part(p, count))};
}

static inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.v); }
static inline void store(BFloat16* p, Lanes a) { narrow(a.v, p); }
static inline void store(Float16* p, Lanes a) { narrow(a.v, p); }

static inline __m256 halves(Lanes a) { return a.v; }

#else

constexpr int kLanes = 4;
struct Lanes {
  float v[kLanes];
};

static inline Lanes zero() { return {}; }
static inline Lanes all(float x) { return {{x, x, x, x}}; }
static inline Lanes operator+(Lanes a, Lanes b) {
  for (int k = 0; k < kLanes; ++k) a.v[k] += b.v[k];
  return a;
}
static inline Lanes operator*(Lanes a, Lanes b) {
  for (int k = 0; k < kLanes; ++k) a.v[k] *= b.v[k];
  return a;
}
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return sum + a * b; }

static inline float widen(float x) { return x; }
static inline float widen(BFloat16 x) { return float_from(uint32_t(x.bits) << 16); }
static inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // 2^112 moves the exponent from half's bias of 15 to float's 127, and is exact for subnormals.
  const float magnitude = rest >= 0x7c00u ? float_from((rest << 13) | 0x7f800000u)
                                          : float_from(rest << 13) * 0x1p112f;
  return float_from(word_from(magnitude) | sign);
}
template <class T>
static inline Lanes load_part(const T* p, int count) {
  Lanes a = {};
  for (int k = 0; k < count; ++k) a.v[k] = widen(p[k]);
  return a;
}
template <class T>
static inline Lanes load(const T* p) {
  return load_part(p, kLanes);
}

template <class T>
static inline void store(T* p, Lanes a) {
  for (int k = 0; k < kLanes; ++k) narrow(a.v[k], p + k);
}

#endif

// The sums of the lanes of four registers; the order within each is the same for all four.
static inline void sum4(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d,
                        float out[4]) {
#if CLP_ISA_LEVEL >= 1
  const __m256 ab = _mm256_hadd_ps(halves(a), halves(b));
  const __m256 cd = _mm256_hadd_ps(halves(c), halves(d));
  const __m256 quarters = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quarters),
                                _mm256_extractf128_ps(quarters, 1)));
#else
  const Lanes* all[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    const float* v = all[i]->v;
    out[i] = (v[0] + v[1]) + (v[2] + v[3]);
  }
#endif
}

// The last `count` < kLanes elements of a row, rounded as store does.
template <class T>
static inline void store_part(T* p, Lanes a, int count) {
  T lanes[kLanes];
  store(lanes, a);
  memcpy(p, lanes, size_t(count) * sizeof(T));
}

#if CLP_ISA_LEVEL >= 3
struct Pairs {
  __m512i v;
};
static inline Pairs load_pairs(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
static inline Pairs load_pairs_part(const BFloat16* p, int count) {
  return {_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p)};
}
// Products are exact and added to the lane in pairs; subnormal inputs and sums count as zero.
static inline Lanes multiply_add(Pairs a, Pairs b, Lanes sum) {
  return {_mm512_dpbf16_ps(sum.v, __m512bh(a.v), __m512bh(b.v))};
}
#endif

}  // namespace clp::CLP_ISA::lanes
