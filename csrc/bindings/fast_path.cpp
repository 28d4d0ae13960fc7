// A decoding call from the public arguments to the result in one function, for plain inputs.
//
// With the caches full of a model's weights, the checks and the dispatch of one call take 110 us in
// Python, and the kernels of one token 20 to 60 (docs/log.md, 2026-11-29). These functions decide no
// error: for everything that is unusual they return None, and clp_kernels/ops computes the result or
// raises.
#include "bindings/fast_path.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bindings/tensor.h"
#include "cpu/mixed_lora/mixed_lora.h"
#include "cpu/slot_attention/slot_attention.h"
#include "shared/sample.h"

namespace fast_path {
namespace {

namespace py = pybind11;
using tensor::torch;
using tensor::View;

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
py::object call(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }
int num_threads() { return int(PyLong_AsLong(call(torch.num_threads).ptr())); }

bool is(py::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) &&
         PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

// Whether the CPU backend runs a call with this `backend`, and neither a dispatch mode, a functorch
// transform nor autocast has to see it.
bool takes(py::handle backend) {
  if (is(backend, "auto")) {
    const char* const named = std::getenv("CLP_KERNELS_BACKEND");
    if (named && *named && std::strcmp(named, "auto") != 0 && std::strcmp(named, "cpu") != 0) {
      return false;
    }
  } else if (!is(backend, "cpu")) {
    return false;
  }
  static PyObject* const cpu = PyUnicode_InternFromString("cpu");
  return PyLong_AsLong(call(torch.dispatch_modes).ptr()) == 0 &&
         call(torch.interpreter).is_none() &&
         owned(PyObject_CallOneArg(torch.autocast_enabled, cpu)).ptr() == Py_False;
}

// Reads a tensor on the CPU; false if it is of a subclass, without elements or in need of a gradient.
bool plain(py::handle object, bool recording, View* out) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (recording && py::bool_(object.attr("requires_grad"))) return false;
  return describe(object, out) && out->on_cpu() && out->data;
}
bool dense(py::handle object, bool recording, View* out) {
  return plain(object, recording, out) && out->is_contiguous();
}

template <class T>
T* data(const View& view) {
  return static_cast<T*>(view.data);
}

// One value per row, from a number or a dense tensor [count]: of int64, of float32, or of float64 if
// T is double. False if it is neither, or `good` rejects a value.
template <class T, class Good>
bool read_rows(py::handle object, bool recording, int64_t count, std::vector<T>* out,
               const Good& good) {
  View view;
  if (PyFloat_CheckExact(object.ptr()) && std::is_floating_point_v<T>) {
    out->assign(size_t(count), T(PyFloat_AS_DOUBLE(object.ptr())));
  } else if (PyLong_CheckExact(object.ptr())) {
    int overflow;
    out->assign(size_t(count), T(PyLong_AsLongLongAndOverflow(object.ptr(), &overflow)));
    if (overflow) return false;
  } else if (!dense(object, recording, &view)) {
    return false;
  } else if (std::is_floating_point_v<T> && view.is(tensor::kFloat32, {count})) {
    out->assign(data<float>(view), data<float>(view) + count);
  } else if (view.is(std::is_same_v<T, double> ? tensor::kFloat64 : tensor::kInt64, {count}) &&
             !std::is_same_v<T, float>) {
    out->assign(data<T>(view), data<T>(view) + count);
  } else {
    return false;
  }
  return std::all_of(out->begin(), out->end(), good);
}

const auto is_finite = [](float x) { return std::isfinite(x); };

// --- mixed_lora -------------------------------------------------------------------------------

// Of one dtype, by clp::DType: rows times features up to which a call is taken, and rows up to which
// the kernel runs the base product too (clp_kernels/ops/mixed_lora/cpu.py).
struct Limits {
  int64_t work, base_rows;
};

bool has_bare_rows(py::handle weights, py::handle lora_B) {
  View w, B;
  clp::DType dtype;
  if (!describe(weights, &w) || !describe(lora_B, &B) || !B.dtype(&dtype)) {
    throw py::type_error("weights and lora_B must be tensors");
  }
  return clp::has_bare_rows(data<float>(w), w.size[0], w.size[1], B.data, dtype, B.count());
}

py::object mixed_lora(const std::array<Limits, 3>& limits, int64_t base_size, py::handle x,
                      py::handle base_weight, py::handle lora_A, py::handle lora_B,
                      py::handle weights, py::handle scaling, py::handle bias,
                      py::handle example_ids, py::handle backend, int invariant) {
  if (invariant > 0 || !example_ids.is_none() || !takes(backend)) return py::none();
  const bool recording = call(torch.grad_enabled).ptr() == Py_True;
  View X, W, A, B, w, c{};
  clp::DType x_dtype, lora_dtype;
  if (!dense(x, recording, &X) || !plain(base_weight, recording, &W) ||
      !dense(lora_A, recording, &A) || !dense(lora_B, recording, &B) ||
      !dense(weights, recording, &w) || !(bias.is_none() || plain(bias, recording, &c)) ||
      !X.dtype(&x_dtype) || !A.dtype(&lora_dtype) || X.dims < 2 ||
      W.dims != 2 || A.dims != 3) {
    return py::none();
  }
  const int64_t K = X.size[X.dims - 1], N = W.size[0], m = A.size[0], r = A.size[1];
  const int64_t batch = X.size[0], T = X.count() / K;
  const Limits& limit = limits[size_t(x_dtype)];
  if (T * (K + N) > limit.work || !W.is(X.element(), {N, K}) ||
      !(lora_dtype == x_dtype || lora_dtype == clp::DType::kFloat32) ||
      !A.is(A.element(), {m, r, K}) || !B.is(A.element(), {m, N, r}) ||
      !w.is(tensor::kFloat32, {batch, m}) || !(bias.is_none() || c.is(X.element(), {N}))) {
    return py::none();
  }
  std::vector<float> factors, scaled(data<float>(w), data<float>(w) + batch * m);
  if (!read_rows(scaling, recording, m, &factors, is_finite) ||
      !std::all_of(scaled.begin(), scaled.end(), is_finite)) {
    return py::none();
  }
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] *= factors[i % size_t(m)];
  const bool whole = T <= limit.base_rows && K * N >= base_size && W.is_contiguous() &&
                     c.is_contiguous() &&
                     !clp::has_bare_rows(scaled.data(), batch, m, B.data, lora_dtype, B.count());
  py::object y;
  if (whole) {
    py::tuple shape(X.dims);
    for (int i = 0; i < X.dims; ++i) shape[size_t(i)] = py::int_(i + 1 < X.dims ? X.size[i] : N);
    y = x.attr("new_empty")(shape);
  } else {
    y = owned(PyObject_CallFunctionObjArgs(torch.linear, x.ptr(), base_weight.ptr(), bias.ptr(),
                                           nullptr));
  }
  View Y;
  if (!dense(y, false, &Y)) return py::none();
  std::vector<float> u(size_t(T * m * r));
  clp::MixedLoraArgs args{};
  args.x = X.data;
  args.x_dtype = x_dtype;
  args.x_stride = K;
  if (whole) args.base_weight = W.data;
  if (whole) args.bias = c.data;
  args.lora_A = A.data;
  args.lora_B = B.data;
  args.lora_dtype = lora_dtype;
  args.weights = scaled.data();
  args.tokens_per_example = T / batch;
  args.y = Y.data;
  args.y_stride = N;
  args.u = u.data();
  args.T = T, args.K = K, args.N = N, args.m = m, args.r = r;
  const int threads = num_threads();
  py::gil_scoped_release release;
  clp::mixed_lora_cpu(args, threads, "");
  return y;
}

