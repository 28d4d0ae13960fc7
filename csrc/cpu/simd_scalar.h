// The packs of simd.h as plain arrays, for any machine. The loops are short and independent, so a
// compiler uses what its baseline has (SSE2, NEON).
#pragma once

namespace clp {
namespace CLP_ISA {

struct Floats {
  float v[16];
};
struct Words {
  uint32_t v[16];
};
struct Wides {
  uint64_t v[8];
};
struct Sum {
  double v[16];
};

#define CLP_EACH(Pack, count, expression)                    \
  Pack r;                                                    \
  for (int k = 0; k < count; ++k) r.v[k] = (expression);     \
  return r

static inline Floats all(float x) { CLP_EACH(Floats, 16, x); }
static inline Floats load(const float* p) { CLP_EACH(Floats, 16, p[k]); }
static inline Floats load(const BFloat16* p) {
  CLP_EACH(Floats, 16, float_from(uint32_t(p[k].bits) << 16));
}
static inline float widen_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
  // 2^112 moves the exponent from half's bias of 15 to float's 127, and is exact for subnormals.
  const float magnitude = rest >= 0x7c00u ? float_from((rest << 13) | 0x7f800000u)
                                          : float_from(rest << 13) * 0x1p112f;
  return float_from(word_from(magnitude) | sign);
}
static inline Floats load(const Float16* p) { CLP_EACH(Floats, 16, widen_float16(p[k].bits)); }
template <class T>
static inline void store(T* p, Floats a) {
  for (int k = 0; k < 16; ++k) narrow(a.v[k], p + k);
}
static inline Floats operator+(Floats a, Floats b) { CLP_EACH(Floats, 16, a.v[k] + b.v[k]); }
static inline Floats operator-(Floats a, Floats b) { CLP_EACH(Floats, 16, a.v[k] - b.v[k]); }
static inline Floats operator*(Floats a, Floats b) { CLP_EACH(Floats, 16, a.v[k] * b.v[k]); }
static inline Floats operator/(Floats a, Floats b) { CLP_EACH(Floats, 16, a.v[k] / b.v[k]); }
static inline Floats maximum(Floats a, Floats b) {
  CLP_EACH(Floats, 16, a.v[k] > b.v[k] ? a.v[k] : b.v[k]);
}
static inline uint32_t equal(Floats a, Floats b) {
  uint32_t mask = 0;
  for (int k = 0; k < 16; ++k) mask |= uint32_t(a.v[k] == b.v[k]) << k;
  return mask;
}
static inline uint32_t at_most(Floats a, Floats b) {
  uint32_t mask = 0;
  for (int k = 0; k < 16; ++k) mask |= uint32_t(a.v[k] <= b.v[k]) << k;
  return mask;
}
static inline Floats where_equal(Floats a, Floats b, Floats yes, Floats no) {
  CLP_EACH(Floats, 16, a.v[k] == b.v[k] ? yes.v[k] : no.v[k]);
}

static inline Words all_words(uint32_t x) { CLP_EACH(Words, 16, x); }
static inline void store(uint32_t* p, Words a) {
  for (int k = 0; k < 16; ++k) p[k] = a.v[k];
}
static inline Words operator+(Words a, Words b) { CLP_EACH(Words, 16, a.v[k] + b.v[k]); }
static inline Words operator&(Words a, Words b) { CLP_EACH(Words, 16, a.v[k] & b.v[k]); }
static inline Words operator^(Words a, Words b) { CLP_EACH(Words, 16, a.v[k] ^ b.v[k]); }
template <int N>
static inline Words shift_left(Words a) {
  CLP_EACH(Words, 16, a.v[k] << N);
}
template <int N>
static inline Words shift_right(Words a) {
  CLP_EACH(Words, 16, a.v[k] >> N);
}
static inline Words bits(Floats a) { CLP_EACH(Words, 16, word_from(a.v[k])); }
static inline Floats from_bits(Words a) { CLP_EACH(Floats, 16, float_from(a.v[k])); }
static inline Floats to_floats(Words a) { CLP_EACH(Floats, 16, float(int32_t(a.v[k]))); }

static inline Wides all_wides(uint64_t x) { CLP_EACH(Wides, 8, x); }
static inline Wides operator+(Wides a, Wides b) { CLP_EACH(Wides, 8, a.v[k] + b.v[k]); }
static inline Wides operator^(Wides a, Wides b) { CLP_EACH(Wides, 8, a.v[k] ^ b.v[k]); }
static inline Wides multiply_low(Wides a, Wides b) {
  CLP_EACH(Wides, 8, uint64_t(uint32_t(a.v[k])) * uint32_t(b.v[k]));
}
static inline Wides high_half(Wides a) { CLP_EACH(Wides, 8, a.v[k] >> 32); }
static inline Wides block_order() { CLP_EACH(Wides, 8, uint64_t(k)); }
static inline void interleave(const Wides x[4], Words out[2]) {
  for (int k = 0; k < 32; ++k) out[k / 16].v[k % 16] = uint32_t(x[k % 4].v[k / 4]);
}

static inline Sum no_sum() { CLP_EACH(Sum, 16, 0.0); }
static inline void accumulate(Sum& sum, Floats a) {
  for (int k = 0; k < 16; ++k) sum.v[k] += double(a.v[k]);
}
static inline void store(double* p, const Sum& sum) {
  for (int k = 0; k < 16; ++k) p[k] = sum.v[k];
}

#undef CLP_EACH

}  // namespace CLP_ISA
}  // namespace clp
