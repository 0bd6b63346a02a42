// The gradients of plain calls, in one step as well: plain_calls.cpp.
//
// Each call's first arguments are its op's, then come what the op returned and kept, the results' gradients, and
// last `ctx.needs_input_grad`. It returns what the backward of a torch.autograd.Function returns that was given the
// op's tensors, in its order, and one thing more. Whoever differentiates the gradient itself (grad mode is on) goes the
// long way, and so do large gradients, whose memory wants huge pages.
#include <algorithm>

#include "attention_backward.h"
#include "embedding.h"
#include "feed_forward_backward.h"
#include "isa.h"
#include "lines.h"
#include "plain_call.h"
#include "softmax.h"

namespace py = pybind11;

namespace fastattn::plain {
namespace {

// The gradients by argument, each None until it is asked for; one None at the end.
class Gradients {
 public:
  explicit Gradients(size_t arguments) : found_(arguments + 1) {
    for (size_t i = 0; i <= arguments; ++i) set(i, py::none());
  }

  void set(size_t argument, const py::object& gradient) { found_[argument] = gradient; }

  // Uninitialised memory like a tensor's, for its gradient.
  PyObject* allocate(size_t argument, PyObject* tensor) {
    set(argument, empty_like(tensor));
    return PyTuple_GET_ITEM(found_.ptr(), static_cast<Py_ssize_t>(argument));
  }

  const py::tuple& found() const { return found_; }

