// mixed_lora from Python objects to the result in one call, for plain inputs.
//
// The low-rank part of one row takes 20 us in the kernel and, with the caches full of the layer's
// weights, 110 us in the Python of checks and dispatch (docs/log.md). So this function looks at the
// tensors from C. It never decides what an error is: whatever is not plain gets None, and
// clp_kernels.functional goes the long way, which computes it or says what is wrong.
//
// Still no PyTorch header: tensors are read through the attributes that Python reads.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "mixed_lora.h"

namespace py = pybind11;

namespace {

constexpr int kMaxDims = 8;

// PyTorch's objects, as clp_kernels/cpu_mixed_lora.py hands them over, and the names of attributes.
struct Torch {
  PyObject *tensor, *parameter, *linear, *num_threads, *grad_enabled, *autocast_enabled,
      *dispatch_modes, *interpreter;
  // In the order of clp::DType. work: rows times features up to which a call is taken; base_rows:
  // rows up to which the kernel runs the base product too.
  struct {
    PyObject* dtype;
    int64_t work, base_rows;
  } of[3];
  int64_t base_size;  // elements of a base matrix from which on it does
  PyObject *cpu, *shape, *dtype, *is_cpu, *requires_grad, *is_contiguous, *data_ptr, *new_empty;
};
Torch torch;  // empty until at_once_uses

// Its objects live as long as the interpreter.
void at_once_uses(const py::dict& given) {
  const auto keep = [&](const char* name) { return py::object(given[name]).release().ptr(); };
  torch = {keep("Tensor"),
           keep("Parameter"),
           keep("linear"),
           keep("get_num_threads"),
           keep("is_grad_enabled"),
           keep("is_autocast_enabled"),
           keep("dispatch_modes"),
           keep("interpreter"),
           {},
           given["base_size"].cast<int64_t>(),
           PyUnicode_InternFromString("cpu"),
           PyUnicode_InternFromString("shape"),
           PyUnicode_InternFromString("dtype"),
           PyUnicode_InternFromString("is_cpu"),
           PyUnicode_InternFromString("requires_grad"),
           PyUnicode_InternFromString("is_contiguous"),
           PyUnicode_InternFromString("data_ptr"),
           PyUnicode_InternFromString("new_empty")};
  const char* const names[] = {"float32", "bfloat16", "float16"};
  for (int i = 0; i < 3; ++i) {
    const std::string name = names[i];
    torch.of[i] = {keep(names[i]), given[(name + "_work").c_str()].cast<int64_t>(),
                   given[(name + "_base_rows").c_str()].cast<int64_t>()};
  }
}

// Throws error_already_set where the call failed.
py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
py::object get(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }
bool yes(PyObject* object, PyObject* name) { return get(object, name).ptr() == Py_True; }
py::object call(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }
py::object method(PyObject* object, PyObject* name) {
  return owned(PyObject_CallMethodNoArgs(object, name));
}

struct View {
  PyObject* dtype = nullptr;  // borrowed: dtypes are immortal
  int dims = 0;
  int64_t size[kMaxDims];
  uintptr_t data = 0;
};

// Reads a tensor; false where it is not a plain one on the CPU without a gradient to record.
bool plain(const Torch& t, PyObject* object, bool recording, View* out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != t.tensor && type != t.parameter) return false;
  if (!yes(object, t.is_cpu) || (recording && yes(object, t.requires_grad))) return false;
  const py::object shape = get(object, t.shape);
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims > kMaxDims) return false;
  out->dims = int(dims);
  for (Py_ssize_t i = 0; i < dims; ++i) {
    out->size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    if (out->size[i] < 1) return false;
  }
  out->dtype = get(object, t.dtype).ptr();
  return true;
}

// The same, and laid out densely: its address.
bool dense(const Torch& t, PyObject* object, bool recording, View* out) {
  if (!plain(t, object, recording, out)) return false;
  if (method(object, t.is_contiguous).ptr() != Py_True) return false;
  out->data = PyLong_AsUnsignedLongLong(method(object, t.data_ptr).ptr());
  return out->data != 0;
}

// No dispatch mode, functorch transform or autocast, and no other backend in the environment.
bool nobody_watches(const Torch& t, bool any_backend) {
  const char* named = any_backend ? std::getenv("CLP_KERNELS_BACKEND") : nullptr;
  if (named && std::strcmp(named, "auto") != 0 && std::strcmp(named, "cpu") != 0) return false;
  const py::object modes = call(t.dispatch_modes);
  return PyLong_AsLong(modes.ptr()) == 0 && call(t.interpreter).is_none() &&
         owned(PyObject_CallOneArg(t.autocast_enabled, t.cpu)).ptr() == Py_False;
}

// False where the tensor is of no dtype the kernel knows.
bool code_of(const Torch& t, const View& view, clp::DType* out) {
  for (int i = 0; i < 3; ++i) {
    if (view.dtype == t.of[i].dtype) {
      *out = clp::DType(i);
      return true;
    }
  }
  return false;
}

// Whether any element of a dense tensor is not zero; the first one mostly is.
bool any(const View& view, clp::DType dtype) {
  int64_t count = 1;
  for (int i = 0; i < view.dims; ++i) count *= view.size[i];
  const auto some = [&](auto* words, auto sign) {
    return std::any_of(words, words + count, [&](auto word) { return (word & ~sign) != 0; });
  };
  if (dtype == clp::DType::kFloat32) {
    return some(reinterpret_cast<const uint32_t*>(view.data), 0x80000000u);
  }
  return some(reinterpret_cast<const uint16_t*>(view.data), 0x8000u);
}

