// mixed_lora in one call (at_once.h): the low-rank part of one row takes 20 us in the kernel.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/at_once.h"
#include "cpu/mixed_lora/mixed_lora.h"

using namespace at_once;

namespace {

// What is taken, as clp_kernels/ops/mixed_lora/cpu.py says; nothing until it has.
struct Limits {
  // By clp::DType. work: rows times features up to which a call is taken; base_rows: rows up to which
  // the kernel runs the base product too.
  struct {
    int64_t work, base_rows;
  } of[3];
  int64_t base_size;  // elements of a base matrix from which on it does
} limits;

void set_limits(const py::dict& given) {
  limits.base_size = given["base_size"].cast<int64_t>();
  const char* const names[] = {"float32", "bfloat16", "float16"};
  for (int i = 0; i < 3; ++i) {
    const std::string name = names[i];
    limits.of[i] = {given[(name + "_work").c_str()].cast<int64_t>(),
                    given[(name + "_base_rows").c_str()].cast<int64_t>()};
  }
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
bool read_scaling(PyObject* scaling, bool recording, int64_t m,
                  std::vector<float>* out) {
  if (PyFloat_CheckExact(scaling) || PyLong_CheckExact(scaling)) {
    out->assign(size_t(m), float(PyFloat_AsDouble(scaling)));
  } else {
    View view;
    if (!dense(scaling, recording, &view)) return false;
    if (view.dtype != torch.dtypes[0] || view.dims != 1 || view.size[0] != m) return false;
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
                              py::handle backend, int invariant) try {
  if (!torch.tensor || !limits.base_size) throw std::logic_error("what is used was not given");
  const bool automatic = is(backend, "auto");
  if (invariant > 0 || !example_ids.is_none() || !(automatic || is(backend, "cpu"))) {
    return py::none();
  }
  if (!nobody_watches(automatic)) return py::none();
  const bool recording = call(torch.grad_enabled).ptr() == Py_True;
  View X, W, A, B, w, c;
  clp::DType x_dtype, lora_dtype;
  if (!dense(x.ptr(), recording, &X) || !plain(base_weight.ptr(), recording, &W) ||
      !dense(lora_A.ptr(), recording, &A) || !dense(lora_B.ptr(), recording, &B) ||
      !dense(weights.ptr(), recording, &w)) {
    return py::none();
  }
  PyObject* const float32 = torch.dtypes[0];
  if (!code_of(X, &x_dtype) || !code_of(A, &lora_dtype) || W.dtype != X.dtype ||
      B.dtype != A.dtype || w.dtype != float32 || (A.dtype != X.dtype && A.dtype != float32)) {
    return py::none();
  }
  if (X.dims < 2 || W.dims != 2 || A.dims != 3 || B.dims != 3 || w.dims != 2) return py::none();
  const int64_t K = X.size[X.dims - 1], N = W.size[0], m = A.size[0], r = A.size[1];
  int64_t T = 1;
  for (int i = 0; i + 1 < X.dims; ++i) T *= X.size[i];
  if (T * (K + N) > limits.of[int(x_dtype)].work || W.size[1] != K || A.size[2] != K ||
      B.size[0] != m || B.size[1] != N || B.size[2] != r || w.size[0] != X.size[0] ||
      w.size[1] != m) {
    return py::none();
  }
  if (!bias.is_none() && (!plain(bias.ptr(), recording, &c) || c.dtype != X.dtype ||
                          c.dims != 1 || c.size[0] != N)) {
    return py::none();
  }
  std::vector<float> factors;
  if (!read_scaling(scaling.ptr(), recording, m, &factors)) return py::none();
  const float* given = reinterpret_cast<const float*>(w.data);
  std::vector<float> rows(given, given + w.size[0] * m);
  bool native_base = T <= limits.of[int(x_dtype)].base_rows && K * N >= limits.base_size;
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
  native_base = native_base && any(B, lora_dtype) && dense(base_weight.ptr(), recording, &W) &&
                (bias.is_none() || dense(bias.ptr(), recording, &c));
  py::object y;
  if (native_base) {
    py::tuple shape(X.dims);
    for (int i = 0; i < X.dims; ++i) shape[size_t(i)] = py::int_(i + 1 < X.dims ? X.size[i] : N);
    y = owned(PyObject_CallMethodOneArg(x.ptr(), torch.new_empty, shape.ptr()));
  } else {
    y = owned(PyObject_CallFunctionObjArgs(torch.linear, x.ptr(), base_weight.ptr(), bias.ptr(),
                                           nullptr));
  }
  if (method(y.ptr(), torch.is_contiguous).ptr() != Py_True) return py::none();
  const uintptr_t out = address(y.ptr());
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
  const int threads = num_threads();
  {
    py::gil_scoped_release release;
    clp::mixed_lora_cpu(args, threads, "");
  }
  return y;
} catch (py::error_already_set&) {
  return py::none();
}

}  // namespace

void bind_mixed_lora_at_once(py::module_& module) {
  module.def("mixed_lora_at_once_limits", &set_limits);
  module.def("mixed_lora_at_once", &mixed_lora_at_once);
}
