// The packs of simd.h in AVX-512: 16 floats or words in one register.
#pragma once

#include <immintrin.h>

namespace clp {
namespace CLP_ISA {

struct Floats {
  __m512 v;
};
struct Words {
  __m512i v;
};
struct Wides {
  __m512i v;
};
struct Sum {
  __m512d low, high;
};

static inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Floats load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline Floats load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
static inline void store(BFloat16* p, Floats a) { narrow(a.v, p); }
static inline void store(Float16* p, Floats a) { narrow(a.v, p); }
static inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline uint32_t equal(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
static inline uint32_t at_most(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ);
}
static inline Floats where_equal(Floats a, Floats b, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v)};
}

static inline Words all_words(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
static inline void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
static inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
static inline Words shift_left(Words a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
static inline Words shift_right(Words a) {
  return {_mm512_srli_epi32(a.v, N)};
}
static inline Words bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
static inline Floats from_bits(Words a) { return {_mm512_castsi512_ps(a.v)}; }
static inline Floats to_floats(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }

static inline Wides all_wides(uint64_t x) { return {_mm512_set1_epi64(int64_t(x))}; }
static inline Wides operator+(Wides a, Wides b) { return {_mm512_add_epi64(a.v, b.v)}; }
static inline Wides operator^(Wides a, Wides b) { return {_mm512_xor_si512(a.v, b.v)}; }
static inline Wides multiply_low(Wides a, Wides b) { return {_mm512_mul_epu32(a.v, b.v)}; }
static inline Wides high_half(Wides a) { return {_mm512_srli_epi64(a.v, 32)}; }
static inline Wides block_order() { return {_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)}; }
static inline void interleave(const Wides x[4], Words out[2]) {
  const __m512i a = _mm512_mask_blend_epi32(0xAAAA, x[0].v, _mm512_slli_epi64(x[1].v, 32));
  const __m512i b = _mm512_mask_blend_epi32(0xAAAA, x[2].v, _mm512_slli_epi64(x[3].v, 32));
  out[0].v = _mm512_unpacklo_epi64(a, b);
  out[1].v = _mm512_unpackhi_epi64(a, b);
}

static inline Sum no_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
static inline void accumulate(Sum& sum, Floats a) {
  sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}
static inline void store(double* p, const Sum& sum) {
  _mm512_storeu_pd(p, sum.low);
  _mm512_storeu_pd(p + 8, sum.high);
}

}  // namespace CLP_ISA
}  // namespace clp
