// mixed_lora and sample from the public arguments to the result in one call, for plain inputs.
//
// With the caches full of a model's weights, checks and dispatch take 110 us per call in Python, the
// kernel of one token 20 to 60 (docs/log.md, 2026-11-29). These functions decide no error: for
// everything that is unusual they return None, and clp_kernels/ops computes the result or raises.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/tensor.h"
#include "cpu/mixed_lora/mixed_lora.h"
#include "shared/sample.h"

namespace {

namespace py = pybind11;
using namespace tensor;

bool is(py::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) &&
         PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

// Whether the CPU backend runs a call with this `backend`, and no dispatch mode, functorch transform
// or autocast has to see it.
bool takes(py::handle backend) {
  const char* const variable = std::getenv("CLP_KERNELS_BACKEND");
  const std::string named = variable && is(backend, "auto") ? variable : "";
  if (!(named.empty() || named == "auto" || named == "cpu")) return false;
  static PyObject* const cpu = PyUnicode_InternFromString("cpu");
  return (is(backend, "auto") || is(backend, "cpu")) &&
         call(torch.mode_active).ptr() == Py_False &&
         owned(PyObject_CallOneArg(torch.autocast_enabled, cpu)).ptr() == Py_False;
}

// Reads a tensor on the CPU; false if it is of a subclass, without elements, or needs a gradient.
bool plain(py::handle object, bool recording, View* out) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (recording && py::bool_(object.attr("requires_grad"))) return false;
  return describe(object, out) && out->on_cpu() && out->data;
}
bool dense(py::handle object, bool recording, View* out) {
  return plain(object, recording, out) && out->is_contiguous();
}

// One value per row, from a number or from a dense tensor [count] of int64 (T int64_t), float32 (T
// float or double) or float64 (T double). False if it is neither, or `good` rejects a value.
template <class T, class Good>
bool read_rows(py::handle object, bool recording, int64_t count, std::vector<T>* out,
               const Good& good) {
  constexpr bool floating = std::is_floating_point_v<T>;
  constexpr int element = std::is_same_v<T, double> ? kFloat64 : floating ? kFloat32 : kInt64;
  View view;
  int overflow = 0;
  if (floating && PyFloat_CheckExact(object.ptr())) {
    out->assign(size_t(count), T(PyFloat_AS_DOUBLE(object.ptr())));
  } else if (PyLong_CheckExact(object.ptr())) {
    out->assign(size_t(count), T(PyLong_AsLongLongAndOverflow(object.ptr(), &overflow)));
  } else if (!dense(object, recording, &view)) {
    return false;
  } else if (view.is(element, {count})) {
    out->assign(view.at<T>(), view.at<T>() + count);
  } else if (floating && view.is(kFloat32, {count})) {
    out->assign(view.at<float>(), view.at<float>() + count);
  } else {
    return false;
  }
  return !overflow && std::all_of(out->begin(), out->end(), good);
}

// Of mixed_lora, from clp_kernels/ops/mixed_lora/cpu.py: tokens from which and up to which the kernel
// runs the base product too, and those up to which it runs the adapters of other calls.
struct Limits {
  int64_t first, whole, adapters;
};

// For sizes that were measured: dtypes of x and of the adapters, in, out, m r, threads.
std::map<std::array<int64_t, 6>, Limits> measured;

// For the others, by clp::DType: tokens times features for the adapters, tokens for the base
// product, and the elements of a base matrix from which on it is the kernel's.
struct Rule {
  std::array<int64_t, 3> work, base_tokens;
  int64_t base_size;
  std::array<bool, 3> products;  // whether PyTorch's products run at full speed, of any size
} rule;

Limits limits_of(clp::DType x, clp::DType lora, int64_t K, int64_t N, int64_t R, int threads) {
  if (!measured.empty()) {
    const auto found = measured.find({int64_t(x), int64_t(lora), K, N, R, threads});
    if (found != measured.end()) return found->second;
  }
  const int64_t adapters = rule.work[size_t(x)] / (K + N);
  return {1, K * N >= rule.base_size ? std::min(rule.base_tokens[size_t(x)], adapters) : 0,
          adapters};
}

py::object linear(py::handle x, py::handle weight, py::handle bias) {
  return owned(
      PyObject_CallFunctionObjArgs(torch.linear, x.ptr(), weight.ptr(), bias.ptr(), nullptr));
}

