// A plain call in one step: every check of fastattn.spec that it could fail, the allocation of its result, the launch.
// That takes 2 us, where Python takes 10, and is all that a call on tiny tensors costs.
//
// Plain is a call on dense CPU tensors of at most four dimensions, laid out as they usually are, that nobody would
// watch or change between the caller and the kernel: no mode, transform, trace, profiler, autocast or subclass.
// Whatever is not, be it wrong or only unusual, is declined: the long way, through fastattn.spec and the dispatcher,
// serves it or says what is wrong with it. So no message is written here, and nothing that is declined has had an
// effect.
//
// Python gets None where a call is declined, and a list where an argument wants a gradient: the results, then what
// else the gradient's call is to be given. Autograd's node, a torch.autograd.Function, is left to Python.
#include "plain_calls.h"

#include <memory>
#include <new>

#include "attention_forward.h"
#include "embedding.h"
#include "isa.h"
#include "linear_few_rows.h"
#include "lines.h"
#include "plain_call.h"
#include "rotary_embedding.h"
#include "softmax.h"

namespace py = pybind11;

namespace fastattn::plain {

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

bool Reader::tensor(int at, TensorInfo* info) {
  PyObject* object = args_[at];
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != python.tensor_type && type != python.parameter_type) return false;
  *info = read_tensor(object);
  if (grad_enabled_) wants_gradient_ |= attribute(object, python.requires_grad).ptr() == Py_True;
  return info->dense && info->floating;
}

bool Reader::integers(int at, TensorInfo* info) {
  PyObject* object = args_[at];
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != python.tensor_type) return false;
  *info = read_tensor(object);
  return info->dense && info->int64;
}

py::object empty_like(PyObject* tensor) {
  auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(python.empty_like, tensor));
  if (!result) throw py::error_already_set();
  return result;
}

py::object empty(std::initializer_list<int64_t> size, DType dtype) {
  py::tuple shape(size.size());
  size_t i = 0;
  for (const int64_t n : size) shape[i++] = n;
  PyObject* args[] = {shape.ptr(), python.dtypes[static_cast<int>(dtype)]};
  auto result = py::reinterpret_steal<py::object>(PyObject_Vectorcall(python.empty, args, 1, python.dtype_keyword));
  if (!result) throw py::error_already_set();
  return result;
}

bool read_attention(Reader& read, AttentionProblem* problem) {
  TensorInfo q, k, v;
  if (!read.tensor(0, &q) || !read.tensor(1, &k) || !read.tensor(2, &v)) return false;
  AttentionProblem& p = *problem;
  bool plain = set_operands(q, k, v, &p) && p.head_dim_v == p.head_dim && is_small(q) && count(v) > 0 &&
               q.stride[3] == 1 && k.stride[3] == 1 && v.stride[3] == 1;
  // empty_like keeps the order of the query's dimensions, its last one innermost.
  for (int i = 0; i < 3; ++i) plain = plain && (q.size[i] == 1 || q.stride[i] >= p.head_dim);
  if (!plain) return false;

  const int64_t offset = read.is_true_object(5) ? p.seq_len_k - p.seq_len_q : 0;
  int64_t left = 0, right = 0;
  if (!read.side(3, &left) || !read.side(4, &right)) return false;
  if (!read.is_none(3)) p.mask.diag_lo = offset - left;
  if (!read.is_none(4)) p.mask.diag_hi = offset + right;
  p.softmax_scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (!read.is_none(6) && !read.finite(6, &p.softmax_scale)) return false;
  return read.is_zero(7) && (read.is_true_object(8) || p.num_heads_q == p.num_heads_kv);
}

