// A plain call in one step: every check of fastattn.spec that it could fail, the allocation of its result, the launch.
// That takes 2 us, where Python takes 10, and is all that a call on tiny tensors costs.
//
// Plain is a call on dense CPU tensors of at most four dimensions, laid out as they usually are, that nobody would
// watch or change between the caller and the kernel: no mode, transform, trace, profiler, autocast or subclass.
// Whatever is not, be it wrong or only unusual, is declined: the long way, through fastattn.spec and the dispatcher,
// serves it or says what is wrong with it. So no message is written here, and nothing that is declined has had an
// effect.
#include "plain_calls.h"

#include <cmath>
#include <memory>
#include <new>

#include "attention_forward.h"
#include "feed_forward.h"
#include "isa.h"
#include "lines.h"
#include "norm.h"
#include "python_tensor.h"
#include "softmax.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// What is left of a call: its result, or who is to serve it.
enum class Outcome {
  kDone,
  kDeclined,  // Python gets None
  kGradient,  // everything is right, but an argument wants a gradient: Python gets True
};

bool is_true(PyObject* function) {
  const auto result = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  if (!result) throw py::error_already_set();
  return PyObject_IsTrue(result.ptr()) != 0;
}

py::object attribute(PyObject* object, PyObject* name) {
  auto result = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!result) throw py::error_already_set();
  return result;
}

// Whether the op would meet nobody: `_registry._is_plain_eager` and `_dispatch.needs_reference_derivatives`.
bool is_plain_eager() {
  if (is_true(python.dispatch_modes) || is_true(python.function_modes) || is_true(python.autocast) ||
      is_true(python.functorch) || is_true(python.tracing_state)) {
    return false;
  }
  return attribute(python.profiler, python.profiler_flag).ptr() == Py_False &&
         PyLong_AsLong(attribute(python.forward_ad, python.forward_ad_level).ptr()) < 0;
}

// Reads the arguments of one call and notices whether any wants a gradient.
class Reader {
 public:
  explicit Reader(PyObject* const* args) : args_(args), grad_enabled_(is_true(python.is_grad_enabled)) {}

  bool is_none(int at) const { return args_[at] == Py_None; }
  PyObject* object(int at) const { return args_[at]; }

  // False for what is no plain floating tensor.
  bool tensor(int at, TensorInfo* info) {
    PyObject* object = args_[at];
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != python.tensor_type && type != python.parameter_type) return false;
    if (attribute(object, python.is_cpu).ptr() != Py_True) return false;
    if (attribute(object, python.layout).ptr() != python.strided) return false;
    *info = read_tensor(object);
    if (grad_enabled_) wants_gradient_ |= attribute(object, python.requires_grad).ptr() == Py_True;
    // What is no float reads as float32.
    return info->dtype != DType::kFloat32 || attribute(object, python.dtype).ptr() == python.dtypes[0];
  }

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

  Outcome unless_gradient() const { return wants_gradient_ ? Outcome::kGradient : Outcome::kDone; }

 private:
  PyObject* const* args_;
  const bool grad_enabled_;
  bool wants_gradient_ = false;
};

int64_t count(const TensorInfo& info) {
  int64_t n = 1;
  for (int i = 0; i < info.dims; ++i) n *= info.size[i];
  return n;
}

// Whether a result like this is there and small. For a large one allocation is more than a call (pages.h), and the time
// that Python takes is nothing beside the kernel's.
bool is_small(const TensorInfo& info) { return count(info) > 0 && count(info) <= 1 << 17; }

bool is_contiguous(const TensorInfo& info) {
  int64_t stride = 1;
  for (int i = info.dims - 1; i >= 0; stride *= info.size[i--]) {
    if (info.size[i] != 1 && info.stride[i] != stride) return false;
  }
  return true;
}

bool same_size(const TensorInfo& a, const TensorInfo& b) {
  if (a.dims != b.dims) return false;
  for (int i = 0; i < a.dims; ++i) {
    if (a.size[i] != b.size[i]) return false;
  }
  return true;
}

py::object empty_like(PyObject* tensor) {
  auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(python.empty_like, tensor));
  if (!result) throw py::error_already_set();
  return result;
}

