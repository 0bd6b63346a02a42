// What plain calls share: reading arguments, and allocating results. plain_calls.cpp says what a plain call is.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "feed_forward.h"
#include "norm.h"
#include "python_tensor.h"

namespace fastattn::plain {

bool is_true(PyObject* function);  // what it returns without arguments
pybind11::object attribute(PyObject* object, PyObject* name);

// Reads the arguments of one call and notices whether any wants a gradient.
class Reader {
 public:
  explicit Reader(PyObject* const* args) : args_(args), grad_enabled_(is_true(python.is_grad_enabled)) {}

  bool is_none(int at) const { return args_[at] == Py_None; }
  bool is_true_object(int at) const { return args_[at] == Py_True; }
  PyObject* object(int at) const { return args_[at]; }
  bool grad_enabled() const { return grad_enabled_; }
  bool wants_gradient() const { return wants_gradient_; }

  // False for what is no plain floating tensor.
  bool tensor(int at, TensorInfo* info);

  // False for what is no plain tensor of int64.
  bool integers(int at, TensorInfo* info);

  // The readers of numbers are false also for one that does not fit, which has then raised.
  bool finite(int at, double* value) const {
    PyObject* object = args_[at];
    if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
    *value = PyFloat_AsDouble(object);
    return !PyErr_Occurred() && std::isfinite(*value);
  }

  bool integer(int at, int64_t* value) const {
    if (!PyLong_CheckExact(args_[at])) return false;
    *value = PyLong_AsLongLong(args_[at]);
    return !PyErr_Occurred();
  }

  bool is_zero(int at) const {
    double value = 1;
    return finite(at, &value) && value == 0;
  }

  // A side of a window: sums of it with positions cannot overflow. None leaves `value` alone.
  bool side(int at, int64_t* value) const {
    constexpr int64_t kWidest = int64_t{1} << 61;
    return is_none(at) || (integer(at, value) && *value >= 0 && *value < kWidest);
  }

  // Whether a tuple of bools, such as `ctx.needs_input_grad`, is true at an index.
  bool flag(int at, int index) const {
    PyObject* flags = args_[at];
    return PyTuple_Check(flags) && index < PyTuple_GET_SIZE(flags) && PyTuple_GET_ITEM(flags, index) == Py_True;
  }

 private:
  PyObject* const* args_;
  const bool grad_enabled_;
  bool wants_gradient_ = false;
};

inline int64_t count(const TensorInfo& info) {
  int64_t n = 1;
  for (int i = 0; i < info.dims; ++i) n *= info.size[i];
  return n;
}

// Whether a result like this is there and small. For a large one allocation is more than a call (pages.h), and the time
// that Python takes is nothing beside the kernel's.
inline bool is_small(const TensorInfo& info) { return count(info) > 0 && count(info) <= 1 << 17; }

inline bool is_contiguous(const TensorInfo& info) {
  int64_t stride = 1;
  for (int i = info.dims - 1; i >= 0; stride *= info.size[i--]) {
    if (info.size[i] != 1 && info.stride[i] != stride) return false;
  }
  return true;
}

inline bool same_size(const TensorInfo& a, const TensorInfo& b) {
  if (a.dims != b.dims) return false;
  for (int i = 0; i < a.dims; ++i) {
    if (a.size[i] != b.size[i]) return false;
  }
  return true;
}

inline bool has_size(const TensorInfo& info, std::initializer_list<int64_t> size) {
  return info.dims == static_cast<int>(size.size()) && std::equal(size.begin(), size.end(), info.size);
}

// Whether `b` is another contiguous tensor of the shape and dtype of `a`.
inline bool is_like(const TensorInfo& a, const TensorInfo& b) {
  return same_size(a, b) && a.dtype == b.dtype && is_contiguous(b);
}

pybind11::object empty_like(PyObject* tensor);
pybind11::object empty(std::initializer_list<int64_t> size, DType dtype);

// What is left of a call's arguments after every check; false where it is not plain. The first arguments of a gradient
// are those of its op, so that both are read alike.
bool read_attention(Reader& read, AttentionProblem* problem);
bool read_norm(Reader& read, TensorInfo* input, NormArgs* args);
bool read_feed_forward(Reader& read, TensorInfo* input, FeedForwardProblem* problem);

// Each serves a call and sets its result, or returns false where that is not plain: plain_gradients.cpp.
bool attention_backward(Reader& read, pybind11::object* result);
bool softmax_backward(Reader& read, pybind11::object* result);
bool norm_backward(Reader& read, pybind11::object* result);
bool feed_forward_backward(Reader& read, pybind11::object* result);
bool embedding_backward(Reader& read, pybind11::object* result);

}  // namespace fastattn::plain
