#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace clp {
namespace {

constexpr const char* kNames[kIsas] = {"scalar", "avx2", "avx512", "avx512_bf16"};
constexpr const char* kVariable = "CLP_KERNELS_CPU_ISA";

bool has(Isa isa) {
#ifdef CLP_X86
  // These also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kScalar;
}

Isa parse(const std::string& name, const std::string& where) {
  std::string known;
  for (int i = 0; i < kIsas; ++i) {
    if (name == kNames[i]) {
      if (has(Isa(i))) return Isa(i);
      throw std::invalid_argument(where + "=" + name + " is not supported by this machine");
    }
    known += std::string(i ? ", " : "") + kNames[i];
  }
  throw std::invalid_argument(where + " must be one of " + known + ", got '" + name + "'");
}

Isa widest() {
  for (int i = kIsas - 1; i > 0; --i) {
    if (has(Isa(i))) return Isa(i);
  }
  return Isa::kScalar;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsas; ++i) {
    if (has(Isa(i))) names.push_back(kNames[i]);
  }
  return names;
}

Isa resolve_isa(const std::string& name) {
  if (!name.empty()) return parse(name, "isa");
  // Read once. A wrong value throws at every call, because the initialisation never completes.
  static const Isa chosen = [] {
    const char* forced = std::getenv(kVariable);
    return forced && *forced ? parse(forced, kVariable) : widest();
  }();
  return chosen;
}

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

}  // namespace clp