// attention(query, key, value, left, right, bottom_right, softmax_scale, dropout_p, grouped) -> out; left, right and
// softmax_scale may be None, as in masks.Window and ops.attention; `grouped` lets query heads share a key head.
Outcome attention(Reader& read, py::object* result) {
  TensorInfo q, k, v;
  if (!read.tensor(0, &q) || !read.tensor(1, &k) || !read.tensor(2, &v)) return Outcome::kDeclined;
  AttentionForwardArgs args;
  AttentionProblem& p = args.problem;
  bool plain = set_operands(q, k, v, &p) && p.head_dim_v == p.head_dim && is_small(q) && count(v) > 0 &&
               q.stride[3] == 1 && k.stride[3] == 1 && v.stride[3] == 1;
  // empty_like keeps the order of the query's dimensions, its last one innermost.
  for (int i = 0; i < 3; ++i) plain = plain && (q.size[i] == 1 || q.stride[i] >= p.head_dim);
  if (!plain) return Outcome::kDeclined;

  const int64_t offset = read.object(5) == Py_True ? p.seq_len_k - p.seq_len_q : 0;
  int64_t left = 0, right = 0;
  if (!read.side(3, &left) || !read.side(4, &right)) return Outcome::kDeclined;
  if (!read.is_none(3)) p.mask.diag_lo = offset - left;
  if (!read.is_none(4)) p.mask.diag_hi = offset + right;
  p.softmax_scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (!read.is_none(6) && !read.finite(6, &p.softmax_scale)) return Outcome::kDeclined;
  if (!read.is_zero(7) || (read.object(8) != Py_True && p.num_heads_q != p.num_heads_kv)) return Outcome::kDeclined;
  if (read.unless_gradient() != Outcome::kDone) return Outcome::kGradient;

  *result = empty_like(read.object(0));
  args.out = to_view(read_tensor(*result));
  const std::unique_ptr<double[]> lse(new double[static_cast<size_t>(p.batch * p.num_heads_q * p.seq_len_q)]);
  args.lse = lse.get();
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(attention_forward, args);
  return Outcome::kDone;
}

// softmax(input, dim, scale, log) -> out
Outcome softmax(Reader& read, py::object* result) {
  TensorInfo input;
  int64_t dim = 0;
  SoftmaxArgs args;
  const bool plain = read.tensor(0, &input) && is_contiguous(input) && is_small(input) && read.integer(1, &dim) &&
                     dim >= -input.dims && dim < input.dims && read.finite(2, &args.scale);
  if (!plain) return Outcome::kDeclined;
  if (read.unless_gradient() != Outcome::kDone) return Outcome::kGradient;

  *result = empty_like(read.object(0));
  args.lines = make_lines({input.size, input.size + input.dims}, static_cast<int>(dim < 0 ? dim + input.dims : dim),
                          {input.stride, input.stride + input.dims}, {});
  args.input = input.data;
  args.out = read_pointer<void>(*result);
  args.input_dtype = args.out_dtype = input.dtype;
  args.log = read.object(3) == Py_True;
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(softmax, args);
  return Outcome::kDone;
}

// norm(input, weight, bias, residual, eps, rms) -> out, or (out, total) with a residual; weight, bias and residual may
// be None.
Outcome norm(Reader& read, py::object* result) {
  TensorInfo input, weight, bias, residual;
  NormArgs args;
  if (!read.tensor(0, &input) || !is_contiguous(input) || !is_small(input)) return Outcome::kDeclined;
  const auto parameter = [&](int at, TensorInfo* info, View* view) {
    if (!read.tensor(at, info) || !is_contiguous(*info) || info->dims == 0 || info->dims > input.dims) return false;
    for (int i = 1; i <= info->dims; ++i) {
      if (info->size[info->dims - i] != input.size[input.dims - i]) return false;
    }
    *view = {info->data, info->dtype, {}};
    // A kernel accumulates in one type.
    return (info->dtype == DType::kFloat64) == (input.dtype == DType::kFloat64);
  };
  const bool has_weight = !read.is_none(1), has_bias = !read.is_none(2), has_residual = !read.is_none(3);
  if (has_weight && !parameter(1, &weight, &args.weight)) return Outcome::kDeclined;
  if (has_bias && !parameter(2, &bias, &args.bias)) return Outcome::kDeclined;
  if (has_weight && has_bias && !same_size(weight, bias)) return Outcome::kDeclined;
  if (has_residual && (!read.tensor(3, &residual) || !is_contiguous(residual) || !same_size(residual, input) ||
                       residual.dtype != input.dtype)) {
    return Outcome::kDeclined;
  }
  const bool plain = input.dims > 0 && read.finite(4, &args.shape.eps) && args.shape.eps >= 0;
  if (!plain) return Outcome::kDeclined;
  if (read.unless_gradient() != Outcome::kDone) return Outcome::kGradient;

  args.shape.columns = has_weight ? count(weight) : has_bias ? count(bias) : input.size[input.dims - 1];
  args.shape.rows = count(input) / args.shape.columns;
  args.shape.rms = read.object(5) == Py_True;
  args.input = {input.data, input.dtype, {args.shape.columns, 1}};
  const auto out = empty_like(read.object(0));
  args.out = read_pointer<void>(out);
  if (has_residual) {
    const auto total = empty_like(read.object(0));
    args.residual = {residual.data, residual.dtype, {args.shape.columns, 1}};
    args.total = read_pointer<void>(total);
    *result = py::make_tuple(out, total);
  } else {
    *result = out;
  }
  const size_t rows = static_cast<size_t>(args.shape.rows);
  const std::unique_ptr<double[]> statistics(new double[2 * rows]);  // room for either type
  args.mean = statistics.get();
  args.rstd = statistics.get() + rows;
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(norm, args);
  return Outcome::kDone;
}

