// A block of rows of mixed_lora. Compiled once for each instruction set; see isa.h.
#include "cpu/mixed_lora/isa.h"

#include "cpu/dots.h"

namespace clp {
namespace CLP_ISA {

using namespace lanes;

// Output columns whose update is kept beside y (16 rows in 3 KB), and those whose base weights stay
// in the cache for all rows: whole blocks of dots.h, whole registers.
constexpr int64_t kBlock = 48, kBaseColumns = CLP_ISA_LEVEL < 2 ? 24 : 16;

template <class T>
constexpr int kPlanes = Format<T>::kSplit ? 2 : 1;

// The parts of a thread's scratch memory. x is laid out for the adapters in the first half and for
// the base in the second.
template <class T>
struct Scratch {
  using Operand = typename Format<T>::Operand;
  int64_t x_bytes, z_row, rows;
  int64_t z_plane() const { return rows * z_row; }
  void* x(void* p) const { return p; }
  Operand* z(void* p) const {
    return reinterpret_cast<Operand*>(static_cast<char*>(p) + rows * x_bytes);
  }
  float* update(void* p) const {
    return reinterpret_cast<float*>(z(p) + kPlanes<T> * z_plane());
  }
  float* product(void* p) const { return update(p) + rows * kBlock; }
  int64_t bytes() const {
    return rows * x_bytes + kPlanes<T> * z_plane() * int64_t(sizeof(Operand)) +
           2 * rows * kBlock * int64_t(sizeof(float));
  }
};

template <class T, class X>
static Scratch<T> layout(const MixedLoraArgs& g, int64_t rows) {
  const int64_t adapters = padded<T>(g.K) * int64_t(sizeof(typename Format<T>::Operand));
  const int64_t base = padded<X>(g.K) * int64_t(sizeof(typename Format<X>::Operand));
  return {adapters > base ? adapters : base, g.m * padded<T>(g.r), rows};
}

// Rows of x as operands that meet weights of type T.
template <class T, class X>
static const typename Format<T>::Operand* operands(const MixedLoraArgs& g, void* out, int64_t row,
                                                   int64_t rows) {
  auto* const to = static_cast<typename Format<T>::Operand*>(out);
  const X* x = static_cast<const X*>(g.x) + row * g.x_stride;
  for (int64_t t = 0; t < rows; ++t) {
    convert_row<T>(x + t * g.x_stride, g.K, to + t * padded<T>(g.K));
  }
  return to;
}

template <class T, class X>
static void shrink(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                   int64_t begin, int64_t end) {
  if (!g.lora_A) return;
  const auto* x = operands<T, X>(g, layout<T, X>(g, rows).x(scratch), row, rows);
  const T* A = static_cast<const T*>(g.lora_A) + begin * g.K;
  const int64_t R = g.m * g.r;
  dots<T, 1>({x, padded<T>(g.K), 0, A, g.K, 0, 1, g.K}, rows, end - begin, g.u + row * R + begin,
             R);
}

static int64_t row_of(const MixedLoraArgs& g, int64_t t) {
  if (!g.example_ids) return t / g.tokens_per_example;
  return g.wide_ids ? static_cast<const int64_t*>(g.example_ids)[t]
                    : static_cast<const int32_t*>(g.example_ids)[t];
}

#if CLP_ISA_LEVEL >= 3
// The nearest bfloat16 and the nearest to what is left: 16 bits of x between them.
static void split(float x, BFloat16* high, BFloat16* low) {
  const auto nearest = [](float value) {
    const uint32_t bits = word_from(value);
    return uint16_t(value != value ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  };
  high->bits = nearest(x);
  const float rest = x - float_from(uint32_t(high->bits) << 16);
  low->bits = rest - rest == 0.0f ? nearest(rest) : 0;  // infinity leaves NaN
}
#endif

// Whether any weight of row t is not zero; z[t] = w u.
template <class T>
static bool mix(const MixedLoraArgs& g, const Scratch<T>& s, void* scratch, int64_t row,
                int64_t t) {
  const float* weights = g.weights + row_of(g, row + t) * g.m;
  const float* u = g.u + (row + t) * g.m * g.r;
  auto* z = s.z(scratch) + t * s.z_row;
  bool active = false;
  for (int64_t i = 0; i < g.m; ++i) {
    const float w = weights[i];
    active |= w != 0.0f;
    for (int64_t j = 0; j < padded<T>(g.r); ++j) {
      const float value = w == 0.0f || j >= g.r ? 0.0f : w * u[i * g.r + j];
      const int64_t at = i * padded<T>(g.r) + j;
#if CLP_ISA_LEVEL >= 3
      if constexpr (Format<T>::kSplit) {
        split(value, z + at, z + at + s.z_plane());
        continue;
      } else
#endif
        z[at] = value;
    }
  }
  return active;
}

// y = base + bias + update, each but base or null.
template <class X, class Base>
static void add_row(X* y, const Base* base, const X* bias, const float* update, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const int rest = int(count - n);
    const auto read = [&](const auto* p) {
      return rest < kLanes ? load_part(p + n, rest) : load(p + n);
    };
    Lanes value = read(base);
    if (bias) value = value + read(bias);
    if (update) value = value + read(update);
    if (rest < kLanes) {
      store_part(y + n, value, rest);
    } else {
      store(y + n, value);
    }
  }
}

template <class T, class X>
static void expand(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                   int64_t begin, int64_t end) {
  if (!g.lora_B) return;
  const Scratch<T> s = layout<T, X>(g, rows);
  bool active[64];
  for (int64_t t = 0; t < rows; ++t) active[t] = mix<T>(g, s, scratch, row, t);
  float *const update = s.update(scratch), *const product = s.product(scratch);
  X* const y = static_cast<X*>(g.y) + row * g.y_stride;
  const typename Format<X>::Operand* x = nullptr;
  if (g.base_weight) x = operands<X, X>(g, s.x(scratch), row, rows);
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = end - n < kBlock ? end - n : kBlock;
    const T* B = static_cast<const T*>(g.lora_B) + n * g.r;
    dots<T, kPlanes<T>>({s.z(scratch), s.z_row, s.z_plane(), B, g.r, g.N * g.r, g.m, g.r}, rows,
                        count, update, kBlock);
    for (int64_t k = 0; x && k < count; k += kBaseColumns) {
      const X* W = static_cast<const X*>(g.base_weight) + (n + k) * g.K;
      dots<X, 1>({x, padded<X>(g.K), 0, W, g.K, 0, 1, g.K}, rows,
                 count - k < kBaseColumns ? count - k : kBaseColumns, product + k, kBlock);
    }
    const X* bias = x && g.bias ? static_cast<const X*>(g.bias) + n : nullptr;
    for (int64_t t = 0; t < rows; ++t) {
      X* const to = y + t * g.y_stride + n;
      const float* const added = active[t] ? update + t * kBlock : nullptr;
      if (x) {
        add_row<X>(to, product + t * kBlock, bias, added, count);
      } else if (added) {
        add_row<X>(to, to, nullptr, added, count);
      }
    }
  }
}

// Calls body with the element types of the adapters and of x.
template <class Body>
static auto typed(const MixedLoraArgs& g, const Body& body) {
  if (g.lora_dtype == DType::kBFloat16) return body(BFloat16(), BFloat16());
  if (g.lora_dtype == DType::kFloat16) return body(Float16(), Float16());
  if (g.x_dtype == DType::kBFloat16) return body(float(), BFloat16());
  if (g.x_dtype == DType::kFloat16) return body(float(), Float16());
  return body(float(), float());
}

static int64_t scratch_bytes(const MixedLoraArgs& g, int64_t rows) {
  return typed(g, [&](auto T, auto X) {
    return layout<decltype(T), decltype(X)>(g, rows).bytes();
  });
}

static void shrink_any(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                       int64_t begin, int64_t end) {
  typed(g, [&](auto T, auto X) {
    shrink<decltype(T), decltype(X)>(g, scratch, row, rows, begin, end);
  });
}

static void expand_any(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                       int64_t begin, int64_t end) {
  typed(g, [&](auto T, auto X) {
    expand<decltype(T), decltype(X)>(g, scratch, row, rows, begin, end);
  });
}

}  // namespace CLP_ISA

const MixedLoraKernels CLP_MIXED_LORA_KERNELS{CLP_ISA::scratch_bytes, CLP_ISA::shrink_any,
                                              CLP_ISA::expand_any};

}  // namespace clp
