// clp_kernels._cpu. Pointers come as integers; clp_kernels/native.py has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/at_once.h"
#include "cpu/isa.h"
#include "cpu/linear_logprob/linear_logprob.h"
#include "cpu/mix_logits/mix_logits.h"
#include "cpu/mixed_linear/mixed_linear.h"
#include "cpu/mixed_lora/mixed_lora.h"
#include "shared/philox.h"
#include "shared/sample.h"
#include "cpu/sample/isa.h"
#include "cpu/slot_attention/slot_attention.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sample(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V, int64_t stride_m,
            int64_t stride_b, uintptr_t weights, bool probability, uintptr_t temperature,
            uintptr_t seed, uintptr_t position, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
            uintptr_t tokens, uintptr_t logprobs, uintptr_t filtered_logprobs, int num_threads,
            const std::string& isa) {
  const clp::SampleArgs args{pointer<const void>(logits),
                             clp::DType(dtype),
                             m,
                             B,
                             V,
                             stride_m,
                             stride_b,
                             pointer<const float>(weights),
                             probability,
                             pointer<const double>(temperature),
                             pointer<const int64_t>(seed),
                             pointer<const int64_t>(position),
                             pointer<const int64_t>(top_k),
                             pointer<const double>(top_p),
                             pointer<const double>(min_p),
                             pointer<int64_t>(tokens),
                             pointer<float>(logprobs),
                             pointer<float>(filtered_logprobs)};
  py::gil_scoped_release release;
  clp::sample_cpu(args, num_threads, isa.c_str());
}

void mixed_lora(uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t base_weight,
                uintptr_t bias, uintptr_t lora_A, uintptr_t lora_B, int lora_dtype,
                uintptr_t weights, uintptr_t example_ids, bool wide_ids,
                int64_t tokens_per_example, uintptr_t y, int64_t y_stride, uintptr_t u, int64_t T,
                int64_t K, int64_t N, int64_t m, int64_t r, int num_threads, const std::string& isa) {
  const clp::MixedLoraArgs args{pointer<const void>(x),
                                clp::DType(x_dtype),
                                x_stride,
                                pointer<const void>(base_weight),
                                pointer<const void>(bias),
                                pointer<const void>(lora_A),
                                pointer<const void>(lora_B),
                                clp::DType(lora_dtype),
                                pointer<const float>(weights),
                                pointer<const void>(example_ids),
                                wide_ids,
                                tokens_per_example,
                                pointer<void>(y),
                                y_stride,
                                pointer<float>(u),
                                T,
                                K,
                                N,
                                m,
                                r};
  py::gil_scoped_release release;
  clp::mixed_lora_cpu(args, num_threads, isa.c_str());
}

void mixed_linear(uintptr_t x, int64_t x_stride, uintptr_t expert_weight, uintptr_t bias,
                  int dtype, uintptr_t weights, uintptr_t example_ids, bool wide_ids,
                  int64_t tokens_per_example, uintptr_t y, int64_t T, int64_t K, int64_t N,
                  int64_t m, int num_threads, const std::string& isa) {
  const clp::MixedLinearArgs args{pointer<const void>(x),
                                  x_stride,
                                  pointer<const void>(expert_weight),
                                  pointer<const void>(bias),
                                  clp::DType(dtype),
                                  pointer<const float>(weights),
                                  pointer<const void>(example_ids),
                                  wide_ids,
                                  tokens_per_example,
                                  pointer<void>(y),
                                  T,
                                  K,
                                  N,
                                  m};
  py::gil_scoped_release release;
  clp::mixed_linear_cpu(args, num_threads, isa.c_str());
}

void linear_logprob(uintptr_t logits, uintptr_t ref_logits, int64_t n, int64_t C, int64_t first,
                    uintptr_t targets, uintptr_t temperature, bool gradient, uintptr_t state,
                    uintptr_t factor, uintptr_t moved, int num_threads, const std::string& isa) {
  static_assert(sizeof(clp::LogprobState) == 8 * sizeof(double));
  const clp::LogprobArgs args{pointer<float>(logits),
                              pointer<float>(ref_logits),
                              n,
                              C,
                              first,
                              pointer<const int64_t>(targets),
                              pointer<const float>(temperature),
                              gradient,
                              pointer<clp::LogprobState>(state),
                              pointer<float>(factor),
                              pointer<float>(moved)};
  py::gil_scoped_release release;
  clp::linear_logprob_cpu(args, num_threads, isa.c_str());
}

