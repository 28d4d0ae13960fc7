#include "bindings/tensor.h"

#include <algorithm>
#include <string>

namespace tensor {

namespace {

// DLPack's DLPackExchangeAPI, version 1.
struct ExchangeTable {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*describe)(void* object, View* out);  // -1 with a Python exception set
  void* current_stream;
};
const ExchangeTable* table;

}  // namespace

Torch torch;

void use_torch(const py::dict& objects) {
  const auto own = [&](const char* name) { return py::object(objects[name]).release().ptr(); };
  const py::object capsule = py::object(objects["Tensor"]).attr("__dlpack_c_exchange_api__");
  table = static_cast<const ExchangeTable*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) throw py::error_already_set();
  if (table->major != 1) {
    throw py::import_error("PyTorch describes tensors by DLPack " + std::to_string(table->major) +
                           ", this build reads DLPack 1");
  }
  torch = {own("Tensor"),
           own("Parameter"),
           own("linear"),
           own("get_num_threads"),
           own("is_grad_enabled"),
           own("is_autocast_enabled"),
           own("mode_active"),
           own("float32"),
           own("bfloat16"),
           own("float16"),
           own("int64")};
}

bool describe(py::handle object, View* out) {
  if (!PyType_IsSubtype(Py_TYPE(object.ptr()), reinterpret_cast<PyTypeObject*>(torch.tensor))) {
    return false;
  }
  if (table->describe(object.ptr(), out) == 0) return out->data || out->count() == 0;
  // The two that DLPack and PyTorch raise for a tensor that cannot be described.
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError) && !PyErr_ExceptionMatches(PyExc_BufferError)) {
    throw py::error_already_set();
  }
  PyErr_Clear();
  return false;
}

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }

int num_threads() { return int(PyLong_AsLong(call(torch.num_threads).ptr())); }

int64_t View::count() const {
  int64_t product = 1;
  for (int i = 0; i < dims; ++i) product *= size[i];
  return product;
}

bool View::is_contiguous() const {
  if (count() == 0) return true;
  int64_t expected = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (size[i] != 1 && stride[i] != expected) return false;
    expected *= size[i];
  }
  return true;
}

bool View::is(int element_type, std::initializer_list<int64_t> sizes) const {
  return element() == element_type && dims == int(sizes.size()) &&
         std::equal(sizes.begin(), sizes.end(), size);
}

bool View::dtype(clp::DType* out) const {
  switch (element()) {
    case kFloat32:
      *out = clp::DType::kFloat32;
      return true;
    case kBFloat16:
      *out = clp::DType::kBFloat16;
      return true;
    case kFloat16:
      *out = clp::DType::kFloat16;
      return true;
  }
  return false;
}

}  // namespace tensor
