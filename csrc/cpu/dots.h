// Many dot products in one pass: the inner loop of mixed_lora and mixed_linear on the CPU, for each
// instruction set.
//
//   out[t][n] = sum over pieces p, elements l:  a[t][p][l] * b[p][n][l]
//
// a holds activations, converted once (Operand) and padded with zeros to whole registers; b is read
// where it lies, in its own dtype. An element of out is summed in an order that depends on the
// length alone, never on how many rows and columns are computed beside it. A long one is cut into
// segments whose sums are added up, so that rounding grows with the segment and not with the length.
#pragma once

#include "cpu/lanes.h"

namespace clp::CLP_ISA::lanes {

// How a is kept and both are read. bfloat16 weights meet float32 activations, or, where the machine
// multiplies pairs of bfloat16, activations in bfloat16.
template <class T>
struct Format {
  using Operand = float;
  static constexpr int kStep = kLanes;
  static constexpr bool kSplit = false;
  static Lanes weight(const T* p) { return load(p); }
  static Lanes weight_part(const T* p, int count) { return load_part(p, count); }
  static Lanes operand(const float* p) { return load(p); }
};
#if CLP_ISA_LEVEL >= 3
template <>
struct Format<BFloat16> {
  using Operand = BFloat16;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kSplit = true;
  static Pairs weight(const BFloat16* p) { return load_pairs(p); }
  static Pairs weight_part(const BFloat16* p, int count) { return load_pairs_part(p, count); }
  static Pairs operand(const BFloat16* p) { return load_pairs(p); }
};
#endif

template <class T>
constexpr int64_t padded(int64_t length) {
  return (length + Format<T>::kStep - 1) / Format<T>::kStep * Format<T>::kStep;
}

// PLANES: a is the sum of so many operands (two bfloat16 hold 16 bits of a float32).
template <class T>
struct DotArgs {
  const typename Format<T>::Operand* a;
  int64_t a_row, a_plane;  // a_row: pieces * padded(length)
  const T* b;
  int64_t b_row, b_piece;
  int64_t pieces, length;
};

constexpr int64_t kSegment = 1024;  // a multiple of every kStep

// Elements [begin, begin + length) of every piece.
template <class T, int PLANES, int ROWS, int COLUMNS>
__attribute__((always_inline)) static inline void dot_tile(const DotArgs<T>& g, int64_t row,
                                                           int64_t column, int64_t begin,
                                                           int64_t length,
                                                           Lanes sum[ROWS][COLUMNS]) {
  using F = Format<T>;
  const int64_t whole = length / F::kStep * F::kStep;
  const int rest = int(length - whole);
#pragma GCC unroll 8
  for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
    for (int n = 0; n < COLUMNS; ++n) sum[t][n] = zero();
  }
  const auto step = [&](const auto* a, int n, const auto& weight) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int plane = 0; plane < PLANES; ++plane) {
#pragma GCC unroll 8
      for (int t = 0; t < ROWS; ++t) {
        sum[t][n] = multiply_add(F::operand(a + plane * g.a_plane + t * g.a_row), weight,
                                 sum[t][n]);
      }
    }
  };
  const auto* a = g.a + row * g.a_row + begin;
  const T* b = g.b + column * g.b_row + begin;
  for (int64_t piece = 0; piece < g.pieces; ++piece) {
    for (int64_t l = 0; l < whole; l += F::kStep) {
      if constexpr (ROWS == 4) {
        // All weights first, then each operand is loaded once: 6 loads for 8 products, not 10.
        decltype(F::weight(b)) weight[COLUMNS];
#pragma GCC unroll 8
        for (int n = 0; n < COLUMNS; ++n) weight[n] = F::weight(b + n * g.b_row + l);
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; ++plane) {
#pragma GCC unroll 8
          for (int t = 0; t < ROWS; ++t) {
            const auto operand = F::operand(a + l + plane * g.a_plane + t * g.a_row);
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) {
              sum[t][n] = multiply_add(operand, weight[n], sum[t][n]);
            }
          }
        }
        continue;
      }
#pragma GCC unroll 8
      for (int n = 0; n < COLUMNS; ++n) {
        const T* const weight = b + n * g.b_row + l;
        // One row waits for memory alone: with weights out of the cache this takes 55 us of 65.
        if (ROWS == 1 && l * sizeof(T) % 64 == 0) {
          __builtin_prefetch(reinterpret_cast<const char*>(weight) + 2048);
        }
        step(a + l, n, F::weight(weight));
      }
    }
    if (rest > 0) {
#pragma GCC unroll 8
      for (int n = 0; n < COLUMNS; ++n) {
        step(a + whole, n, F::weight_part(b + n * g.b_row + whole, rest));
      }
    }
    a += padded<T>(g.length);
    b += g.b_piece;
  }
}

