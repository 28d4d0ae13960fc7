// A block of rows of mixed_lora. Compiled once for each instruction set; see mixed_lora_isa.h.
#include "mixed_lora_isa.h"

#include "dots.h"

namespace clp {
namespace CLP_ISA {

constexpr int64_t kBlock = 64;  // output columns whose update is held beside y: 16 rows in 4 KB

template <class T>
constexpr int kPlanes = Format<T>::kSplit ? 2 : 1;

// The parts of a thread's scratch memory.
template <class T>
struct Scratch {
  using Operand = typename Format<T>::Operand;
  int64_t x_row, z_row, rows;
  int64_t z_plane() const { return rows * z_row; }
  Operand* x(void* p) const { return static_cast<Operand*>(p); }
  Operand* z(void* p) const { return x(p) + rows * x_row; }
  float* update(void* p) const {
    return reinterpret_cast<float*>(z(p) + kPlanes<T> * z_plane());
  }
  int64_t bytes() const {
    return (rows * x_row + kPlanes<T> * z_plane()) * int64_t(sizeof(Operand)) +
           rows * kBlock * int64_t(sizeof(float));
  }
};

template <class T>
static Scratch<T> layout(const MixedLoraArgs& g, int64_t rows) {
  return {padded<T>(g.K), g.m * padded<T>(g.r), rows};
}

template <class T, class X>
static void shrink(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                   int64_t begin, int64_t end) {
  const Scratch<T> s = layout<T>(g, rows);
  const X* x = static_cast<const X*>(g.x) + row * g.x_stride;
  for (int64_t t = 0; t < rows; ++t) {
    convert_row<T>(x + t * g.x_stride, g.K, s.x(scratch) + t * s.x_row);
  }
  const T* A = static_cast<const T*>(g.lora_A) + begin * g.K;
  const int64_t R = g.m * g.r;
  dots<T, 1>({s.x(scratch), s.x_row, 0, A, g.K, 0, 1, g.K}, rows, end - begin,
             g.u + row * R + begin, R);
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

template <class X>
static void add_row(X* y, const float* update, int64_t count) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) store(y + n, load(y + n) + load(update + n));
  const int rest = int(count - n);
  if (rest == 0) return;
  store_part(y + n, load_part(y + n, rest) + load_part(update + n, rest), rest);
}

template <class T, class X>
static void expand(const MixedLoraArgs& g, void* scratch, int64_t row, int64_t rows,
                   int64_t begin, int64_t end) {
  const Scratch<T> s = layout<T>(g, rows);
  bool active[64];
  for (int64_t t = 0; t < rows; ++t) active[t] = mix<T>(g, s, scratch, row, t);
  float* const update = s.update(scratch);
  X* const y = static_cast<X*>(g.y) + row * g.N;
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = end - n < kBlock ? end - n : kBlock;
    const T* B = static_cast<const T*>(g.lora_B) + n * g.r;
    dots<T, kPlanes<T>>({s.z(scratch), s.z_row, s.z_plane(), B, g.r, g.N * g.r, g.m, g.r}, rows,
                        count, update, kBlock);
    for (int64_t t = 0; t < rows; ++t) {
      if (active[t]) add_row(y + t * g.N + n, update + t * kBlock, count);
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
  return typed(g, [&](auto T, auto) { return layout<decltype(T)>(g, rows).bytes(); });
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
