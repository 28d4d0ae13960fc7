// sample in one call (at_once.h): a row of 32,000 ids takes 60 us in the kernel.
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "bindings/at_once.h"
#include "shared/sample.h"

using namespace at_once;

namespace {

// An argument for each row: a number, or a tensor [B] of int64, or of float64 or float32.
template <class T>
class PerRow {
 public:
  // Null where the argument is a number that switches a filter off.
  const T* data = nullptr;

  // False where it is neither, or `good` says no to a value.
  template <class Good>
  bool read(PyObject* object, int64_t B, const T* off, const Good& good) {
    if (PyLong_CheckExact(object) || (std::is_floating_point_v<T> && PyFloat_CheckExact(object))) {
      const T value = number(object);
      if (off && value == *off) return true;
      store_.assign(size_t(B), value);
      data = store_.data();
      return good(value);
    }
    View view;
    if (!dense(object, false, &view) || view.dims != 1 || view.size[0] != B) return false;
    if (std::is_floating_point_v<T> && view.dtype == torch.dtypes[0]) {
      const float* const narrow = reinterpret_cast<const float*>(view.data);
      store_.assign(narrow, narrow + B);
      data = store_.data();
    } else if (view.dtype == (std::is_floating_point_v<T> ? torch.float64 : torch.int64)) {
      data = reinterpret_cast<const T*>(view.data);
    } else {
      return false;
    }
    for (int64_t b = 0; b < B; ++b) {
      if (!good(data[b])) return false;
    }
    return true;
  }

 private:
  static T number(PyObject* object) {
    T value;
    if constexpr (std::is_floating_point_v<T>) {
      value = T(PyFloat_AsDouble(object));
    } else {
      value = PyLong_AsLongLong(object);
    }
    if (PyErr_Occurred()) throw py::error_already_set();  // beyond 64 bits
    return value;
  }

  std::vector<T> store_;
};

py::object new_rows(PyObject* like, int64_t B, PyObject* dtype) {
  const py::object shape = py::make_tuple(B);
  const py::object function = owned(PyObject_GetAttr(like, torch.new_empty));
  PyObject* const arguments[] = {shape.ptr(), dtype};
  static PyObject* const names = PyTuple_Pack(1, torch.dtype);
  return owned(PyObject_Vectorcall(function.ptr(), arguments, 1, names));
}

py::object sample_at_once(py::handle logits, py::handle weights, py::handle mode,
                          py::handle temperature, py::handle top_k, py::handle top_p,
                          py::handle min_p, py::handle seed, py::handle position,
                          py::handle backend) try {
  if (!torch.tensor) throw std::logic_error("what is used was not given");
  const bool automatic = is(backend, "auto"), probability = is(mode, "probability");
  if (!automatic && !is(backend, "cpu")) return py::none();
  if (!probability && !is(mode, "geometric")) return py::none();
  if (!nobody_watches(automatic)) return py::none();
  View L, w;
  clp::DType dtype;
  // Nothing here is differentiated, so gradients are no hindrance.
  if (!dense(logits.ptr(), false, &L) || !code_of(L, &dtype)) return py::none();
  if (L.dims != (weights.is_none() ? 2 : 3)) return py::none();
  const int64_t m = L.dims == 3 ? L.size[0] : 1, B = L.size[L.dims - 2], V = L.size[L.dims - 1];
  if (!weights.is_none()) {
    if (!dense(weights.ptr(), false, &w) || w.dtype != torch.dtypes[0] || w.dims != 2 ||
        w.size[0] != B || w.size[1] != m) {
      return py::none();
    }
    const float* const rows = reinterpret_cast<const float*>(w.data);
    for (int64_t i = 0; i < B * m; ++i) {
      if (!std::isfinite(rows[i]) || (probability && rows[i] < 0.0f)) return py::none();
    }
  }
  PerRow<double> t, p, least;
  PerRow<int64_t> k, s, at;
  const int64_t no_k = 0;
  const double no_p = 1, no_least = 0;
  const auto any = [](int64_t) { return true; };
  if (!t.read(temperature.ptr(), B, nullptr, [](double x) { return x >= 0 && x < INFINITY; }) ||
      !k.read(top_k.ptr(), B, &no_k, [](int64_t x) { return x >= 0; }) ||
      !p.read(top_p.ptr(), B, &no_p, [](double x) { return x > 0 && x <= 1; }) ||
      !least.read(min_p.ptr(), B, &no_least, [](double x) { return x >= 0 && x <= 1; }) ||
      !s.read(seed.ptr(), B, nullptr, any) || !at.read(position.ptr(), B, nullptr, any)) {
    return py::none();
  }
  const py::object tokens = new_rows(logits.ptr(), B, torch.int64);
  const py::object logprobs = new_rows(logits.ptr(), B, torch.dtypes[0]);
  const py::object filtered = new_rows(logits.ptr(), B, torch.dtypes[0]);
  const clp::SampleArgs args{reinterpret_cast<const void*>(L.data),
                             dtype,
                             m,
                             B,
                             V,
                             B * V,
                             V,
                             reinterpret_cast<const float*>(w.data),
                             probability,
                             t.data,
                             s.data,
                             at.data,
                             k.data,
                             p.data,
                             least.data,
                             reinterpret_cast<int64_t*>(address(tokens.ptr())),
                             reinterpret_cast<float*>(address(logprobs.ptr())),
                             reinterpret_cast<float*>(address(filtered.ptr()))};
  const int threads = num_threads();
  {
    py::gil_scoped_release release;
    clp::sample_cpu(args, threads, "");
  }
  for (int64_t b = 0; b < B; ++b) {
    if (args.tokens[b] < 0) return py::none();  // the long way names the row
  }
  return py::make_tuple(tokens, logprobs, filtered);
} catch (py::error_already_set&) {
  return py::none();
}

}  // namespace

void bind_sample_at_once(py::module_& module) {
  module.def("sample_at_once", &sample_at_once);
}