template <class T, int PLANES, int ROWS, int COLUMNS>
__attribute__((always_inline)) static inline void dot_block(const DotArgs<T>& g, int64_t row, int64_t column, float* out,
                      int64_t out_row) {
  const Lanes none = zero();
  int64_t begin = 0;
  do {
    const int64_t left = g.length - begin;
    Lanes sum[ROWS][COLUMNS];
    dot_tile<T, PLANES, ROWS, COLUMNS>(g, row, column, begin, left < kSegment ? left : kSegment,
                                       sum);
    // Four sums at a time, along the longer side of the block.
    float part[ROWS][COLUMNS], four[4];
    if constexpr (COLUMNS % 4 == 0) {
      for (int t = 0; t < ROWS; ++t) {
        for (int n = 0; n < COLUMNS; n += 4) {
          sum4(sum[t][n], sum[t][n + 1], sum[t][n + 2], sum[t][n + 3], &part[t][n]);
        }
      }
    } else {
      for (int n = 0; n < COLUMNS; ++n) {
        sum4(sum[0][n], ROWS > 1 ? sum[ROWS > 1 ? 1 : 0][n] : none,
             ROWS > 2 ? sum[ROWS > 2 ? 2 : 0][n] : none,
             ROWS > 3 ? sum[ROWS > 3 ? 3 : 0][n] : none, four);
        for (int t = 0; t < ROWS; ++t) part[t][n] = four[t];
      }
    }
    for (int t = 0; t < ROWS; ++t) {
      for (int n = 0; n < COLUMNS; ++n) {
        float* const at = out + t * out_row + n;
        *at = begin == 0 ? part[t][n] : *at + part[t][n];
      }
    }
    begin += kSegment;
  } while (begin < g.length);
}

// As many columns as leave the sums, their weights and an operand in the registers: 16, or 32 with
// AVX-512. Four rows by three columns fill the sixteen, 70 multiply-adds a nanosecond on two Zen 3
// cores where four by two reach 50.
constexpr int columns_beside(int rows) {
  return rows == 1 ? 8 : rows == 4 && CLP_ISA_LEVEL < 2 ? 3 : 4;
}

template <class T, int PLANES, int ROWS>
static void dot_rows(const DotArgs<T>& g, int64_t row, int64_t columns, float* out,
                     int64_t out_row) {
  constexpr int kColumns = columns_beside(ROWS);
  int64_t n = 0;
  for (; n + kColumns <= columns; n += kColumns) {
    dot_block<T, PLANES, ROWS, kColumns>(g, row, n, out + n, out_row);
  }
  for (; n < columns; ++n) dot_block<T, PLANES, ROWS, 1>(g, row, n, out + n, out_row);
}

// out[t * out_row + n] for t < rows, n < columns.
template <class T, int PLANES>
static void dots(const DotArgs<T>& g, int64_t rows, int64_t columns, float* out,
                 int64_t out_row) {
  for (int64_t t = 0; t < rows; t += 4) {
    float* const target = out + t * out_row;
    switch (rows - t) {
      case 1:
        dot_rows<T, PLANES, 1>(g, t, columns, target, out_row);
        break;
      case 2:
        dot_rows<T, PLANES, 2>(g, t, columns, target, out_row);
        break;
      case 3:
        dot_rows<T, PLANES, 3>(g, t, columns, target, out_row);
        break;
      default:
        dot_rows<T, PLANES, 4>(g, t, columns, target, out_row);
    }
  }
}

// Writes one row of a: `count` elements of x, padded with zeros.
template <class T, class X>
static void convert_row(const X* x, int64_t count, typename Format<T>::Operand* out) {
  const int64_t end = padded<T>(count);
  if constexpr (Format<T>::kSplit) {
    // Exact: bfloat16 weights come with bfloat16 activations.
    memcpy(out, x, size_t(count) * sizeof(*out));
    memset(out + count, 0, size_t(end - count) * sizeof(*out));
  } else {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(out + k, load(x + k));
    if (k < count) store(out + k, load_part(x + k, int(count - k)));
  }
}

}  // namespace clp::CLP_ISA::lanes