void linear_logprob_backward(uintptr_t logits, uintptr_t ref_logits, int64_t n, int64_t C,
                             int64_t first, uintptr_t targets, uintptr_t temperature,
                             uintptr_t state, uintptr_t d_logprobs, uintptr_t d_entropy,
                             uintptr_t d_kl, int num_threads, const std::string& isa) {
  const clp::LogprobBackwardArgs args{pointer<float>(logits),
                                      pointer<float>(ref_logits),
                                      n,
                                      C,
                                      first,
                                      pointer<const int64_t>(targets),
                                      pointer<const float>(temperature),
                                      pointer<const clp::LogprobState>(state),
                                      pointer<const float>(d_logprobs),
                                      pointer<const float>(d_entropy),
                                      pointer<const float>(d_kl)};
  py::gil_scoped_release release;
  clp::linear_logprob_backward_cpu(args, num_threads, isa.c_str());
}

clp::MixArgs mix_args(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V,
                      int64_t stride_m, int64_t stride_b, uintptr_t weights, bool probability) {
  return {pointer<const void>(logits),   clp::DType(dtype), m, B, V, stride_m, stride_b,
          pointer<const float>(weights), probability};
}

void mix_logits(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V, int64_t stride_m,
                int64_t stride_b, uintptr_t weights, bool probability, uintptr_t z,
                int num_threads, const std::string& isa) {
  const clp::MixArgs args =
      mix_args(logits, dtype, m, B, V, stride_m, stride_b, weights, probability);
  py::gil_scoped_release release;
  clp::mix_logits_cpu(args, pointer<void>(z), num_threads, isa.c_str());
}

void mix_logits_backward(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V,
                         int64_t stride_m, int64_t stride_b, uintptr_t weights, bool probability,
                         uintptr_t dz, uintptr_t d_logits, uintptr_t d_weights, int num_threads,
                         const std::string& isa) {
  const clp::MixArgs args =
      mix_args(logits, dtype, m, B, V, stride_m, stride_b, weights, probability);
  py::gil_scoped_release release;
  clp::mix_logits_backward_cpu(args, pointer<const void>(dz), pointer<void>(d_logits),
                               pointer<float>(d_weights), num_threads, isa.c_str());
}

void slot_attention(uintptr_t q, int64_t q_row, int64_t q_head, uintptr_t k, int64_t k_row,
                    int64_t k_head, uintptr_t v, int64_t v_row, int64_t v_head, uintptr_t keys,
                    uintptr_t values, int dtype, uintptr_t lengths, int64_t slots, int64_t first,
                    int64_t B, int64_t H, int64_t heads, int64_t capacity, int64_t d, int64_t dv,
                    float scale, int64_t window, uintptr_t out, int num_threads,
                    const std::string& isa) {
  const clp::SlotAttentionArgs args{pointer<const void>(q),
                                    pointer<const void>(k),
                                    pointer<const void>(v),
                                    q_row,
                                    q_head,
                                    k_row,
                                    k_head,
                                    v_row,
                                    v_head,
                                    pointer<void>(keys),
                                    pointer<void>(values),
                                    clp::DType(dtype),
                                    pointer<const int64_t>(lengths),
                                    slots,
                                    first,
                                    B,
                                    H,
                                    heads,
                                    capacity,
                                    d,
                                    dv,
                                    scale,
                                    window,
                                    pointer<void>(out)};
  py::gil_scoped_release release;
  clp::slot_attention_cpu(args, num_threads, isa.c_str());
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

void bind_mixed_lora_at_once(py::module_& module);
void bind_sample_at_once(py::module_& module);

PYBIND11_MODULE(_cpu, module) {
  module.def("at_once_uses", &at_once::uses);
  bind_mixed_lora_at_once(module);
  bind_sample_at_once(module);
  module.def("isa", [] { return clp::isa_name(clp::resolve_isa("")); });
  module.def("isas", &clp::supported_isas);
  module.def("sample", &sample);
  module.def("mixed_lora", &mixed_lora);
  module.def("mixed_linear", &mixed_linear);
  module.def("linear_logprob", &linear_logprob);
  module.def("linear_logprob_backward", &linear_logprob_backward);
  module.def("mix_logits", &mix_logits);
  module.def("mix_logits_backward", &mix_logits_backward);
  module.def("slot_attention", &slot_attention);
  module.def("philox", &philox);
  module.def("uniform", &uniform);
  module.def("exp2", &exp2_each);
  module.def("exponential", &exponential_each);
}
