// clp_kernels._cuda. Pointers and the stream come as integers; clp_kernels/native.py has checked
// what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "sample.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sample(uintptr_t logits, int dtype, int64_t m, int64_t B, int64_t V, int64_t stride_m,
            int64_t stride_b, uintptr_t weights, bool probability, uintptr_t temperature,
            uintptr_t seed, uintptr_t position, uintptr_t tokens, uintptr_t logprobs,
            uintptr_t workspace, int device, uintptr_t stream) {
  const clp::SampleArgs args{pointer<const void>(logits),
                             clp::DType(dtype),
                             m,
                             B,
                             V,
                             stride_m,
                             stride_b,
                             pointer<const float>(weights),
                             probability,
                             pointer<const float>(temperature),
                             pointer<const int64_t>(seed),
                             pointer<const int64_t>(position),
                             pointer<int64_t>(tokens),
                             pointer<float>(logprobs)};
  if (probability) throw std::invalid_argument("the CUDA kernel mixes geometrically only");
  py::gil_scoped_release release;
  const char* error =
      clp::sample_cuda(args, pointer<void>(workspace), device, pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("sample on CUDA: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("ARCHITECTURES") = std::vector<std::string>{CLP_CUDA_ARCHITECTURES};
  module.def("sample_workspace", &clp::sample_cuda_workspace);
  module.def("sample", &sample);
}
