// The packs of simd.h in AVX2: 16 floats or words in two registers.
#pragma once

#include <immintrin.h>

namespace clp {
namespace CLP_ISA {

struct Floats {
  __m256 low, high;
};
struct Words {
  __m256i low, high;
};
struct Wides {
  __m256i low, high;
};
struct Sum {
  __m256d v[4];
};

static inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline __m128i load_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
static inline __m256 widen_bfloat16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Floats load(const BFloat16* p) {
  return {widen_bfloat16(load_halves(p)), widen_bfloat16(load_halves(p + 8))};
}
static inline Floats load(const Float16* p) {
  return {_mm256_cvtph_ps(load_halves(p)), _mm256_cvtph_ps(load_halves(p + 8))};
}
static inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
static inline void store(BFloat16* p, Floats a) {
  narrow(a.low, p);
  narrow(a.high, p + 8);
}
static inline void store(Float16* p, Floats a) {
  narrow(a.low, p);
  narrow(a.high, p + 8);
}
static inline Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
static inline Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
static inline Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
static inline Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
static inline Floats maximum(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
static inline uint32_t mask(__m256 low, __m256 high) {
  return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
}
static inline uint32_t equal(Floats a, Floats b) {
  return mask(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}
static inline uint32_t at_most(Floats a, Floats b) {
  return mask(_mm256_cmp_ps(a.low, b.low, _CMP_LE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LE_OQ));
}
static inline Floats where_equal(Floats a, Floats b, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)),
          _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))};
}

static inline Words all_words(uint32_t x) {
  return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))};
}
static inline void store(uint32_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.high);
}
static inline Words operator+(Words a, Words b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
static inline Words operator&(Words a, Words b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
static inline Words operator^(Words a, Words b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
template <int N>
static inline Words shift_left(Words a) {
  return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
}
template <int N>
static inline Words shift_right(Words a) {
  return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)};
}
static inline Words bits(Floats a) {
  return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}
static inline Floats from_bits(Words a) {
  return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)};
}
static inline Floats to_floats(Words a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}

static inline Wides all_wides(uint64_t x) {
  return {_mm256_set1_epi64x(int64_t(x)), _mm256_set1_epi64x(int64_t(x))};
}
static inline Wides operator+(Wides a, Wides b) {
  return {_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}
static inline Wides operator^(Wides a, Wides b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
static inline Wides multiply_low(Wides a, Wides b) {
  return {_mm256_mul_epu32(a.low, b.low), _mm256_mul_epu32(a.high, b.high)};
}
static inline Wides high_half(Wides a) {
  return {_mm256_srli_epi64(a.low, 32), _mm256_srli_epi64(a.high, 32)};
}
static inline Wides block_order() {
  return {_mm256_setr_epi64x(0, 2, 1, 3), _mm256_setr_epi64x(4, 6, 5, 7)};
}
static inline Words interleave_half(__m256i x0, __m256i x1, __m256i x2, __m256i x3) {
  const __m256i a = _mm256_blend_epi32(x0, _mm256_slli_epi64(x1, 32), 0xAA);
  const __m256i b = _mm256_blend_epi32(x2, _mm256_slli_epi64(x3, 32), 0xAA);
  return {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)};
}
static inline void interleave(const Wides x[4], Words out[2]) {
  out[0] = interleave_half(x[0].low, x[1].low, x[2].low, x[3].low);
  out[1] = interleave_half(x[0].high, x[1].high, x[2].high, x[3].high);
}

static inline Sum no_sum() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}
static inline void accumulate(Sum& sum, Floats a) {
  sum.v[0] = _mm256_add_pd(sum.v[0], _mm256_cvtps_pd(_mm256_castps256_ps128(a.low)));
  sum.v[1] = _mm256_add_pd(sum.v[1], _mm256_cvtps_pd(_mm256_extractf128_ps(a.low, 1)));
  sum.v[2] = _mm256_add_pd(sum.v[2], _mm256_cvtps_pd(_mm256_castps256_ps128(a.high)));
  sum.v[3] = _mm256_add_pd(sum.v[3], _mm256_cvtps_pd(_mm256_extractf128_ps(a.high, 1)));
}
static inline void store(double* p, const Sum& sum) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, sum.v[i]);
}

}  // namespace CLP_ISA
}  // namespace clp
