// Tensors read from C through the attributes that Python reads: no PyTorch header is needed.
//
// With the caches full of a model's weights, the Python of checks and dispatch takes 110 us, more
// than the kernels of one row (docs/log.md). So <op>_at_once takes the public arguments and goes from
// Python objects to the result in one call, for plain inputs. It never decides what an error is:
// whatever is not plain gets None, and clp_kernels.ops.functional goes the long way, which computes it
// or says what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "shared/dtype.h"

namespace at_once {

namespace py = pybind11;

constexpr int kMaxDims = 8;

// PyTorch's objects, as clp_kernels/native.py hands them over, and the names of attributes.
struct Torch {
  PyObject *tensor, *parameter, *linear, *num_threads, *grad_enabled, *autocast_enabled,
      *dispatch_modes, *interpreter, *int64, *float64;
  PyObject* dtypes[3];  // in the order of clp::DType
  PyObject *cpu, *shape, *dtype, *is_cpu, *requires_grad, *is_contiguous, *data_ptr, *new_empty;
};
extern Torch torch;  // empty until `uses`

// Its objects live as long as the interpreter.
void uses(const py::dict& given);

// Throws error_already_set where the call failed.
py::object owned(PyObject* result);
py::object call(PyObject* function);
py::object method(PyObject* object, PyObject* name);

struct View {
  PyObject* dtype = nullptr;  // borrowed: dtypes are immortal
  int dims = 0;
  int64_t size[kMaxDims];
  uintptr_t data = 0;
};

// Reads a tensor; false where it is not a plain one on the CPU with an element, or a gradient has to be
// recorded.
bool plain(PyObject* object, bool recording, View* out);

// The same, and laid out densely: its address.
bool dense(PyObject* object, bool recording, View* out);

// Whether an object is this string.
bool is(py::handle object, const char* text);

// The address of a tensor that is known to be dense.
uintptr_t address(PyObject* tensor);

// No dispatch mode, functorch transform or autocast, and no other backend in the environment.
bool nobody_watches(bool any_backend);

// False where the tensor is of no dtype the kernels know.
bool code_of(const View& view, clp::DType* out);

int num_threads();

}  // namespace at_once