bool read_norm(Reader& read, TensorInfo* input, NormArgs* args) {
  if (!read.tensor(0, input) || input->dims == 0 || !is_contiguous(*input) || !is_small(*input)) return false;
  NormShape& shape = args->shape;
  shape.columns = input->size[input->dims - 1];
  TensorInfo weight, bias;
  const auto parameter = [&](int at, TensorInfo* info, View* view) {
    if (!read.tensor(at, info) || !is_contiguous(*info) || info->dims == 0 || info->dims > input->dims) return false;
    for (int i = 1; i <= info->dims; ++i) {
      if (info->size[info->dims - i] != input->size[input->dims - i]) return false;
    }
    *view = {info->data, info->dtype, {1}};
    shape.columns = count(*info);
    // A kernel accumulates in one type.
    return (info->dtype == DType::kFloat64) == (input->dtype == DType::kFloat64);
  };
  const bool has_weight = !read.is_none(1), has_bias = !read.is_none(2);
  if (has_weight && !parameter(1, &weight, &args->weight)) return false;
  if (has_bias && !parameter(2, &bias, &args->bias)) return false;
  if (has_weight && has_bias && !same_size(weight, bias)) return false;
  shape.rows = count(*input) / shape.columns;
  shape.rms = read.is_true_object(5);
  args->input = {input->data, input->dtype, {shape.columns, 1}};
  return read.finite(4, &shape.eps) && shape.eps >= 0;
}

bool read_feed_forward(Reader& read, TensorInfo* input, FeedForwardProblem* problem) {
  TensorInfo weight_in, weight_out;
  const bool readable = read.tensor(0, input) && read.tensor(1, &weight_in) && read.tensor(5, &weight_out) &&
                        is_contiguous(*input) && input->dims > 0 && weight_in.dims == 2 && weight_out.dims == 2;
  if (!readable || input->dtype == DType::kFloat64) return false;
  FeedForwardProblem& p = *problem;
  p.dtype = input->dtype;
  p.model_dim = input->size[input->dims - 1];
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
  bool plain = p.out_dim == p.model_dim && p.ff_dim > 0 && is_small(*input) &&
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
  if (!plain || !PyUnicode_CheckExact(read.object(7)) || !read.is_zero(8)) return false;
  const char* names[] = {"relu", "gelu", "gelu_tanh", "silu"};  // in the order of Activation
  int activation = 0;
  while (activation < 4 && PyUnicode_CompareWithASCIIString(read.object(7), names[activation]) != 0) ++activation;
  if (activation == 4) return false;
  p.activation = static_cast<Activation>(activation);
  p.tokens = count(*input) / p.model_dim;
  p.input = {input->data, p.model_dim};
  return true;
}

