// Which instruction-set build of the CPU kernels runs. The sources are compiled once for each, with
// per-file flags; the widest one this machine has is chosen at load.
#pragma once

#include <string>
#include <vector>

namespace clp {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kIsas = 4;

// Names of the builds that this machine can run, narrowest first.
std::vector<std::string> supported_isas();

// "" is the widest, or what the environment variable CLP_KERNELS_CPU_ISA names. Throws
// std::invalid_argument for a name that is unknown, not compiled in, or not supported here.
Isa resolve_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace clp