// m factors; false where `scaling` is neither a number nor a plain tensor [m].
bool read_scaling(const Torch& t, PyObject* scaling, bool recording, int64_t m,
                  std::vector<float>* out) {
  if (PyFloat_CheckExact(scaling) || PyLong_CheckExact(scaling)) {
    out->assign(size_t(m), float(PyFloat_AsDouble(scaling)));
  } else {
    View view;
    if (!dense(t, scaling, recording, &view)) return false;
    if (view.dtype != t.of[0].dtype || view.dims != 1 || view.size[0] != m) return false;
    const float* values = reinterpret_cast<const float*>(view.data);
    out->assign(values, values + m);
  }
  for (float value : *out) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

py::object mixed_lora_at_once(py::handle x, py::handle base_weight, py::handle lora_A,
                              py::handle lora_B, py::handle weights, py::handle scaling,
                              py::handle bias, py::handle example_ids,
                              const std::string& backend, int invariant) try {
  const Torch& t = torch;
  if (!t.tensor) throw std::logic_error("at_once_uses has not been called");
  if (invariant > 0 || !example_ids.is_none() || (backend != "auto" && backend != "cpu")) {
    return py::none();
  }
  if (!nobody_watches(t, backend == "auto")) return py::none();
  const bool recording = call(t.grad_enabled).ptr() == Py_True;
  View X, W, A, B, w, c;
  clp::DType x_dtype, lora_dtype;
  if (!dense(t, x.ptr(), recording, &X) || !plain(t, base_weight.ptr(), recording, &W) ||
      !dense(t, lora_A.ptr(), recording, &A) || !dense(t, lora_B.ptr(), recording, &B) ||
      !dense(t, weights.ptr(), recording, &w)) {
    return py::none();
  }
  PyObject* const float32 = t.of[0].dtype;
  if (!code_of(t, X, &x_dtype) || !code_of(t, A, &lora_dtype) || W.dtype != X.dtype ||
      B.dtype != A.dtype || w.dtype != float32 || (A.dtype != X.dtype && A.dtype != float32)) {
    return py::none();
  }
  if (X.dims < 2 || W.dims != 2 || A.dims != 3 || B.dims != 3 || w.dims != 2) return py::none();
  const int64_t K = X.size[X.dims - 1], N = W.size[0], m = A.size[0], r = A.size[1];
  int64_t T = 1;
  for (int i = 0; i + 1 < X.dims; ++i) T *= X.size[i];
  if (T * (K + N) > t.of[int(x_dtype)].work || W.size[1] != K || A.size[2] != K || B.size[0] != m || B.size[1] != N ||
      B.size[2] != r || w.size[0] != X.size[0] || w.size[1] != m) {
    return py::none();
  }
  if (!bias.is_none() && (!plain(t, bias.ptr(), recording, &c) || c.dtype != X.dtype ||
                          c.dims != 1 || c.size[0] != N)) {
    return py::none();
  }
  std::vector<float> factors;
  if (!read_scaling(t, scaling.ptr(), recording, m, &factors)) return py::none();
  const float* given = reinterpret_cast<const float*>(w.data);
  std::vector<float> rows(given, given + w.size[0] * m);
  bool native_base = T <= t.of[int(x_dtype)].base_rows && K * N >= t.base_size;
  for (size_t i = 0; i < rows.size(); i += size_t(m)) {
    bool zero = true;
    for (size_t j = 0; j < size_t(m); ++j) {
      if (!std::isfinite(rows[i + j])) return py::none();
      rows[i + j] *= factors[j];
      zero = zero && rows[i + j] == 0.0f;
    }
    native_base = native_base && !zero;
  }
  // What is the bare layer has the bits of F.linear.
  native_base = native_base && any(B, lora_dtype) && dense(t, base_weight.ptr(), recording, &W) &&
                (bias.is_none() || dense(t, bias.ptr(), recording, &c));
  py::object y;
  if (native_base) {
    py::tuple shape(X.dims);
    for (int i = 0; i < X.dims; ++i) shape[size_t(i)] = py::int_(i + 1 < X.dims ? X.size[i] : N);
    y = owned(PyObject_CallMethodOneArg(x.ptr(), t.new_empty, shape.ptr()));
  } else {
    y = owned(PyObject_CallFunctionObjArgs(t.linear, x.ptr(), base_weight.ptr(), bias.ptr(),
                                           nullptr));
  }
  if (method(y.ptr(), t.is_contiguous).ptr() != Py_True) return py::none();
  const uintptr_t out = PyLong_AsUnsignedLongLong(method(y.ptr(), t.data_ptr).ptr());
  std::vector<float> u(size_t(T * m * r));
  const clp::MixedLoraArgs args{reinterpret_cast<const void*>(X.data),
                                x_dtype,
                                K,
                                reinterpret_cast<const void*>(native_base ? W.data : 0),
                                reinterpret_cast<const void*>(native_base ? c.data : 0),
                                reinterpret_cast<const void*>(A.data),
                                reinterpret_cast<const void*>(B.data),
                                lora_dtype,
                                rows.data(),
                                nullptr,
                                false,
                                T / X.size[0],
                                reinterpret_cast<void*>(out),
                                N,
                                u.data(),
                                T,
                                K,
                                N,
                                m,
                                r};
  const long threads = PyLong_AsLong(call(t.num_threads).ptr());
  {
    py::gil_scoped_release release;
    clp::mixed_lora_cpu(args, int(threads), "");
  }
  return y;
} catch (py::error_already_set&) {
  return py::none();
}

}  // namespace

void bind_at_once(py::module_& module) {
  module.def("at_once_uses", &at_once_uses);
  module.def("mixed_lora_at_once", &mixed_lora_at_once);
}
