// clp_kernels._cuda. Pointers and the stream come as integers; the launchers (clp_kernels/native.py
// and clp_kernels/cuda_*.py) have checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/mixed.h"
#include "shared/sample.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sample(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V, int64_t stride_m,
            int64_t stride_b, uintptr_t weights, bool probability, uintptr_t temperature,
            uintptr_t seed, uintptr_t position, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
            uintptr_t tokens, uintptr_t logprobs, uintptr_t filtered_logprobs, uintptr_t workspace,
            int device, uintptr_t stream) {
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
  const char* error =
      clp::sample_cuda(args, pointer<void>(workspace), device, pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("sample on CUDA: ") + error);
}

clp::MixedTokens mixed_tokens(uintptr_t x, int dtype, int64_t x_stride, int64_t T, int64_t K,
                              int64_t m, uintptr_t weights, uintptr_t example_ids, bool wide_ids,
                              int64_t tokens_per_example) {
  return {pointer<const void>(x),
          clp::DType(dtype),
          x_stride,
          T,
          K,
          m,
          pointer<const float>(weights),
          pointer<const void>(example_ids),
          wide_ids,
          tokens_per_example};
}

void mixed_lora(const clp::MixedTokens& tokens, uintptr_t base_weight, int64_t base_stride,
                uintptr_t bias, uintptr_t lora_A, int64_t A_stride, uintptr_t lora_B,
                int64_t B_stride_m, int64_t B_stride_n, int64_t B_stride_r, bool float32_lora,
                int64_t N, int64_t r, int base_splits, int shrink_splits, uintptr_t y, uintptr_t u,
                int device, uintptr_t stream) {
  const clp::MixedLoraCuda args{tokens,
                                pointer<const void>(base_weight),
                                base_stride,
                                pointer<const void>(bias),
                                pointer<const void>(lora_A),
                                A_stride,
                                pointer<const void>(lora_B),
                                B_stride_m,
                                B_stride_n,
                                B_stride_r,
                                float32_lora,
                                N,
                                r,
                                base_splits,
                                shrink_splits,
                                pointer<void>(y),
                                pointer<float>(u)};
  py::gil_scoped_release release;
  const char* error = clp::mixed_lora_cuda(args, device, pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("mixed_lora on CUDA: ") + error);
}

void mixed_linear(const clp::MixedTokens& tokens, uintptr_t expert_weight, int64_t expert_stride,
                  int64_t row_stride, uintptr_t bias, int64_t N, int splits, uintptr_t y,
                  int device, uintptr_t stream) {
  const clp::MixedLinearCuda args{tokens,
                                  pointer<const void>(expert_weight),
                                  expert_stride,
                                  row_stride,
                                  pointer<const void>(bias),
                                  N,
                                  splits,
                                  pointer<void>(y)};
  py::gil_scoped_release release;
  const char* error = clp::mixed_linear_cuda(args, device, pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("mixed_linear on CUDA: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("ARCHITECTURES") = std::vector<std::string>{CLP_CUDA_ARCHITECTURES};
  module.def("sample_workspace", &clp::sample_cuda_workspace);
  module.def("sample", &sample);
  py::class_<clp::MixedTokens>(module, "MixedTokens").def(py::init(&mixed_tokens));
  module.def("mixed_lora", &mixed_lora);
  module.def("mixed_linear", &mixed_linear);
}
