// clp_kernels._cpu. The functions bound by fields.h rely on the checks that the public ops make:
// shapes, devices and layouts of the tensors are not looked at again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/sample_fields.h"
#include "cpu/isa.h"
#include "cpu/linear_logprob/linear_logprob.h"
#include "cpu/mix_logits/mix_logits.h"
#include "cpu/mixed_linear/mixed_linear.h"
#include "cpu/mixed_lora/mixed_lora.h"
#include "cpu/sample/isa.h"
#include "shared/philox.h"

namespace py = pybind11;

namespace {

template <class Args, void (*kernel)(const Args&, int, const char*)>
struct OnThreads : Args {
  int num_threads;
  const char* isa;
  void run() const { kernel(*this, num_threads, isa); }
};

template <class Args, void (*kernel)(const Args&)>
struct OnOneThread : Args {
  void run() const { kernel(*this); }
};

#define CLP_CPU(module, op, Args, FIELDS)                                                   \
  {                                                                                         \
    using Call = OnThreads<clp::Args, clp::op##_cpu>;                                       \
    fields::bind<Call>(module, #op,                                                         \
                       {FIELDS(CLP_FIELD) CLP_FIELD(num_threads) CLP_FIELD(isa)});          \
  }

#define MIXED_LORA_FIELDS(F)                                                                  \
  F(x) F(x_dtype) F(x_stride) F(base_weight) F(bias) F(lora_A) F(lora_B) F(lora_dtype)      \
  F(weights) F(example_ids) F(wide_ids) F(tokens_per_example) F(y) F(y_stride) F(u) F(T)    \
  F(K) F(N) F(m) F(r)

#define MIX_RANK_FIELDS(F)                                                                    \
  F(u) F(weights) F(example_ids) F(wide_ids) F(tokens_per_example) F(z) F(T) F(m) F(r)
#define STACK_FIELDS(F) F(lora_B) F(stacked) F(bytes) F(m) F(N) F(r)

#define MIXED_LINEAR_FIELDS(F)                                                                \
  F(x) F(x_stride) F(expert_weight) F(bias) F(dtype) F(weights) F(example_ids) F(wide_ids)  \
  F(tokens_per_example) F(y) F(T) F(K) F(N) F(m)

#define LOGPROB_FIELDS(F)                                                                     \
  F(logits) F(ref_logits) F(n) F(C) F(first) F(targets) F(temperature) F(state)
#define LOGPROB_FORWARD_FIELDS(F) LOGPROB_FIELDS(F) F(gradient) F(factor) F(moved)
#define LOGPROB_BACKWARD_FIELDS(F) LOGPROB_FIELDS(F) F(d_logprobs) F(d_entropy) F(d_kl)

#define MIX_FIELDS(F) \
  F(logits) F(dtype) F(m) F(B) F(V) F(stride_m) F(stride_b) F(weights) F(probability)
#define MIX_FORWARD_FIELDS(F) MIX_FIELDS(F) F(z)
#define MIX_BACKWARD_FIELDS(F) MIX_FIELDS(F) F(dz) F(d_logits) F(d_weights)

// For tests: `count` values at the addresses of arrays.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void uniform(int64_t seed, int64_t position, int64_t count, uintptr_t out,
             const std::string& isa) {
  clp::sample_kernels(clp::resolve_isa(isa)).uniform(seed, position, count, pointer<double>(out));
}

void exp2_each(uintptr_t y, int64_t count, uintptr_t out, const std::string& isa) {
  clp::sample_kernels(clp::resolve_isa(isa)).exp2(pointer<const float>(y), count,
                                                  pointer<float>(out));
}

void exponential_each(uintptr_t d, int64_t count, uintptr_t out, const std::string& isa) {
  clp::sample_kernels(clp::resolve_isa(isa)).exponential(pointer<const float>(d), count,
                                                         pointer<float>(out));
}

py::tuple philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const clp::Philox4 out = clp::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}},
                                              key[0], key[1]);
  return py::make_tuple(out.x[0], out.x[1], out.x[2], out.x[3]);
}

}  // namespace

void bind_fast_path(py::module_& module);
void bind_slot_attention(py::module_& module);

PYBIND11_MODULE(_cpu, module) {
  module.attr("BUILT_WITH") = CLP_BUILT_WITH;
  module.def("use_torch", &tensor::use_torch);
  module.def("isa", [] { return clp::isa_name(clp::resolve_isa("")); });
  module.def("isas", &clp::supported_isas);
  CLP_CPU(module, sample, SampleArgs, CLP_SAMPLE_FIELDS)
  CLP_CPU(module, mixed_lora, MixedLoraArgs, MIXED_LORA_FIELDS)
  {
    using Call = OnOneThread<clp::MixRankArgs, clp::mix_rank>;
    fields::bind<Call>(module, "mixed_lora_mix", {MIX_RANK_FIELDS(CLP_FIELD)});
  }
  {
    using Call = OnOneThread<clp::StackArgs, clp::stack>;
    fields::bind<Call>(module, "mixed_lora_stack", {STACK_FIELDS(CLP_FIELD)});
  }
  CLP_CPU(module, mixed_linear, MixedLinearArgs, MIXED_LINEAR_FIELDS)
  CLP_CPU(module, linear_logprob, LogprobArgs, LOGPROB_FORWARD_FIELDS)
  CLP_CPU(module, linear_logprob_backward, LogprobBackwardArgs, LOGPROB_BACKWARD_FIELDS)
  CLP_CPU(module, mix_logits, MixLogitsArgs, MIX_FORWARD_FIELDS)
  CLP_CPU(module, mix_logits_backward, MixLogitsBackwardArgs, MIX_BACKWARD_FIELDS)
  bind_fast_path(module);
  bind_slot_attention(module);
  module.def("philox", &philox);
  module.def("uniform", &uniform);
  module.def("exp2", &exp2_each);
  module.def("exponential", &exponential_each);
}