// feed_forward(input, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, dropout_p) -> out;
// the biases and the gate may be None.
Outcome feed_forward(Reader& read, py::object* result) {
  TensorInfo input, weight_in, weight_out;
  const bool readable = read.tensor(0, &input) && read.tensor(1, &weight_in) && read.tensor(5, &weight_out) &&
                        is_contiguous(input) && input.dims > 0 && weight_in.dims == 2 && weight_out.dims == 2;
  if (!readable || input.dtype == DType::kFloat64) return Outcome::kDeclined;
  FeedForwardArgs args;
  FeedForwardProblem& p = args.problem;
  p.dtype = input.dtype;
  p.model_dim = input.size[input.dims - 1];
  p.ff_dim = weight_in.size[0];
  p.out_dim = weight_out.size[0];
  const auto matrix = [&](const TensorInfo& info, int64_t rows, int64_t columns, Matrix* to) {
    *to = {info.data, info.stride[0]};
    return info.dims == 2 && info.dtype == p.dtype && info.size[0] == rows && info.size[1] == columns &&
           (columns == 1 || info.stride[1] == 1);
  };
  const auto vector = [&](int at, int64_t size, void** to) {
    if (read.is_none(at)) return true;
    TensorInfo info;
    if (!read.tensor(at, &info)) return false;
    *to = info.data;
    return info.dims == 1 && info.dtype == p.dtype && info.size[0] == size && (size == 1 || info.stride[0] == 1);
  };
  // Where out is as wide as the input it is empty_like it.
  bool plain = p.out_dim == p.model_dim && p.ff_dim > 0 && is_small(input) &&
               matrix(weight_in, p.ff_dim, p.model_dim, &p.weight_in) &&
               matrix(weight_out, p.out_dim, p.ff_dim, &p.weight_out) && vector(2, p.ff_dim, &p.bias_in) &&
               vector(6, p.out_dim, &p.bias_out);
  if (plain && !read.is_none(3)) {
    TensorInfo gate;
    plain = read.tensor(3, &gate) && matrix(gate, p.ff_dim, p.model_dim, &p.weight_gate) &&
            vector(4, p.ff_dim, &p.bias_gate);
  } else {
    plain = plain && read.is_none(4);
  }
  if (!plain || !PyUnicode_CheckExact(read.object(7)) || !read.is_zero(8)) return Outcome::kDeclined;
  const char* names[] = {"relu", "gelu", "gelu_tanh", "silu"};  // in the order of Activation
  int activation = 0;
  while (activation < 4 && PyUnicode_CompareWithASCIIString(read.object(7), names[activation]) != 0) ++activation;
  if (activation == 4) return Outcome::kDeclined;
  p.activation = static_cast<Activation>(activation);
  if (read.unless_gradient() != Outcome::kDone) return Outcome::kGradient;

  *result = empty_like(read.object(0));
  p.tokens = count(input) / p.model_dim;
  p.input = {input.data, p.model_dim};
  args.out = {read_pointer<void>(*result), p.out_dim};
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(feed_forward, args);
  return Outcome::kDone;
}

// What Python calls: `Serve` with its kCount positional arguments.
template <Outcome (*Serve)(Reader&, py::object*), int kCount>
PyObject* plain_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Outcome outcome = Outcome::kDeclined;
  py::object result;
  try {
    if (count == kCount && is_plain_eager()) {
      Reader read(args);
      outcome = Serve(read, &result);
    }
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (...) {
    // A tensor that has no such attribute, a number that does not fit: not plain.
    outcome = Outcome::kDeclined;
  }
  PyErr_Clear();
  if (outcome == Outcome::kDone) return result.release().ptr();
  return Py_NewRef(outcome == Outcome::kGradient ? Py_True : Py_None);
}

template <Outcome (*Serve)(Reader&, py::object*), int kCount>
PyMethodDef plain_method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_call<Serve, kCount>)), METH_FASTCALL,
          nullptr};
}

}  // namespace

void register_plain_calls(py::module_& m) {
  static PyMethodDef methods[] = {
      plain_method<attention, 9>("plain_attention"),
      plain_method<softmax, 4>("plain_softmax"),
      plain_method<norm, 6>("plain_norm"),
      plain_method<feed_forward, 9>("plain_feed_forward"),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastattn
