// slot_attention from the arguments of clp_kernels/ops/slot_attention/cpu.py, which calls it for every
// layer of a step, so the checks of its six tensors are here (docs/log.md, 2026-11-29).
#include <cmath>
#include <utility>

#include "bindings/tensor.h"
#include "cpu/slot_attention/slot_attention.h"

namespace {

namespace py = pybind11;
using tensor::View;

// None if shapes, dtypes, devices or layouts are not those that the Python function names.
py::object run(py::handle q, py::handle k, py::handle v, py::handle keys,
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
  a.keys = Ks.data, a.values = Vs.data, a.lengths = n.at<int64_t>(), a.out = out.data;
  a.first = first;
  a.scale = float(scale.is_none() ? std::pow(double(a.d), -0.5) : scale.cast<double>());
  a.window = window.is_none() ? 0 : window.cast<int64_t>();
  const int threads = tensor::num_threads();
  py::gil_scoped_release release;
  clp::slot_attention_cpu(a, threads, isa);
  return result;
}

}  // namespace

void bind_slot_attention(py::module_& module) { module.def("slot_attention", &run); }
