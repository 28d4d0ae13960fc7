// A block of outputs of mixed_linear. Compiled once for each instruction set.
#include "cpu/mixed_linear/isa.h"

#include "cpu/dots.h"

namespace clp {
namespace CLP_ISA {

using namespace lanes;

// Of one expert; whole registers and whole blocks of dots.h. With 4096 features in bfloat16 192 KB.
constexpr int64_t kColumns = CLP_ISA_LEVEL < 2 ? 24 : 16;

// A thread's scratch memory: x as operands, one expert's product, the sum so far.
template <class T>
struct Scratch {
  using Operand = typename Format<T>::Operand;
  int64_t x_row, rows;
  Operand* x(void* p) const { return static_cast<Operand*>(p); }
  float* product(void* p) const { return reinterpret_cast<float*>(x(p) + rows * x_row); }
  float* total(void* p) const { return product(p) + rows * kColumns; }
  int64_t bytes() const {
    return rows * (x_row * int64_t(sizeof(Operand)) + 2 * kColumns * int64_t(sizeof(float)));
  }
};

static int64_t row_of(const MixedLinearArgs& g, int64_t t) {
  if (!g.example_ids) return t / g.tokens_per_example;
  return g.wide_ids ? static_cast<const int64_t*>(g.example_ids)[t]
                    : static_cast<const int32_t*>(g.example_ids)[t];
}

// total += w (product + bias), kColumns at a time; what lies beyond `count` is never stored.
template <class T>
static void add(float* total, const float* product, const T* bias, float w, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) {
    Lanes value = load(product + n);
    if (bias) {
      const int64_t left = count - n;
      value = value + (left < kLanes ? load_part(bias + n, int(left)) : load(bias + n));
    }
    store(total + n, multiply_add(all(w), value, load(total + n)));
  }
}

template <class T>
static void round_row(const float* total, int64_t count, T* y) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) store(y + n, load(total + n));
  if (n < count) store_part(y + n, load(total + n), int(count - n));
}

template <class T>
static void block(const MixedLinearArgs& g, void* scratch, int64_t row, int64_t rows,
                  int64_t begin, int64_t end) {
  const Scratch<T> s{padded<T>(g.K), rows};
  float *const product = s.product(scratch), *const total = s.total(scratch);
  for (int64_t t = 0; t < rows; ++t) {
    const T* x = static_cast<const T*>(g.x) + (row + t) * g.x_stride;
    convert_row<T>(x, g.K, s.x(scratch) + t * s.x_row);
  }
  for (int64_t n = begin; n < end; n += kColumns) {
    const int64_t count = end - n < kColumns ? end - n : kColumns;
    memset(total, 0, size_t(rows * kColumns) * sizeof(float));
    for (int64_t i = 0; i < g.m; ++i) {
      const T* W = static_cast<const T*>(g.expert_weight) + (i * g.N + n) * g.K;
      const T* bias = g.bias ? static_cast<const T*>(g.bias) + i * g.N + n : nullptr;
      dots<T, 1>({s.x(scratch), s.x_row, 0, W, g.K, 0, 1, g.K}, rows, count, product, kColumns);
      for (int64_t t = 0; t < rows; ++t) {
        const float w = g.weights[row_of(g, row + t) * g.m + i];
        if (w != 0.0f) add(total + t * kColumns, product + t * kColumns, bias, w, count);
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      round_row(total + t * kColumns, count, static_cast<T*>(g.y) + (row + t) * g.N + n);
    }
  }
}

template <class Body>
static auto typed(const MixedLinearArgs& g, const Body& body) {
  if (g.dtype == DType::kBFloat16) return body(BFloat16());
  if (g.dtype == DType::kFloat16) return body(Float16());
  return body(float());
}

static int64_t scratch_bytes(const MixedLinearArgs& g, int64_t rows) {
  return typed(g, [&](auto T) {
    return Scratch<decltype(T)>{padded<decltype(T)>(g.K), rows}.bytes();
  });
}

static void block_any(const MixedLinearArgs& g, void* scratch, int64_t row, int64_t rows,
                      int64_t begin, int64_t end) {
  typed(g, [&](auto T) { block<decltype(T)>(g, scratch, row, rows, begin, end); });
}

}  // namespace CLP_ISA

const MixedLinearKernels CLP_MIXED_LINEAR_KERNELS{CLP_ISA::scratch_bytes, CLP_ISA::block_any};

}  // namespace clp