// y += z B^T by PyTorch's products, with what lies between them here; y is contiguous. As
// _add_low_rank_by_products in clp_kernels/ops/mixed_lora/cpu.py.
void add_by_products(py::handle x, py::handle lora_A, py::handle y, clp::MixedLoraArgs args,
                     int64_t bytes, int threads) {
  const int64_t R = args.m * args.r;
  View U, Z, S;
  const auto of_rank = [&] {
    return x.attr("new_empty")(py::make_tuple(args.T, R),
                               py::arg("dtype") = py::handle(torch.float32));
  };
  py::object z = of_rank(), stacked = x.attr("new_empty")(args.N, R), u;
  if (args.x_dtype == clp::DType::kFloat32) {
    u = linear(x, lora_A.attr("view")(R, args.K), py::none());
  } else {
    u = of_rank();
  }
  describe(u, &U), describe(z, &Z), describe(stacked, &S);
  {
    py::gil_scoped_release release;
    args.u = U.at<float>();
    const clp::StackArgs stack{args.lora_B, S.data, bytes, args.m, args.N, args.r};
    if (args.x_dtype != clp::DType::kFloat32) {
      args.lora_B = nullptr;
      clp::mixed_lora_cpu(args, threads, "");
    }
    clp::mix_rank({args.u, args.weights, nullptr, false, args.tokens_per_example, Z.at<float>(),
                   args.T, args.m, args.r});
    clp::stack(stack);
  }
  if (args.x_dtype != clp::DType::kFloat32) z = z.attr("to")(x.attr("dtype"));
  y.attr("view")(args.T, args.N).attr("addmm_")(z, stacked.attr("t")());
}

py::object mixed_lora(py::handle x, py::handle base_weight, py::handle lora_A, py::handle lora_B,
                      py::handle weights, py::handle scaling, py::handle bias,
                      py::handle example_ids, py::handle backend, int invariant) {
  if (invariant > 0 || !example_ids.is_none() || !takes(backend)) return py::none();
  const bool recording = call(torch.grad_enabled).ptr() == Py_True;
  View X, W, A, B, w, c{}, Y;
  clp::MixedLoraArgs args{};
  if (!dense(x, recording, &X) || !plain(base_weight, recording, &W) ||
      !dense(lora_A, recording, &A) || !dense(lora_B, recording, &B) ||
      !dense(weights, recording, &w) || !(bias.is_none() || plain(bias, recording, &c)) ||
      !X.dtype(&args.x_dtype) || !A.dtype(&args.lora_dtype) || X.dims < 2 || W.dims != 2 ||
      A.dims != 3) {
    return py::none();
  }
  const int64_t K = X.size[X.dims - 1], N = W.size[0], m = A.size[0], r = A.size[1];
  const int64_t batch = X.size[0], T = X.count() / K;
  const int type = X.element(), lora_type = A.element();
  const int threads = num_threads();
  const Limits limits = limits_of(args.x_dtype, args.lora_dtype, K, N, m * r, threads);
  const bool products = rule.products[size_t(args.x_dtype)] && lora_type == type;
  if ((T > std::max(limits.whole, limits.adapters) && !products) || !W.is(type, {N, K}) ||
      !(lora_type == type || lora_type == kFloat32) || !A.is(lora_type, {m, r, K}) ||
      !B.is(lora_type, {m, N, r}) || !w.is(kFloat32, {batch, m}) ||
      !(bias.is_none() || c.is(type, {N}))) {
    return py::none();
  }
  const auto finite = [](float value) { return std::isfinite(value); };
  std::vector<float> factors, scaled(w.at<float>(), w.at<float>() + batch * m);
  if (!read_rows(scaling, recording, m, &factors, finite) ||
      !std::all_of(scaled.begin(), scaled.end(), finite)) {
    return py::none();
  }
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] *= factors[i % size_t(m)];
  const bool by_products = products && T > limits.adapters;
  const bool whole = limits.first <= T && T <= limits.whole && W.is_contiguous() &&
                     c.is_contiguous();
  // Of many tokens those without adapters are sorted out where errors are decided.
  const bool bare = (whole || by_products) &&
                    clp::has_bare_rows(scaled.data(), batch, m, B.data, args.lora_dtype, B.count());
  py::object y;
  if (whole && !bare) {
    args.base_weight = W.data;
    args.bias = c.data;
    py::tuple shape(X.dims);
    for (int i = 0; i < X.dims; ++i) shape[size_t(i)] = py::int_(i + 1 < X.dims ? X.size[i] : N);
    y = x.attr("new_empty")(shape);
  } else if (by_products ? bare : T > limits.adapters) {
    return py::none();
  } else {
    y = linear(x, base_weight, bias);
  }
  if (!dense(y, false, &Y)) return py::none();
  args.x = X.data, args.x_stride = K;
  args.lora_A = A.data, args.lora_B = B.data;
  args.weights = scaled.data(), args.tokens_per_example = T / batch;
  args.y = Y.data, args.y_stride = N;
  args.T = T, args.K = K, args.N = N, args.m = m, args.r = r;
  if (!args.base_weight && by_products) {
    add_by_products(x, lora_A, y, args, type == kFloat32 ? 4 : 2, threads);
    return y;
  }
  std::vector<float> u(size_t(T * m * r));
  args.u = u.data();
  py::gil_scoped_release release;
  clp::mixed_lora_cpu(args, threads, "");
  return y;
}