// --- sample -----------------------------------------------------------------------------------

py::object sample(py::handle logits, py::handle weights, py::handle mode, py::handle temperature,
                  py::handle top_k, py::handle top_p, py::handle min_p, py::handle seed,
                  py::handle position, py::handle backend) {
  const bool probability = is(mode, "probability");
  if (!(probability || is(mode, "geometric")) || !takes(backend)) return py::none();
  View L, w{};
  clp::SampleArgs args{};
  // Nothing here is differentiated, so it does not matter whether gradients are recorded.
  if (!dense(logits, false, &L) || !L.dtype(&args.dtype) ||
      L.dims != (weights.is_none() ? 2 : 3)) {
    return py::none();
  }
  const int64_t m = L.dims == 3 ? L.size[0] : 1, B = L.size[L.dims - 2], V = L.size[L.dims - 1];
  const auto usable = [&](float x) { return std::isfinite(x) && !(probability && x < 0.0f); };
  if (!weights.is_none() &&
      !(dense(weights, false, &w) && w.is(tensor::kFloat32, {B, m}) &&
        std::all_of(data<float>(w), data<float>(w) + B * m, usable))) {
    return py::none();
  }
  std::vector<double> t, p, least;
  std::vector<int64_t> k, s, at;
  const auto any = [](int64_t) { return true; };
  const auto share = [](double x) { return x >= 0 && x <= 1; };
  if (!read_rows(temperature, false, B, &t, [](double x) { return x >= 0 && x < INFINITY; }) ||
      !read_rows(top_k, false, B, &k, [](int64_t x) { return x >= 0; }) ||
      !read_rows(top_p, false, B, &p, [](double x) { return x > 0 && x <= 1; }) ||
      !read_rows(min_p, false, B, &least, share) || !read_rows(seed, false, B, &s, any) ||
      !read_rows(position, false, B, &at, any)) {
    return py::none();
  }
  // A filter that is off for all rows has no rows.
  const auto rows_of = [](const auto& values, auto off) {
    const bool filters = std::any_of(values.begin(), values.end(), [&](auto x) { return x != off; });
    return filters ? values.data() : nullptr;
  };
  static PyObject* const int64 = torch.int64, *const float32 = torch.float32;
  const auto empty = [&](PyObject* dtype, View* out) {
    py::object rows = logits.attr("new_empty")(B, py::arg("dtype") = py::handle(dtype));
    describe(rows, out);
    return rows;
  };
  View views[3];
  const py::object tokens = empty(int64, views), logprobs = empty(float32, views + 1),
                   filtered = empty(float32, views + 2);
  args.logits = L.data;
  args.m = m, args.B = B, args.V = V, args.stride_m = B * V, args.stride_b = V;
  args.weights = data<float>(w);
  args.probability = probability;
  args.temperature = t.data();
  args.seed = s.data();
  args.position = at.data();
  args.top_k = rows_of(k, 0);
  args.top_p = rows_of(p, 1.0);
  args.min_p = rows_of(least, 0.0);
  args.tokens = data<int64_t>(views[0]);
  args.logprobs = data<float>(views[1]);
  args.filtered_logprobs = data<float>(views[2]);
  const int threads = num_threads();
  {
    py::gil_scoped_release release;
    clp::sample_cpu(args, threads, "");
  }
  // The normal path raises for a row without a token.
  if (std::any_of(args.tokens, args.tokens + B, [](int64_t token) { return token < 0; })) {
    return py::none();
  }
  return py::make_tuple(tokens, logprobs, filtered);
}