 private:
  py::tuple found_;
};

}  // namespace

// attention_backward(the arguments of attention, out, lse, dout, needed) -> (dq, dk, dv, None)
bool attention_backward(Reader& read, py::object* result) {
  constexpr int kOut = 9, kLse = 10, kDout = 11, kNeeded = 12;
  AttentionBackwardArgs args;
  const AttentionProblem& p = args.problem;
  TensorInfo out, lse, dout;
  const bool plain = !read.grad_enabled() && read_attention(read, &args.problem) && read.tensor(kOut, &out) &&
                     read.tensor(kLse, &lse) && read.tensor(kDout, &dout);
  if (!plain) return false;
  const auto fits = [&](const TensorInfo& info) {
    return has_size(info, {p.batch, p.num_heads_q, p.seq_len_q, p.head_dim_v}) && info.dtype == p.q.dtype &&
           info.stride[3] == 1;
  };
  const bool lse_fits = has_size(lse, {p.batch, p.num_heads_q, p.seq_len_q}) && lse.dtype == DType::kFloat64;
  const int64_t keys = p.batch * p.num_heads_kv * p.seq_len_k * p.head_dim;
  if (!fits(out) || !fits(dout) || !lse_fits || !is_contiguous(lse) || keys > 1 << 17) return false;

  Gradients grads(3);
  View* views[] = {&args.dq, &args.dk, &args.dv};
  for (int i = 0; i < 3; ++i) {
    if (!read.flag(kNeeded, i)) continue;
    const TensorInfo info = read_tensor(grads.allocate(static_cast<size_t>(i), read.object(i)));
    if (info.stride[3] != 1) return false;  // of a tensor laid out unusually
    *views[i] = to_view(info);
  }
  args.out = to_view(out);
  args.dout = to_view(dout);
  args.lse = static_cast<const double*>(lse.data);
  *result = grads.found();
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(attention_backward, args);
  return true;
}

// softmax_backward(out, dim, scale, log, dout) -> (dinput, None)
bool softmax_backward(Reader& read, py::object* result) {
  constexpr int kDout = 4;
  TensorInfo out, dout;
  int64_t dim = 0;
  SoftmaxBackwardArgs args;
  const bool plain = !read.grad_enabled() && read.tensor(0, &out) && is_contiguous(out) && is_small(out) &&
                     read.tensor(kDout, &dout) && is_like(out, dout) && read.integer(1, &dim) && dim >= -out.dims &&
                     dim < out.dims && read.finite(2, &args.scale);
  if (!plain) return false;
  Gradients grads(1);
  args.lines = make_lines({out.size, out.size + out.dims}, static_cast<int>(dim < 0 ? dim + out.dims : dim),
                          {out.stride, out.stride + out.dims}, {});
  args.out = out.data;
  args.dout = dout.data;
  args.dinput = read_pointer<void>(grads.allocate(0, read.object(0)));
  args.out_dtype = args.dinput_dtype = out.dtype;
  args.log = read.is_true_object(3);
  *result = grads.found();
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(softmax_backward, args);
  return true;
}

// norm_backward(normalised, weight, bias, None, eps, rms, statistics, dout, dtotal, needed)
// -> (dinput, dweight, dbias, dresidual, None); dtotal may be None.
bool norm_backward(Reader& read, py::object* result) {
  constexpr int kStatistics = 6, kDout = 7, kDtotal = 8, kNeeded = 9;
  TensorInfo input, statistics, dout, dtotal;
  NormArgs forward;
  const bool plain = !read.grad_enabled() && read_norm(read, &input, &forward) &&
                     read.tensor(kStatistics, &statistics) && read.tensor(kDout, &dout) && is_like(input, dout);
  if (!plain) return false;
  const bool wide = input.dtype == DType::kFloat64;
  const bool fits = has_size(statistics, {2, forward.shape.rows}) && is_contiguous(statistics) &&
                    statistics.dtype == (wide ? DType::kFloat64 : DType::kFloat32);
  if (!fits) return false;

  NormBackwardArgs args;
  args.shape = forward.shape;
  args.shape.eps = 0;  // which rstd holds already
  args.input = forward.input;
  args.weight = forward.weight;
  const auto matrix = [&](const TensorInfo& info) { return View{info.data, info.dtype, {args.shape.columns, 1}}; };
  args.dout = matrix(dout);
  if (!read.is_none(kDtotal)) {
    if (!read.tensor(kDtotal, &dtotal) || !is_like(input, dtotal)) return false;
    args.dtotal = matrix(dtotal);
  }
  args.mean = statistics.data;
  args.rstd = static_cast<char*>(statistics.data) +
              forward.shape.rows * static_cast<int64_t>(wide ? sizeof(double) : sizeof(float));
  Gradients grads(4);
  if (read.flag(kNeeded, 0) || read.flag(kNeeded, 3)) {
    const auto dinput = empty_like(read.object(0));
    args.dinput = read_pointer<void>(dinput);
    if (read.flag(kNeeded, 0)) grads.set(0, dinput);
    if (read.flag(kNeeded, 3)) grads.set(3, dinput);
  }
  const auto parameter = [&](int at, const View& like) {
    return View{read_pointer<void>(grads.allocate(static_cast<size_t>(at), read.object(at))), like.dtype, {1}};
  };
  if (read.flag(kNeeded, 1)) args.dweight = parameter(1, forward.weight);
  if (read.flag(kNeeded, 2)) args.dbias = parameter(2, forward.bias);
  *result = grads.found();
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(norm_backward, args);
  return true;
}

// feed_forward_backward(the arguments of feed_forward, dout, needed)
// -> (dinput, dweight_in, dbias_in, dweight_gate, dbias_gate, dweight_out, dbias_out, None)
bool feed_forward_backward(Reader& read, py::object* result) {
  constexpr int kDout = 9, kNeeded = 10;
  FeedForwardBackwardArgs args;
  const FeedForwardProblem& p = args.problem;
  TensorInfo input, dout;
  bool plain = !read.grad_enabled() && read_feed_forward(read, &input, &args.problem) && read.tensor(kDout, &dout) &&
               is_like(input, dout) && p.ff_dim * p.model_dim <= 1 << 17;
  // Weights with gaps between their rows have gradients without.
  for (const Matrix& weight : {p.weight_in, p.weight_gate}) {
    plain = plain && (weight.data == nullptr || p.ff_dim == 1 || weight.row_stride == p.model_dim);
  }
  if (!plain || (p.out_dim != 1 && p.weight_out.row_stride != p.ff_dim)) return false;

  Gradients grads(7);
  const auto gradient = [&](int at) -> void* {
    if (!read.flag(kNeeded, at)) return nullptr;
    return read_pointer<void>(grads.allocate(static_cast<size_t>(at), read.object(at)));
  };
  args.dout = {dout.data, p.out_dim};
  args.dinput = {gradient(0), p.model_dim};
  args.dweight_in = {gradient(1), p.model_dim};
  args.dbias_in = gradient(2);
  args.dweight_gate = {gradient(3), p.model_dim};
  args.dbias_gate = gradient(4);
  args.dweight_out = {gradient(5), p.ff_dim};
  args.dbias_out = gradient(6);
  *result = grads.found();
  py::gil_scoped_release release;
  FASTATTN_DISPATCH_AMX(feed_forward_backward, args);
  return true;
}

// embedding_backward(dout, ids, num_embeddings, num_positions, offset, scale, padding, needed) -> (dweight, dtable), of
// dout's dtype, None where not needed
bool embedding_backward(Reader& read, py::object* result) {
  TensorInfo dout, ids;
  EmbeddingBackwardArgs args;
  EmbeddingTokens& t = args.tokens;
  const bool plain = !read.grad_enabled() && read.tensor(0, &dout) && dout.dims >= 2 && is_contiguous(dout) &&
                     is_small(dout) && read.integers(1, &ids) && is_contiguous(ids) && ids.dims == dout.dims - 1 &&
                     std::equal(ids.size, ids.size + ids.dims, dout.size) && read.integer(2, &t.num_embeddings) &&
                     read.integer(3, &t.num_positions) && read.integer(4, &t.offset) && read.finite(5, &t.scale) &&
                     read.integer(6, &args.padding);
  if (!plain) return false;
  t.tokens = count(ids);
  t.columns = dout.size[dout.dims - 1];
  t.period = ids.size[ids.dims - 1];
  t.ids = static_cast<const int64_t*>(ids.data);
  const bool need_weight = read.flag(7, 0), need_table = read.flag(7, 1);
  if (std::max(t.num_embeddings, t.num_positions) > (1 << 17) / t.columns || t.offset < 0 ||
      FASTATTN_DISPATCH(embedding_bad_token, t, need_table) >= 0) {
    return false;
  }
  args.dout = {dout.data, dout.dtype, {t.columns, 1}};
  py::tuple grads(2);
  const auto allocate = [&](bool needed, size_t at, int64_t rows, View* to) {
    grads[at] = needed ? empty({rows, t.columns}, dout.dtype) : py::none();
    if (needed) *to = {read_pointer<void>(grads[at]), dout.dtype, {t.columns, 1}};
  };
  allocate(need_weight, 0, t.num_embeddings, &args.dweight);
  allocate(need_table, 1, t.num_positions, &args.dtable);
  *result = grads;
  py::gil_scoped_release release;
  FASTATTN_DISPATCH(embedding_backward, args);
  return true;
}

}  // namespace fastattn::plain
