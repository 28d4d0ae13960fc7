// clp_kernels._cuda. As in cpu.cpp, tensors have been checked by the public ops and by the launchers'
// why_not; the stream comes as an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/sample_fields.h"
#include "cuda/mixed.h"

namespace py = pybind11;

namespace {

// Throws the message that a launcher returns.
void raise(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + " on CUDA: " + error);
}

struct Sample : clp::SampleArgs {
  void* workspace;
  int device;
  void* stream;
  void run() const { raise("sample", clp::sample_cuda(*this, workspace, device, stream)); }
};

struct MixedLora : clp::MixedLoraCuda {
  int device;
  void* stream;
  void run() const { raise("mixed_lora", clp::mixed_lora_cuda(*this, device, stream)); }
};

struct MixedLinear : clp::MixedLinearCuda {
  int device;
  void* stream;
  void run() const { raise("mixed_linear", clp::mixed_linear_cuda(*this, device, stream)); }
};

#define TOKENS_FIELD(field)                                                \
  {#field, [](void* call, PyObject* value) {                               \
     fields::read(value, &static_cast<Call*>(call)->tokens.field);         \
   }},
#define TOKENS_FIELDS(F)                                                   \
  F(x) F(dtype) F(x_stride) F(T) F(K) F(m) F(weights) F(example_ids) F(wide_ids) \
  F(tokens_per_example)

#define MIXED_LORA_FIELDS(F)                                               \
  TOKENS_FIELDS(TOKENS_FIELD)                                              \
  F(base_weight) F(base_stride) F(bias) F(lora_A) F(A_stride) F(lora_B) F(B_stride_m)      \
  F(B_stride_n) F(B_stride_r) F(float32_lora) F(N) F(r) F(base_splits) F(shrink_splits)    \
  F(y) F(u) F(device) F(stream)

#define MIXED_LINEAR_FIELDS(F)                                             \
  TOKENS_FIELDS(TOKENS_FIELD)                                              \
  F(expert_weight) F(expert_stride) F(row_stride) F(bias) F(N) F(splits) F(y) F(device)    \
  F(stream)

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("ARCHITECTURES") = std::vector<std::string>{CLP_CUDA_ARCHITECTURES};
  module.attr("BUILT_WITH") = CLP_BUILT_WITH;
  module.def("use_torch", &tensor::use_torch);
  module.def("sample_workspace", &clp::sample_cuda_workspace);
  CLP_BIND(module, "sample", Sample,
           CLP_SAMPLE_FIELDS(CLP_FIELD)
           CLP_FIELD(workspace) CLP_FIELD(device) CLP_FIELD(stream))
  CLP_BIND(module, "mixed_lora", MixedLora, MIXED_LORA_FIELDS(CLP_FIELD))
  CLP_BIND(module, "mixed_linear", MixedLinear, MIXED_LINEAR_FIELDS(CLP_FIELD))
}
