// Functions that fill a struct from keyword arguments, one for each field. The struct, its list of
// fields and the Python call name a field alike, so no two of twenty numbers can change places.
//
//   struct Call : clp::SomeArgs { void run() const; };
//   #define SOME_FIELDS(F) F(x) F(rows)
//   CLP_BIND(module, "some", Call, SOME_FIELDS(CLP_FIELD))
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/tensor.h"

namespace fields {

namespace py = pybind11;

inline void read(PyObject* value, bool* out) {
  *out = value == Py_True;
  if (!PyBool_Check(value)) throw py::type_error("a bool");
}
inline void read(PyObject* value, int64_t* out) { *out = PyLong_AsLongLong(value); }
inline void read(PyObject* value, int* out) { *out = int(PyLong_AsLong(value)); }
inline void read(PyObject* value, float* out) { *out = float(PyFloat_AsDouble(value)); }
inline void read(PyObject* value, const char** out) { *out = PyUnicode_AsUTF8(value); }
// A torch.dtype.
inline void read(PyObject* value, clp::DType* out) {
  const tensor::Torch& torch = tensor::torch;
  *out = value == torch.float32    ? clp::DType::kFloat32
         : value == torch.bfloat16 ? clp::DType::kBFloat16
                                   : clp::DType::kFloat16;
  if (*out == clp::DType::kFloat16 && value != torch.float16) throw py::type_error("float32, bfloat16 or float16");
}
// A tensor, None, or an address (of a CUDA stream).
template <class T>
void read(PyObject* value, T** out) {
  tensor::View view;
  if (value == Py_None) {
    *out = nullptr;
  } else if (PyLong_CheckExact(value)) {
    *out = static_cast<T*>(PyLong_AsVoidPtr(value));
  } else if (tensor::describe(value, &view)) {
    *out = static_cast<T*>(view.data);
  } else {
    throw py::type_error("a tensor with storage, or None");
  }
}

struct Field {
  const char* name;
  void (*set)(void* call, PyObject* value);
  PyObject* interned = nullptr;
};

// Sets every field of `call`, whose type the fields know.
inline void set_all(const char* function, const std::vector<Field>& fields, void* call,
                    PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  const auto fault = [&](const std::string& what) {
    return py::type_error(std::string(function) + "() " + what);
  };
  if (positional) throw fault("takes keyword arguments only");
  const size_t given = names ? size_t(PyTuple_GET_SIZE(names)) : 0;
  std::vector<bool> set(fields.size());
  for (size_t i = 0; i < given; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names, Py_ssize_t(i));
    size_t at = i;  // most calls keep the order of the list
    if (at >= fields.size() || fields[at].interned != name) {
      for (at = 0; at < fields.size() && PyUnicode_Compare(fields[at].interned, name); ++at) {
      }
    }
    if (at == fields.size()) throw fault("has no argument " + std::string(py::repr(name)));
    try {
      fields[at].set(call, values[i]);
    } catch (py::type_error& expected) {
      throw fault(std::string("needs ") + expected.what() + " as " + fields[at].name);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    set[at] = true;
  }
  for (size_t i = 0; given < fields.size() && i < fields.size(); ++i) {
    if (!set[i]) throw fault(std::string("needs the argument ") + fields[i].name);
  }
}

template <class Call>
struct Function {
  static inline std::vector<Field> fields;
  static inline PyMethodDef definition;

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional,
                        PyObject* names) {
    try {
      Call call;
      set_all(definition.ml_name, fields, &call, values, positional, names);
      py::gil_scoped_release release;
      call.run();
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    } catch (py::builtin_exception& error) {
      error.set_error();
      return nullptr;
    } catch (std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    } catch (std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }
};

// Adds a function of keyword arguments that calls Call::run without the interpreter's lock.
template <class Call>
void bind(py::module_& module, const char* name, std::vector<Field> fields) {
  using F = Function<Call>;
  for (Field& field : fields) field.interned = PyUnicode_InternFromString(field.name);
  F::fields = std::move(fields);
  F::definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&F::call)),
                   METH_FASTCALL | METH_KEYWORDS, nullptr};
  PyObject* const function = PyCFunction_NewEx(&F::definition, nullptr, nullptr);
  module.attr(name) = py::reinterpret_steal<py::object>(function);
}

#define CLP_FIELD(field) \
  {#field, [](void* call, PyObject* value) { \
     fields::read(value, &static_cast<Call*>(call)->field); \
   }},

#define CLP_BIND(module, name, CallType, ...)     \
  {                                               \
    using Call = CallType;                        \
    fields::bind<Call>(module, name, {__VA_ARGS__}); \
  }

}  // namespace fields
