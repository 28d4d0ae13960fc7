// PyTorch's tensors, read from C++ without a PyTorch header.
//
// torch.Tensor.__dlpack_c_exchange_api__ (from PyTorch 2.11 on) is a C table whose layout DLPack 1
// fixes. One call of it gives address, sizes and strides of a tensor, in 130 ns; Python has five
// attributes for them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "shared/dtype.h"

namespace tensor {

namespace py = pybind11;

// An element type: DLPack's type code in the high byte, bits in the low one.
enum Element : int {
  kInt64 = 0x0040, kFloat64 = 0x0240, kFloat32 = 0x0220, kBFloat16 = 0x0410, kFloat16 = 0x0210
};

// DLPack's DLTensor. What it points to belongs to the tensor.
struct View {
  void* data;  // null for a tensor without elements
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t type_code, bits;
  uint16_t vector_lanes;
  const int64_t *size, *stride;  // in elements
  uint64_t byte_offset;          // 0 in PyTorch's

  bool on_cpu() const { return device_type == 1; }
  int element() const { return type_code << 8 | bits; }
  int64_t count() const;
  bool is_contiguous() const;
  bool dtype(clp::DType* out) const;  // false if the kernels do not read it
  bool is(int element_type, std::initializer_list<int64_t> sizes) const;
  template <class T>
  T* at() const {
    return static_cast<T*>(data);
  }
};

// PyTorch's objects and native.mode_active, as clp_kernels/native.py passes them to use_torch.
struct Torch {
  PyObject *tensor, *parameter, *linear, *num_threads, *grad_enabled, *autocast_enabled,
      *mode_active, *float32, *bfloat16, *float16, *int64;
};
extern Torch torch;

// They live as long as the interpreter. Throws py::import_error for another DLPack than 1.
void use_torch(const py::dict& objects);

// False for an object that is not a tensor, for a tensor with elements but without memory for them
// (fake, zeros that are not stored), and for a layout, device or dtype that DLPack does not describe
// (sparse, meta, quantised).
bool describe(py::handle object, View* out);

// The result of a call of Python's C API. Throws py::error_already_set if it failed.
py::object owned(PyObject* result);
// function()
py::object call(PyObject* function);
// PyTorch's number of threads.
int num_threads();

}  // namespace tensor