// Whether the base product of these weights and adapters must be F.linear's.
bool has_bare_rows(py::handle weights, py::handle lora_B) {
  View w, B;
  clp::DType dtype;
  if (!describe(weights, &w) || w.dims != 2 || w.element() != kFloat32 || !describe(lora_B, &B) ||
      !B.dtype(&dtype)) {
    throw py::type_error("weights [B, m] in float32 and lora_B must be tensors with storage");
  }
  return clp::has_bare_rows(w.at<float>(), w.size[0], w.size[1], B.data, dtype, B.count());
}

py::object sample(py::handle logits, py::handle weights, py::handle mode, py::handle temperature,
                  py::handle top_k, py::handle top_p, py::handle min_p, py::handle seed,
                  py::handle position, py::handle backend) {
  clp::SampleArgs args{};
  args.probability = is(mode, "probability");
  if (!(args.probability || is(mode, "geometric")) || !takes(backend)) return py::none();
  View L, w{};
  // Nothing is differentiated here, so it does not matter whether gradients are recorded.
  if (!dense(logits, false, &L) || !L.dtype(&args.dtype) ||
      L.dims != (weights.is_none() ? 2 : 3)) {
    return py::none();
  }
  const int64_t m = L.dims == 3 ? L.size[0] : 1, B = L.size[L.dims - 2], V = L.size[L.dims - 1];
  const auto usable = [&](float value) {
    return std::isfinite(value) && !(args.probability && value < 0.0f);
  };
  if (!weights.is_none() && !(dense(weights, false, &w) && w.is(kFloat32, {B, m}) &&
                              std::all_of(w.at<float>(), w.at<float>() + B * m, usable))) {
    return py::none();
  }
  std::vector<double> t, p, least;
  std::vector<int64_t> k, s, n;
  const auto any = [](int64_t) { return true; };
  if (!read_rows(temperature, false, B, &t, [](double x) { return x >= 0 && x < INFINITY; }) ||
      !read_rows(top_k, false, B, &k, [](int64_t x) { return x >= 0; }) ||
      !read_rows(top_p, false, B, &p, [](double x) { return x > 0 && x <= 1; }) ||
      !read_rows(min_p, false, B, &least, [](double x) { return x >= 0 && x <= 1; }) ||
      !read_rows(seed, false, B, &s, any) || !read_rows(position, false, B, &n, any)) {
    return py::none();
  }
  // Null for a filter that is off for all rows.
  const auto rows_of = [](const auto& values, auto off) {
    const bool on = std::any_of(values.begin(), values.end(), [=](auto x) { return x != off; });
    return on ? values.data() : nullptr;
  };
  const auto empty = [&](PyObject* dtype, auto** data) {
    View view;
    py::object rows = logits.attr("new_empty")(B, py::arg("dtype") = py::handle(dtype));
    describe(rows, &view);
    *data = view.at<std::remove_reference_t<decltype(**data)>>();
    return rows;
  };
  const py::tuple outputs = py::make_tuple(empty(torch.int64, &args.tokens),
                                           empty(torch.float32, &args.logprobs),
                                           empty(torch.float32, &args.filtered_logprobs));
  args.logits = L.data, args.m = m, args.B = B, args.V = V;
  args.stride_m = B * V, args.stride_b = V;
  args.weights = w.at<float>();
  args.temperature = t.data(), args.seed = s.data(), args.position = n.data();
  args.top_k = rows_of(k, 0), args.top_p = rows_of(p, 1.0), args.min_p = rows_of(least, 0.0);
  const int threads = num_threads();
  {
    py::gil_scoped_release release;
    clp::sample_cpu(args, threads, "");
  }
  // If a row has no token, the normal path raises.
  const bool drawn = std::all_of(args.tokens, args.tokens + B, [](int64_t x) { return x >= 0; });
  return drawn ? py::object(outputs) : py::none();
}

}  // namespace

void bind_fast_path(py::module_& module) {
  module.def("set_mixed_lora_rule", [](std::array<int64_t, 3> work,
                                       std::array<int64_t, 3> base_tokens, int64_t base_size,
                                       std::array<bool, 3> products) {
    rule = {work, base_tokens, base_size, products};
  });
  module.def("set_mixed_lora_limits", [](std::map<std::array<int64_t, 6>,
                                                  std::array<int64_t, 3>> limits) {
    measured.clear();
    for (const auto& [size, tokens] : limits) measured[size] = {tokens[0], tokens[1], tokens[2]};
  });
  module.def("mixed_lora_has_bare_rows", &has_bare_rows);
  module.def("mixed_lora_fast_path", &mixed_lora);
  module.def("sample_fast_path", &sample);
}