namespace {

// Rows of a linear layer up to which reading its weights once is what it costs, and the fewest weights for which that
// is more than a call.
constexpr int64_t kMostRows = 32, kLeastWeights = 1 << 16;

// Whether the op would meet nobody: `_registry._is_plain_eager` and `_dispatch.needs_reference_derivatives`.
bool is_plain_eager() {
  if (is_true(python.dispatch_modes) || is_true(python.function_modes) || is_true(python.autocast) ||
      is_true(python.functorch) || is_true(python.tracing_state)) {
    return false;
  }
  return attribute(python.profiler, python.profiler_flag).ptr() == Py_False &&
         PyLong_AsLong(attribute(python.forward_ad, python.forward_ad_level).ptr()) < 0;
}

template <typename... Objects>
py::list list_of(const Objects&... objects) {
  py::list result(sizeof...(objects));
  size_t i = 0;
  ((result[i++] = objects), ...);
  return result;
}

// attention(query, key, value, left, right, bottom_right, softmax_scale, dropout_p, grouped) -> out or [out, lse];
// left, right and softmax_scale may be None, as in masks.Window and ops.attention; `grouped` lets query heads share a
// key head.
bool attention(Reader& read, py::object* result) {
  AttentionForwardArgs args;
  const AttentionProblem& p = args.problem;
  if (!read_attention(read, &args.problem)) return false;
  const auto out = empty_like(read.object(0));
  args.out = to_view(read_tensor(out));
  std::unique_ptr<double[]> unkept;
  if (read.wants_gradient()) {
    const auto lse = empty({p.batch, p.num_heads_q, p.seq_len_q}, DType::kFloat64);
    args.lse = read_pointer<double>(lse);
    *result = list_of(out, lse);
  } else {
    unkept.reset(new double[static_cast<size_t>(p.batch * p.num_heads_q * p.seq_len_q)]);
    args.lse = unkept.get();
    *result = out;
  }
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(attention_forward, args);
  return true;
}

// softmax(input, dim, scale, log) -> out or [out]
bool softmax(Reader& read, py::object* result) {
  TensorInfo input;
  int64_t dim = 0;
  SoftmaxArgs args;
  const bool plain = read.tensor(0, &input) && is_contiguous(input) && is_small(input) && read.integer(1, &dim) &&
                     dim >= -input.dims && dim < input.dims && read.finite(2, &args.scale);
  if (!plain) return false;
  const auto out = empty_like(read.object(0));
  *result = read.wants_gradient() ? list_of(out) : out;
  args.lines = make_lines({input.size, input.size + input.dims}, static_cast<int>(dim < 0 ? dim + input.dims : dim),
                          {input.stride, input.stride + input.dims}, {});
  args.input = input.data;
  args.out = read_pointer<void>(out);
  args.input_dtype = args.out_dtype = input.dtype;
  args.log = read.is_true_object(3);
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(softmax, args);
  return true;
}

// norm(input, weight, bias, residual, eps, rms) -> out or [out, statistics], and with a residual (out, total) or
// [out, total, statistics]; weight, bias and residual may be None; statistics [2, rows] are the means and their rstd.
bool norm(Reader& read, py::object* result) {
  TensorInfo input, residual;
  NormArgs args;
  if (!read_norm(read, &input, &args)) return false;
  const bool has_residual = !read.is_none(3);
  if (has_residual && !(read.tensor(3, &residual) && is_like(input, residual))) return false;

  const auto out = empty_like(read.object(0));
  args.out = read_pointer<void>(out);
  py::object total;
  if (has_residual) {
    total = empty_like(read.object(0));
    args.residual = {residual.data, residual.dtype, {args.shape.columns, 1}};
    args.total = read_pointer<void>(total);
  }
  const int64_t rows = args.shape.rows;
  std::unique_ptr<double[]> unkept;
  if (read.wants_gradient()) {
    const bool wide = input.dtype == DType::kFloat64;
    const auto statistics = empty({2, rows}, wide ? DType::kFloat64 : DType::kFloat32);
    args.mean = read_pointer<void>(statistics);
    args.rstd = static_cast<char*>(args.mean) + rows * static_cast<int64_t>(wide ? sizeof(double) : sizeof(float));
    *result = has_residual ? list_of(out, total, statistics) : list_of(out, statistics);
  } else {
    unkept.reset(new double[static_cast<size_t>(2 * rows)]);  // room for either type
    args.mean = unkept.get();
    args.rstd = unkept.get() + rows;
    *result = has_residual ? py::object(py::make_tuple(out, total)) : out;
  }
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(norm, args);
  return true;
}

// feed_forward(input, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, dropout_p) -> out
// or [out]; the biases and the gate may be None.
bool feed_forward(Reader& read, py::object* result) {
  TensorInfo input;
  FeedForwardArgs args;
  if (!read_feed_forward(read, &input, &args.problem)) return false;
  const auto out = empty_like(read.object(0));
  *result = read.wants_gradient() ? list_of(out) : out;
  args.out = {read_pointer<void>(out), args.problem.out_dim};
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(feed_forward, args);
  return true;
}

// linear(input, weight, bias) -> out, of a few rows and without a gradient; bias may be None. Where PyTorch is as fast
// it is declined.
bool linear(Reader& read, py::object* result) {
  TensorInfo input, weight, bias;
  LinearFewRowsArgs args;
  if (!read.tensor(0, &input) || !read.tensor(1, &weight)) return false;
  const bool fits = input.dims >= 2 && weight.dims == 2 && input.dtype == DType::kFloat32 &&
                    weight.dtype == input.dtype && is_contiguous(input) && is_small(input) &&
                    weight.size[1] == input.size[input.dims - 1] && weight.stride[1] == 1 && weight.size[0] > 0 &&
                    weight.stride[0] >= weight.size[1];
  if (!fits) return false;
  args.depth = weight.size[1];
  args.columns = weight.size[0];
  args.rows = count(input) / args.depth;
  if (args.rows > kMostRows || args.columns * args.depth < kLeastWeights) return false;
  if (!read.is_none(2)) {
    const bool bias_fits = read.tensor(2, &bias) && bias.dims == 1 && bias.size[0] == args.columns &&
                           bias.dtype == input.dtype && is_contiguous(bias);
    if (!bias_fits) return false;
    args.bias = static_cast<const float*>(bias.data);
  }
  if (read.wants_gradient()) return false;
  args.input = static_cast<const float*>(input.data);
  args.weight = static_cast<const float*>(weight.data);
  args.weight_stride = weight.stride[0];
  const int64_t* size = input.size;
  *result = input.dims == 2   ? empty({size[0], args.columns}, input.dtype)
            : input.dims == 3 ? empty({size[0], size[1], args.columns}, input.dtype)
                              : empty({size[0], size[1], size[2], args.columns}, input.dtype);
  args.out = read_pointer<float>(*result);
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(linear_few_rows, args);
  return true;
}

// The angles of a rotary embedding, arguments 2 to 5: turns, positions, cos and sin, of which either the first two (no
// positions: from an offset on) or the last two are given.
bool read_angles(Reader& read, RotaryEmbeddingArgs* args) {
  const int64_t half = args->rotary_dim / 2;
  const auto batch_stride = [&](const TensorInfo& info, int dims) {
    return info.dims == dims && info.size[0] != 1 ? info.stride[0] : 0;
  };
  // [n, ...] for all sequences, or [batch or 1, n, ...].
  const auto fits = [&](const TensorInfo& info, int dims) {
    const bool has_batch = info.dims == dims && (info.size[0] == 1 || info.size[0] == args->batch);
    return (has_batch || info.dims == dims - 1) && info.size[info.dims - dims + 1] == args->seq_len;
  };
  if (!read.is_none(2)) {
    TensorInfo turns, positions;
    if (!read.integers(2, &turns) || !has_size(turns, {half}) || !is_contiguous(turns)) return false;
    args->turns = static_cast<const int64_t*>(turns.data);
    if (read.is_none(3)) return true;
    if (!read.integers(3, &positions) || !fits(positions, 2) || positions.stride[positions.dims - 1] != 1) return false;
    args->positions = static_cast<const int64_t*>(positions.data);
    args->position_stride = batch_stride(positions, 2);
    return true;
  }
  for (int at = 4; at < 6; ++at) {
    TensorInfo info;
    if (!read.tensor(at, &info) || read.wants_gradient() || !fits(info, 3)) return false;
    const int64_t width = info.size[info.dims - 1];
    const bool once = width == half, twice = width == args->rotary_dim && !args->interleaved;
    if (!(once || twice) || info.stride[info.dims - 1] != 1) return false;
    (at == 4 ? args->cos : args->sin) = {info.data, info.dtype, {batch_stride(info, 3), info.stride[info.dims - 2]}};
  }
  return true;
}

// rotary_embedding(query, key, turns, positions, cos, sin, offset, rotary_dim, interleaved, scale, inverse)
// -> query_out, and with a key (query_out, key_out); [query_out, key_out or None] where an argument wants a gradient.
// `turns` are those of reference/rotary_embedding.py, or None where cos and sin are given.
bool rotary_embedding(Reader& read, py::object* result) {
  RotaryEmbeddingArgs args;
  TensorInfo info[2];
  const TensorInfo query = read_tensor(read.object(0));
  args.batch = query.size[0];
  args.seq_len = query.size[2];
  args.head_dim = query.size[3];
  args.interleaved = read.is_true_object(8);
  args.inverse = read.is_true_object(10);
  const bool plain = query.dims == 4 && read.integer(6, &args.offset) && args.offset >= 0 &&
                     read.integer(7, &args.rotary_dim) && args.rotary_dim > 0 && args.rotary_dim % 2 == 0 &&
                     args.rotary_dim <= args.head_dim && read.finite(9, &args.scale) && read_angles(read, &args);
  if (!plain) return false;
  for (int i = 0; i < 2 && !read.is_none(i); ++i) {
    if (!read.tensor(i, &info[i]) || info[i].dims != 4) return false;
    // Turns are too coarse for float64.
    bool fits = (args.turns == nullptr || info[i].dtype != DType::kFloat64) && is_small(info[i]) &&
                info[i].stride[3] == 1 && info[i].dtype == info[0].dtype && info[i].size[0] == args.batch &&
                info[i].size[2] == args.seq_len && info[i].size[3] == args.head_dim;
    // empty_like keeps the order of the dimensions, the last one innermost.
    for (int d = 0; d < 3; ++d) fits = fits && (info[i].size[d] == 1 || info[i].stride[d] >= args.head_dim);
    if (!fits) return false;
  }
  const bool has_key = !read.is_none(1);
  const auto query_out = empty_like(read.object(0));
  args.query.from = to_view(info[0]);
  args.query.to = to_view(read_tensor(query_out));
  args.query.heads = info[0].size[1];
  py::object key_out = py::none();
  if (has_key) {
    key_out = empty_like(read.object(1));
    args.key.from = to_view(info[1]);
    args.key.to = to_view(read_tensor(key_out));
    args.key.heads = info[1].size[1];
  }
  if (read.wants_gradient()) {
    *result = list_of(query_out, key_out);
  } else {
    *result = has_key ? py::object(py::make_tuple(query_out, key_out)) : query_out;
  }
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(rotary_embedding, args);
  return true;
}

// embedding(weight, ids, table, offset, scale) -> out, or [out] where an argument wants a gradient; table may be None.
// What has no row is declined.
bool embedding(Reader& read, py::object* result) {
  TensorInfo weight, ids, table;
  EmbeddingArgs args;
  EmbeddingTokens& t = args.tokens;
  const bool has_table = !read.is_none(2);
  bool plain = read.tensor(0, &weight) && weight.dims == 2 && weight.stride[1] == 1 && read.integers(1, &ids) &&
               ids.dims >= 1 && ids.dims <= 3 && is_contiguous(ids) && read.integer(3, &t.offset) && t.offset >= 0 &&
               read.finite(4, &t.scale);
  if (!plain) return false;
  t.tokens = count(ids);
  t.columns = weight.size[1];
  t.period = ids.size[ids.dims - 1];
  t.num_embeddings = weight.size[0];
  t.ids = static_cast<const int64_t*>(ids.data);
  if (t.tokens == 0 || t.columns == 0 || t.tokens * t.columns > 1 << 17) return false;
  if (has_table) {
    plain = read.tensor(2, &table) && table.dims == 2 && table.stride[1] == 1 && table.size[1] == t.columns &&
            (table.dtype == DType::kFloat64) == (weight.dtype == DType::kFloat64) &&
            t.offset + t.period <= table.size[0];
    t.num_positions = table.size[0];
    args.table = to_view(table);
  }
  if (!plain || FASTATTN_DISPATCH(embedding_bad_token, t, has_table) >= 0) return false;
  args.weight = to_view(weight);
  const int64_t* size = ids.size;
  const auto out = ids.dims == 1   ? empty({size[0], t.columns}, weight.dtype)
                   : ids.dims == 2 ? empty({size[0], size[1], t.columns}, weight.dtype)
                                   : empty({size[0], size[1], size[2], t.columns}, weight.dtype);
  args.out = read_pointer<void>(out);
  *result = read.wants_gradient() ? py::object(list_of(out)) : out;
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(embedding, args);
  return true;
}

// What Python calls: `Serve` with its kCount positional arguments.
template <bool (*Serve)(Reader&, py::object*), int kCount>
PyObject* plain_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool done = false;
  py::object result;
  try {
    if (count == kCount && is_plain_eager()) {
      Reader read(args);
      done = Serve(read, &result);
    }
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (...) {
    // A tensor that has no such attribute, a number that does not fit: not plain.
    done = false;
  }
  PyErr_Clear();
  return done ? result.release().ptr() : Py_NewRef(Py_None);
}

template <bool (*Serve)(Reader&, py::object*), int kCount>
PyMethodDef plain_method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_call<Serve, kCount>)), METH_FASTCALL,
          nullptr};
}

}  // namespace
}  // namespace fastattn::plain

void fastattn::register_plain_calls(py::module_& m) {
  using plain::plain_method;
  static PyMethodDef methods[] = {
      plain_method<plain::attention, 9>("plain_attention"),
      plain_method<plain::attention_backward, 13>("plain_attention_backward"),
      plain_method<plain::softmax, 4>("plain_softmax"),
      plain_method<plain::softmax_backward, 5>("plain_softmax_backward"),
      plain_method<plain::norm, 6>("plain_norm"),
      plain_method<plain::norm_backward, 10>("plain_norm_backward"),
      plain_method<plain::feed_forward, 9>("plain_feed_forward"),
      plain_method<plain::feed_forward_backward, 11>("plain_feed_forward_backward"),
      plain_method<plain::linear, 3>("plain_linear"),
      plain_method<plain::rotary_embedding, 11>("plain_rotary_embedding"),
      plain_method<plain::embedding, 5>("plain_embedding"),
      plain_method<plain::embedding_backward, 8>("plain_embedding_backward"),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