// --- slot_attention ---------------------------------------------------------------------------

// The arguments of clp_kernels/ops/slot_attention/cpu.py. None if their shapes, dtypes or layouts are
// not those that it names.
py::object slot_attention(py::handle q, py::handle k, py::handle v, py::handle keys,
                          py::handle values, py::handle lengths, int64_t first, py::handle scale,
                          py::handle window, const char* isa) {
  View Q, K, V, Ks, Vs, n, out;
  clp::SlotAttentionArgs a{};
  for (const auto& [object, view] : {std::pair(q, &Q), {k, &K}, {v, &V}, {keys, &Ks},
                                     {values, &Vs}, {lengths, &n}}) {
    if (!describe(object, view) || !view->on_cpu()) return py::none();
  }
  if (!Q.dtype(&a.dtype) || Q.dims != 4 || Ks.dims != 4 || Vs.dims != 4) {
    return py::none();
  }
  const int type = Q.element();
  a.B = Q.size[0], a.H = Q.size[1], a.d = Q.size[3], a.dv = Vs.size[3];
  a.slots = Ks.size[0], a.heads = Ks.size[1], a.capacity = Ks.size[2];
  if (!Q.is(type, {a.B, a.H, 1, a.d}) || !K.is(type, {a.B, a.heads, 1, a.d}) ||
      !V.is(type, {a.B, a.heads, 1, a.dv}) || !n.is(tensor::kInt64, {a.B}) || !n.is_contiguous() ||
      !Ks.is(type, {a.slots, a.heads, a.capacity, a.d}) || !Ks.is_contiguous() ||
      !Vs.is(type, {a.slots, a.heads, a.capacity, a.dv}) || !Vs.is_contiguous() ||
      a.heads == 0 || a.H % a.heads != 0 ||
      (a.d > 1 && !(Q.stride[3] == 1 && K.stride[3] == 1)) || (a.dv > 1 && V.stride[3] != 1)) {
    return py::none();
  }
  const py::object result = q.attr("new_empty")(py::make_tuple(a.B, 1, a.H, a.dv));
  if (!describe(result, &out)) return py::none();
  a.q = Q.data, a.q_row = Q.stride[0], a.q_head = Q.stride[1];
  a.k = K.data, a.k_row = K.stride[0], a.k_head = K.stride[1];
  a.v = V.data, a.v_row = V.stride[0], a.v_head = V.stride[1];
  a.keys = Ks.data, a.values = Vs.data, a.lengths = data<int64_t>(n), a.out = out.data;
  a.first = first;
  a.scale = float(scale.is_none() ? std::pow(double(a.d), -0.5) : scale.cast<double>());
  a.window = window.is_none() ? 0 : window.cast<int64_t>();
  const int threads = num_threads();
  py::gil_scoped_release release;
  clp::slot_attention_cpu(a, threads, isa);
  return result;
}

}  // namespace

void bind(py::module_& module) {
  module.def("mixed_lora_has_bare_rows", &has_bare_rows);
  module.def("mixed_lora_fast_path", [](std::array<int64_t, 3> work,
                                        std::array<int64_t, 3> base_rows, int64_t base_size) {
    std::array<Limits, 3> limits;
    for (size_t i = 0; i < 3; ++i) limits[i] = {work[i], base_rows[i]};
    return py::cpp_function([=](py::handle x, py::handle base_weight, py::handle lora_A,
                                py::handle lora_B, py::handle weights, py::handle scaling,
                                py::handle bias, py::handle ids, py::handle backend, int invariant) {
      return mixed_lora(limits, base_size, x, base_weight, lora_A, lora_B, weights, scaling, bias,
                        ids, backend, invariant);
    });
  });
  module.def("sample_fast_path", &sample);
  module.def("slot_attention", &slot_attention);
}

}  // namespace fast_path
