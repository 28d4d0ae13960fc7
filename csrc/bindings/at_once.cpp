#include "bindings/at_once.h"

#include <cstdlib>
#include <cstring>

namespace at_once {

Torch torch;

void uses(const py::dict& given) {
  const auto keep = [&](const char* name) { return py::object(given[name]).release().ptr(); };
  torch = {keep("Tensor"),
           keep("Parameter"),
           keep("linear"),
           keep("get_num_threads"),
           keep("is_grad_enabled"),
           keep("is_autocast_enabled"),
           keep("dispatch_modes"),
           keep("interpreter"),
           keep("int64"),
           keep("float64"),
           {keep("float32"), keep("bfloat16"), keep("float16")},
           PyUnicode_InternFromString("cpu"),
           PyUnicode_InternFromString("shape"),
           PyUnicode_InternFromString("dtype"),
           PyUnicode_InternFromString("is_cpu"),
           PyUnicode_InternFromString("requires_grad"),
           PyUnicode_InternFromString("is_contiguous"),
           PyUnicode_InternFromString("data_ptr"),
           PyUnicode_InternFromString("new_empty")};
}

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
py::object call(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }
py::object method(PyObject* object, PyObject* name) {
  return owned(PyObject_CallMethodNoArgs(object, name));
}
static py::object get(PyObject* object, PyObject* name) {
  return owned(PyObject_GetAttr(object, name));
}
static bool yes(PyObject* object, PyObject* name) { return get(object, name).ptr() == Py_True; }

bool is(py::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) &&
         PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

uintptr_t address(PyObject* tensor) {
  return PyLong_AsUnsignedLongLong(method(tensor, torch.data_ptr).ptr());
}

bool plain(PyObject* object, bool recording, View* out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (!yes(object, torch.is_cpu) || (recording && yes(object, torch.requires_grad))) return false;
  const py::object shape = get(object, torch.shape);
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims > kMaxDims) return false;
  out->dims = int(dims);
  for (Py_ssize_t i = 0; i < dims; ++i) {
    out->size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    if (out->size[i] < 1) return false;
  }
  out->dtype = get(object, torch.dtype).ptr();
  return true;
}

bool dense(PyObject* object, bool recording, View* out) {
  if (!plain(object, recording, out)) return false;
  if (method(object, torch.is_contiguous).ptr() != Py_True) return false;
  out->data = address(object);
  return out->data != 0;
}

bool nobody_watches(bool any_backend) {
  const char* named = any_backend ? std::getenv("CLP_KERNELS_BACKEND") : nullptr;
  // An empty value is as none.
  if (named && *named && std::strcmp(named, "auto") != 0 && std::strcmp(named, "cpu") != 0) return false;
  const py::object modes = call(torch.dispatch_modes);
  return PyLong_AsLong(modes.ptr()) == 0 && call(torch.interpreter).is_none() &&
         owned(PyObject_CallOneArg(torch.autocast_enabled, torch.cpu)).ptr() == Py_False;
}

bool code_of(const View& view, clp::DType* out) {
  for (int i = 0; i < 3; ++i) {
    if (view.dtype == torch.dtypes[i]) {
      *out = clp::DType(i);
      return true;
    }
  }
  return false;
}

int num_threads() { return int(PyLong_AsLong(call(torch.num_threads).ptr())); }

}  // namespace at_once
