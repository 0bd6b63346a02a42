// The kernels, to Python. A call comes as the NamedTuple of fastattn.spec, already validated; its tensors are read
// through python_tensor.h. Each kernel has one register_* function, which fills its argument struct and runs it without
// the GIL. Beside it plain_calls.cpp and plain_gradients.cpp serve the plainest calls in one step; no other file knows
// Python.
//
// Longer than 400 lines because every kernel is bound here and nowhere else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_weights.h"
#include "attention_weights_reduced.h"
#include "dropout_mask.h"
#include "embedding.h"
#include "feed_forward_backward.h"
#include "isa.h"
#include "linear.h"
#include "lines.h"
#include "logits.h"
#include "norm.h"
#include "pages.h"
#include "peak.h"
#include "plain_calls.h"
#include "python_tensor.h"
#include "rotary_embedding.h"
#include "softmax.h"

namespace py = pybind11;

namespace fastattn {
namespace {

int64_t item_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Address of a contiguous tensor of `elements`, which may be None, that a kernel is about to fill.
void* read_new_pointer(py::handle tensor, int64_t elements, DType dtype) {
  void* data = read_pointer<void>(tensor);
  if (data != nullptr) prefer_huge_pages(data, elements * item_bytes(dtype));
  return data;
}

// A tensor that a kernel is about to fill, which nobody has written to yet.
TensorInfo read_new(py::handle tensor) {
  const TensorInfo info = read_tensor(tensor);
  int64_t elements = 1;  // from the first to the last: it has no gaps
  for (int i = 0; i < info.dims; ++i) elements += (info.size[i] - 1) * info.stride[i];
  prefer_huge_pages(info.data, elements * item_bytes(info.dtype));
  return info;
}

// The view of a tensor in which dimensions of size 1 are broadcast.
View to_broadcast(const TensorInfo& info) {
  View view = to_view(info);
  for (int i = 0; i < info.dims; ++i) {
    if (info.size[i] == 1) view.stride[i] = 0;
  }
  return view;
}

// A tensor of four dimensions, None for an absent one; dimensions of size 1 are broadcast.
View read_broadcast(py::handle tensor) { return tensor.is_none() ? View{} : to_broadcast(read_tensor(tensor)); }

// The floating-point fields of a Dropout from probability and state tensor [seed, offset] (None: no dropout).
Dropout read_dropout(py::handle state, double p) {
  const int64_t* numbers = read_pointer<int64_t>(state);
  if (numbers == nullptr) return {};
  return {static_cast<uint64_t>(numbers[0]), static_cast<uint64_t>(numbers[1]), static_cast<uint32_t>(p * 0x1p32),
          1.0 / (1.0 - p)};
}

// The fields of spec.AttentionCall, by position.
AttentionProblem read_attention(const py::tuple& call) {
  enum Field {
    kQuery,
    kKey,
    kValue,
    kBias,
    kRelativeBias,
    kSinks,
    kDenseMask,
    kKeyLengths,
    kSegmentsQ,
    kSegmentsK,
    kDropoutState,
    kDiagLo,
    kDiagHi,
    kSoftmaxScale,
    kSoftcap,
    kDropoutP
  };
  const auto field = [&](Field index) { return py::handle(PyTuple_GET_ITEM(call.ptr(), index)); };
  const TensorInfo q = read_tensor(field(kQuery)), k = read_tensor(field(kKey)), v = read_tensor(field(kValue));
  AttentionProblem p;
  // A last line against writing out of bounds; users get their messages from fastattn.spec.
  if (!set_operands(q, k, v, &p)) {
    throw std::invalid_argument("the shapes or dtypes of query, key and value do not fit each other");
  }
  p.softmax_scale = PyFloat_AsDouble(field(kSoftmaxScale).ptr());
  p.softcap = PyFloat_AsDouble(field(kSoftcap).ptr());
  p.mask.diag_lo = PyLong_AsLongLong(field(kDiagLo).ptr());
  p.mask.diag_hi = PyLong_AsLongLong(field(kDiagHi).ptr());
  p.mask.key_lengths = read_pointer<const int32_t>(field(kKeyLengths));
  p.mask.segments_q = read_pointer<const int32_t>(field(kSegmentsQ));
  p.mask.segments_k = read_pointer<const int32_t>(field(kSegmentsK));
  const View dense = read_broadcast(field(kDenseMask));
  p.mask.dense = static_cast<const uint8_t*>(dense.data);
  for (int i = 0; i < 4; ++i) p.mask.dense_stride[i] = dense.stride[i];
  p.bias[0] = read_broadcast(field(kBias));
  if (!field(kRelativeBias).is_none()) {
    // Entry j - i + seq_len_q - 1 of a head's row: a view whose rows go backwards from element seq_len_q - 1.
    const View relative = read_broadcast(field(kRelativeBias));
    const int64_t item = item_bytes(relative.dtype);
    char* first = static_cast<char*>(relative.data) + (p.seq_len_q - 1) * item;
    p.bias[1] = {first, relative.dtype, {0, relative.stride[0], -1, 1}};
  }
  if (!field(kSinks).is_none()) {
    const TensorInfo sinks = read_tensor(field(kSinks));
    p.sinks = {sinks.data, sinks.dtype, {0, sinks.stride[0], 0, 0}};
  }
  p.dropout = read_dropout(field(kDropoutState), PyFloat_AsDouble(field(kDropoutP).ptr()));
  if (PyErr_Occurred()) throw py::error_already_set();
  return p;
}

// A matrix whose columns are contiguous, [rows, columns]; None for an absent one.
Matrix read_matrix(py::handle tensor, int64_t rows, int64_t columns, DType dtype) {
  if (tensor.is_none()) return {};
  const TensorInfo info = read_tensor(tensor);
  const bool fits = info.dims == 2 && info.size[0] == rows && info.size[1] == columns && info.dtype == dtype &&
                    (columns == 1 || info.stride[1] == 1);
  if (!fits) throw std::invalid_argument("a matrix of the feed-forward has a wrong shape, dtype or stride");
  return {info.data, info.stride[0]};
}

// A matrix that a kernel is about to fill; None for an absent one.
Matrix read_new_matrix(py::handle tensor, int64_t rows, int64_t columns, DType dtype) {
  const Matrix matrix = read_matrix(tensor, rows, columns, dtype);
  if (matrix.data != nullptr) {
    prefer_huge_pages(matrix.data, ((rows - 1) * matrix.row_stride + columns) * item_bytes(dtype));
  }
  return matrix;
}

// A contiguous vector, or null for None.
void* read_vector(py::handle tensor, int64_t size, DType dtype) {
  if (tensor.is_none()) return nullptr;
  const TensorInfo info = read_tensor(tensor);
  const bool fits = info.dims == 1 && info.size[0] == size && info.dtype == dtype && (size == 1 || info.stride[0] == 1);
  if (!fits) throw std::invalid_argument("a vector of the feed-forward has a wrong shape, dtype or stride");
  return info.data;
}

// The fields of spec.FeedForwardCall, by position, with the input as [tokens, model_dim]; residual and dropout of the
// output are applied to the result by whoever called.
FeedForwardProblem read_feed_forward(const py::tuple& call) {
  enum Field {
    kInput,
    kWeightIn,
    kBiasIn,
    kWeightGate,
    kBiasGate,
    kWeightOut,
    kBiasOut,
    kResidual,
    kDropoutState,
    kOutputDropoutState,
    kActivation,
    kDropoutP
  };
  const auto field = [&](Field index) { return py::handle(PyTuple_GET_ITEM(call.ptr(), index)); };
  const TensorInfo input = read_tensor(field(kInput)), out = read_tensor(field(kWeightOut));
  FeedForwardProblem p;
  p.tokens = input.size[0];
  p.model_dim = input.size[1];
  p.ff_dim = out.size[1];
  p.out_dim = out.size[0];
  p.dtype = input.dtype;
  p.input = read_matrix(field(kInput), p.tokens, p.model_dim, p.dtype);
  p.weight_in = read_matrix(field(kWeightIn), p.ff_dim, p.model_dim, p.dtype);
  p.bias_in = read_vector(field(kBiasIn), p.ff_dim, p.dtype);
  p.weight_gate = read_matrix(field(kWeightGate), p.ff_dim, p.model_dim, p.dtype);
  p.bias_gate = read_vector(field(kBiasGate), p.ff_dim, p.dtype);
  p.weight_out = read_matrix(field(kWeightOut), p.out_dim, p.ff_dim, p.dtype);
  p.bias_out = read_vector(field(kBiasOut), p.out_dim, p.dtype);
  const auto activation = py::cast<std::string>(field(kActivation));
  p.activation = activation == "relu"        ? Activation::kRelu
                 : activation == "gelu"      ? Activation::kGelu
                 : activation == "gelu_tanh" ? Activation::kGeluTanh
                                             : Activation::kSilu;
  p.dropout = read_dropout(field(kDropoutState), PyFloat_AsDouble(field(kDropoutP).ptr()));
  if (PyErr_Occurred()) throw py::error_already_set();
  return p;
}

void register_isa(py::module_& m) {
  m.def("isa", [] { return isa_name(current_isa()); }, "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Forces an instruction set; RuntimeError where it cannot run.");
  m.def("available_isas", &available_isas, "Instruction sets this machine can run, slowest first.");
  m.def("cpu_flags", &cpu_flags, "Further processor features, such as amx_bf16.");
}

void register_dropout(py::module_& m) {
  m.def(
      "dropout",
      [](py::handle input, py::handle state, double p, py::handle out, py::handle residual) {
        const TensorInfo info = read_tensor(input);
        if (info.dims != 2) throw std::invalid_argument("input must be [rows, columns]");
        DropoutArgs args{info.size[0], info.size[1], read_dropout(state, p),
                         info.dtype,   info.data,    read_pointer<void>(out)};
        if (!residual.is_none()) args.residual = read_pointer<const void>(residual);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(dropout, args);
      },
      "Writes the dropout of contiguous input [rows, columns], plus a contiguous residual unless it is None, to "
      "contiguous out.",
      py::arg("input"), py::arg("state"), py::arg("p"), py::arg("out"), py::arg("residual") = py::none());
}

void register_dropout_mask(py::module_& m) {
  m.def(
      "dropout_mask",
      [](py::handle keep, py::handle state, double p) {
        const TensorInfo info = read_tensor(keep);
        if (info.dims != 3) throw std::invalid_argument("keep must be [slices, rows, columns]");
        const DropoutMaskArgs args{info.size[0], info.size[1], info.size[2], read_dropout(state, p),
                                   static_cast<uint8_t*>(info.data)};
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(dropout_mask, args);
      },
      "Writes the contiguous bool mask keep[slices, rows, columns] of the elements that dropout leaves.");
}

// One number a query: float64 [batch, num_heads_q, seq_len_q], contiguous.
double* read_rows(py::handle tensor, const AttentionProblem& p) {
  const TensorInfo info = read_tensor(tensor);
  const int64_t size[] = {p.batch, p.num_heads_q, p.seq_len_q};
  bool fits = info.dims == 3 && info.dtype == DType::kFloat64;
  for (int64_t i = 2, stride = 1; fits && i >= 0; stride *= size[i--]) {
    fits = info.size[i] == size[i] && (size[i] == 1 || info.stride[i] == stride);
  }
  if (!fits) throw std::invalid_argument("lse must be a contiguous float64 tensor of one number a query");
  return static_cast<double*>(info.data);
}

// Memory to stream, from a float32 vector and, unless it is None, to another as long.
StreamArgs read_stream(py::handle source, py::handle target) {
  const TensorInfo from = read_tensor(source);
  const int64_t bytes = from.size[0] * static_cast<int64_t>(sizeof(float));
  const StreamArgs args{from.data, read_pointer<void>(target), bytes};
  const bool fits = target.is_none() || read_tensor(target).size[0] == from.size[0];
  const auto at = reinterpret_cast<uintptr_t>(args.from) | reinterpret_cast<uintptr_t>(args.to);
  if (!fits || from.dims != 1 || from.stride[0] != 1 || from.dtype != DType::kFloat32 || bytes % 1024 || at % 64) {
    throw std::invalid_argument("streamed memory is float32 vectors of a multiple of 256, at a multiple of 64 bytes");
  }
  return args;
}

void register_limits(py::module_& m) {
  m.def(
      "multiply_add_peak",
      [](int64_t rounds) {
        py::gil_scoped_release release;
        return FASTATTN_DISPATCH(multiply_add_peak, rounds);
      },
      "Runs float32 multiply-adds in registers on all threads; returns how many floating point operations they were.");
  m.def(
      "tile_peak",
      [](int64_t rounds) {
#if defined(FASTATTN_HAS_AMX)
        py::gil_scoped_release release;
        if (current_isa() == Isa::kAmx) return amx::tile_peak(rounds);
#endif
        return 0.0 * static_cast<double>(rounds);
      },
      "The same for bfloat16 products on AMX tiles; 0 where they are not in use.");
  m.def(
      "read_memory",
      [](py::handle source) {
        const StreamArgs args = read_stream(source, py::none());
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(read_memory, args);
      },
      "Reads a float32 vector on all threads.");
  m.def(
      "copy_memory",
      [](py::handle source, py::handle target) {
        const StreamArgs args = read_stream(source, target);
        if (args.to == nullptr) throw std::invalid_argument("there is nowhere to copy to");
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(copy_memory, args);
      },
      "Copies a float32 vector into another on all threads, past the caches.");
}

// [batch, rows, columns] as a kernel reads it: [batch, 1, rows, columns].
View without_heads(View view) {
  view.stride[2] = view.stride[1];
  view.stride[1] = 0;
  return view;
}

void register_attention_forward(py::module_& m) {
  m.def(
      "attention_forward",
      [](const py::tuple& call, py::handle out, py::handle lse, py::handle weights) {
        AttentionForwardArgs args;
        args.problem = read_attention(call);
        args.out = to_view(read_new(out));
        args.lse = read_rows(lse, args.problem);
        if (!weights.is_none()) args.weights = without_heads(to_view(read_new(weights)));
        py::gil_scoped_release release;
        FASTATTN_DISPATCH_AMX(attention_forward, args);
      },
      py::arg("call"), py::arg("out"), py::arg("lse"), py::arg("weights") = py::none(),
      "Writes out and lse of a spec.AttentionCall that is not empty, and the mean over the heads of its weights, "
      "[batch, seq_len_q, seq_len_k], where that is given.");
}

void register_attention_backward(py::module_& m) {
  m.def(
      "attention_backward",
      [](const py::tuple& call, py::handle out, py::handle lse, py::handle dout, py::handle dlse, py::handle dq,
         py::handle dk, py::handle dv, py::handle dbias, py::handle drelative, py::handle dsinks) {
        AttentionBackwardArgs args;
        args.problem = read_attention(call);
        args.out = to_view(read_tensor(out));
        args.dout = to_view(read_tensor(dout));
        args.lse = read_rows(lse, args.problem);
        args.dlse = dlse.is_none() ? nullptr : read_rows(dlse, args.problem);
        const auto read_optional = [](py::handle tensor) {
          return tensor.is_none() ? View{} : to_view(read_new(tensor));
        };
        args.dq = read_optional(dq);
        args.dk = read_optional(dk);
        args.dv = read_optional(dv);
        if (!dbias.is_none()) args.dbias = to_broadcast(read_new(dbias));
        if (!drelative.is_none()) {
          const View view = read_broadcast(drelative);
          args.drelative = {view.data, view.dtype, {0, view.stride[0], 0, 1}};
        }
        args.dsinks = read_pointer<void>(dsinks);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH_AMX(attention_backward, args);
      },
      "Writes the gradients of a spec.AttentionCall that is not empty; None for one that is not wanted.");
}

// The matrix [rows, columns] of an argument that may be None.
View read_matrix(py::handle tensor) { return tensor.is_none() ? View{} : to_view(read_tensor(tensor)); }

NormShape norm_shape(py::handle input, bool rms, double eps) {
  const TensorInfo info = read_tensor(input);
  if (info.dims != 2) throw std::invalid_argument("norms take a matrix [rows, columns]");
  return {info.size[0], info.size[1], rms, eps};
}

void register_norm(py::module_& m) {
  m.def(
      "norm",
      [](py::handle input, py::handle residual, py::handle weight, py::handle bias, double eps, bool rms,
         py::handle out, py::handle total, py::handle mean, py::handle rstd) {
        NormArgs args;
        args.shape = norm_shape(input, rms, eps);
        args.input = read_matrix(input);
        args.residual = read_matrix(residual);
        args.weight = read_matrix(weight);
        args.bias = read_matrix(bias);
        const int64_t elements = args.shape.rows * args.shape.columns;
        args.out = read_new_pointer(out, elements, args.input.dtype);
        args.total = read_new_pointer(total, residual.is_none() ? 0 : elements, args.input.dtype);
        args.mean = read_pointer<void>(mean);
        args.rstd = read_pointer<void>(rstd);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(norm, args);
      },
      "Writes out, total, mean and rstd of the rows of a matrix.");
  m.def(
      "norm_backward",
      [](py::handle input, py::handle weight, py::handle mean, py::handle rstd, py::handle dout, py::handle dtotal,
         bool rms, py::handle dinput, py::handle dweight, py::handle dbias) {
        NormBackwardArgs args;
        args.shape = norm_shape(input, rms, 0.0);
        args.input = read_matrix(input);
        args.weight = read_matrix(weight);
        args.mean = read_pointer<void>(mean);
        args.rstd = read_pointer<void>(rstd);
        args.dout = read_matrix(dout);
        args.dtotal = read_matrix(dtotal);
        args.dinput = read_new_pointer(dinput, args.shape.rows * args.shape.columns, args.input.dtype);
        args.dweight = read_matrix(dweight);
        args.dbias = read_matrix(dbias);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(norm_backward, args);
      },
      "Writes those of dinput, dweight and dbias that are not None.");
}

// What the tokens of an embedding are; throws where one has no row, so that nothing is read or written out of bounds.
EmbeddingTokens read_tokens(py::handle ids, py::handle positions, py::handle state, int64_t columns,
                            int64_t num_embeddings, int64_t num_positions, int64_t period, int64_t offset, double scale,
                            double dropout_p) {
  EmbeddingTokens t;
  t.tokens = read_tensor(ids).size[0];
  if (t.tokens >= INT32_MAX) throw std::invalid_argument("an embedding takes fewer than 2^31 tokens");
  t.columns = columns;
  t.period = period;
  t.offset = offset;
  t.ids = read_pointer<const int64_t>(ids);
  t.positions = read_pointer<const int64_t>(positions);
  t.num_embeddings = num_embeddings;
  t.num_positions = num_positions;
  t.scale = scale;
  t.dropout = read_dropout(state, dropout_p);
  const int64_t bad = FASTATTN_DISPATCH(embedding_bad_token, t, num_positions > 0);
  if (bad >= 0) {
    const int64_t at = bad % period, position = t.positions == nullptr ? offset + at : t.positions[at];
    const bool is_id = t.ids[bad] < 0 || t.ids[bad] >= num_embeddings;
    throw py::index_error(
        is_id ? "ids must be in [0, " + std::to_string(num_embeddings) + "), got " + std::to_string(t.ids[bad])
              : "positions must be in [0, " + std::to_string(num_positions) + "), got " + std::to_string(position));
  }
  return t;
}

void register_embedding(py::module_& m) {
  m.def(
      "embedding",
      [](py::handle weight, py::handle ids, py::handle table, py::handle positions, py::handle state, int64_t period,
         int64_t offset, double scale, double dropout_p, py::handle out) {
        EmbeddingArgs args;
        const TensorInfo rows = read_tensor(weight);
        args.weight = to_view(rows);
        int64_t num_positions = 0;
        if (!table.is_none()) {
          const TensorInfo info = read_tensor(table);
          args.table = to_view(info);
          num_positions = info.size[0];
        }
        args.tokens = read_tokens(ids, positions, state, rows.size[1], rows.size[0], num_positions, period, offset,
                                  scale, dropout_p);
        args.out = read_new_pointer(out, args.tokens.tokens * args.tokens.columns, rows.dtype);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(embedding, args);
      },
      "Writes the rows of contiguous ids [tokens] to contiguous out; weight and table (or None) have contiguous rows.");
  m.def(
      "embedding_backward",
      [](py::handle dout, py::handle ids, py::handle positions, py::handle state, int64_t num_embeddings,
         int64_t num_positions, int64_t period, int64_t offset, double scale, int64_t padding, double dropout_p,
         py::handle dweight, py::handle dtable) {
        EmbeddingBackwardArgs args;
        const TensorInfo rows = read_tensor(dout);
        args.dout = to_view(rows);
        args.padding = padding;
        args.tokens = read_tokens(ids, positions, state, rows.size[1], num_embeddings,
                                  dtable.is_none() ? 0 : num_positions, period, offset, scale, dropout_p);
        if (args.tokens.tokens != rows.size[0]) throw std::invalid_argument("there must be a row of dout for each id");
        if (!dweight.is_none()) args.dweight = to_view(read_new(dweight));
        if (!dtable.is_none()) args.dtable = to_view(read_new(dtable));
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(embedding_backward, args);
      },
      "Writes the gradients of weight and position table that are not None, from dout [tokens, columns].");
}

// A tensor [batch, heads, seq_len, head_dim] to rotate and its result; neither where they are None.
RotaryEmbeddingArgs::Operand read_rotated(py::handle from, py::handle to, const RotaryEmbeddingArgs& args) {
  if (from.is_none()) return {};
  const TensorInfo info = read_tensor(from), out = read_new(to);
  bool fits = info.dims == 4 && out.dims == 4 && info.dtype == out.dtype && info.size[0] == args.batch &&
              info.size[2] == args.seq_len && info.size[3] == args.head_dim;
  for (int i = 0; fits && i < 4; ++i) fits = info.size[i] == out.size[i];
  for (const TensorInfo& rows : {info, out}) fits = fits && (rows.size[3] == 1 || rows.stride[3] == 1);
  if (!fits) throw std::invalid_argument("the shapes or dtypes of query, key and their results do not fit each other");
  return {to_view(info), to_view(out), info.size[1]};
}

void register_rotary_embedding(py::module_& m) {
  m.def(
      "rotary_embedding",
      [](const py::tuple& call, py::handle turns, py::handle query_out, py::handle key_out) {
        // Of spec.RotaryEmbeddingCall.
        enum Field {
          kQuery,
          kKey,
          kPositions,
          kInvFreq,
          kCos,
          kSin,
          kBase,
          kOffset,
          kRotaryDim,
          kInterleaved,
          kScale,
          kInverse
        };
        const auto field = [&](Field index) { return py::handle(PyTuple_GET_ITEM(call.ptr(), index)); };
        const TensorInfo query = read_tensor(field(kQuery));
        RotaryEmbeddingArgs args;
        args.batch = query.size[0];
        args.seq_len = query.size[2];
        args.head_dim = query.size[3];
        args.rotary_dim = field(kRotaryDim).cast<int64_t>();
        args.query = read_rotated(field(kQuery), query_out, args);
        args.key = read_rotated(field(kKey), key_out, args);
        args.interleaved = field(kInterleaved).cast<bool>();
        args.scale = field(kScale).cast<double>();
        args.inverse = field(kInverse).cast<bool>();
        args.offset = field(kOffset).cast<int64_t>();
        args.turns = read_pointer<const int64_t>(turns);
        // [batch or 1, seq_len, ...]: one entry serves the whole batch.
        const auto batch_stride = [](const TensorInfo& info) { return info.size[0] == 1 ? 0 : info.stride[0]; };
        if (turns.is_none()) {
          for (const auto& [from, to] : {std::pair(field(kCos), &args.cos), std::pair(field(kSin), &args.sin)}) {
            const TensorInfo info = read_tensor(from);
            *to = to_view(info);
            to->stride[0] = batch_stride(info);
          }
        } else if (!field(kPositions).is_none()) {
          const TensorInfo info = read_tensor(field(kPositions));
          args.positions = static_cast<const int64_t*>(info.data);
          args.position_stride = batch_stride(info);
        }
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(rotary_embedding, args);
      },
      "Writes query and key of a spec.RotaryEmbeddingCall rotated, by `turns` 2^-64 of a turn a position or, where "
      "they "
      "are None, by the call's cosines and sines.");
}

void register_attention_weights(py::module_& m) {
  m.def(
      "attention_weights",
      [](const py::tuple& call, py::handle lse, py::handle out, bool mean) {
        AttentionWeightsArgs args;
        args.problem = read_attention(call);
        args.lse = to_view(read_tensor(lse));
        args.out = to_view(read_new(out));
        if (mean) args.out = without_heads(args.out);
        args.mean = mean;
        py::gil_scoped_release release;
        FASTATTN_DISPATCH_AMX(attention_weights, args);
      },
      "Writes the weights of a spec.AttentionCall that is not empty, or their mean over the heads.");
  m.def(
      "attention_weights_reduced",
      [](const py::tuple& call, py::handle lse, const std::string& reduce, int64_t top_k, int64_t pool_size,
         py::handle out, py::handle keys) {
        AttentionWeightsReducedArgs args;
        args.problem = read_attention(call);
        args.lse = to_view(read_tensor(lse));
        args.reduction = reduce == "key_sum"   ? WeightsReduction::kKeySum
                         : reduce == "entropy" ? WeightsReduction::kEntropy
                         : reduce == "top_k"   ? WeightsReduction::kTopK
                                               : WeightsReduction::kPooled;
        args.top_k = top_k;
        args.pool_size = pool_size;
        const bool fits = args.reduction == WeightsReduction::kTopK     ? top_k >= 1 && top_k <= args.problem.seq_len_k
                          : args.reduction == WeightsReduction::kPooled ? pool_size >= 1
                                                                        : true;
        if (!fits) throw std::invalid_argument("top_k or pool_size does not fit the call");
        args.out = read_pointer<void>(out);
        args.keys = read_pointer<int64_t>(keys);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(attention_weights_reduced, args);
      },
      "Writes a reduction of the weights of a spec.AttentionCall that is not empty; `keys` is for top_k alone.");
}

// Lines along `dim` of a source tensor of any number of dimensions; `mask` has its shape or is None.
Lines read_lines(py::handle source, py::handle mask, py::handle dim) {
  using Numbers = std::vector<int64_t>;
  const auto mask_stride = mask.is_none() ? Numbers() : call_method(mask, python.stride).cast<Numbers>();
  return make_lines(call_method(source, python.size).cast<Numbers>(), dim.cast<int>(),
                    call_method(source, python.stride).cast<Numbers>(), mask_stride);
}

int64_t elements(const Lines& lines) { return lines.outer * lines.across * lines.length; }

void register_softmax(py::module_& m) {
  m.def(
      "softmax",
      [](const py::tuple& call, py::handle out) {
        enum Field { kInput, kMask, kDim, kScale, kDtype, kLog };  // of spec.SoftmaxCall
        const auto field = [&](Field index) { return py::handle(PyTuple_GET_ITEM(call.ptr(), index)); };
        SoftmaxArgs args;
        args.lines = read_lines(field(kInput), field(kMask), field(kDim));
        args.input = read_pointer<void>(field(kInput));
        args.mask = read_pointer<uint8_t>(field(kMask));
        args.input_dtype = read_dtype(field(kInput));
        args.out_dtype = read_dtype(out);
        args.out = read_new_pointer(out, elements(args.lines), args.out_dtype);
        args.scale = field(kScale).cast<double>();
        args.log = field(kLog).cast<bool>();
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(softmax, args);
      },
      "Writes the result of a spec.SoftmaxCall that is not empty into contiguous `out`.");
  m.def(
      "softmax_backward",
      [](const py::tuple& call, py::handle dinput) {
        enum Field { kOut, kDout, kMask, kDim, kScale, kDtype, kLog };  // of spec.SoftmaxBackwardCall
        const auto field = [&](Field index) { return py::handle(PyTuple_GET_ITEM(call.ptr(), index)); };
        SoftmaxBackwardArgs args;
        args.lines = read_lines(field(kOut), field(kMask), field(kDim));
        args.out = read_pointer<void>(field(kOut));
        args.dout = read_pointer<void>(field(kDout));
        args.mask = read_pointer<uint8_t>(field(kMask));
        args.out_dtype = read_dtype(field(kOut));
        args.dinput_dtype = read_dtype(dinput);
        args.dinput = read_new_pointer(dinput, elements(args.lines), args.dinput_dtype);
        args.scale = field(kScale).cast<double>();
        args.log = field(kLog).cast<bool>();
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(softmax_backward, args);
      },
      "Writes the gradient of a spec.SoftmaxBackwardCall whose out and dout are contiguous into contiguous `dinput`.");
}

void register_feed_forward(py::module_& m) {
  m.def(
      "feed_forward",
      [](const py::tuple& call, py::handle out) {
        FeedForwardArgs args;
        args.problem = read_feed_forward(call);
        const FeedForwardProblem& p = args.problem;
        args.out = read_new_matrix(out, p.tokens, p.out_dim, p.dtype);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH_AMX(feed_forward, args);
      },
      "Writes out [tokens, out_dim] of a spec.FeedForwardCall with input [tokens, model_dim], not float64.");
  m.def(
      "feed_forward_backward",
      [](const py::tuple& call, py::handle dout, py::handle dinput, py::handle dweight_in, py::handle dbias_in,
         py::handle dweight_gate, py::handle dbias_gate, py::handle dweight_out, py::handle dbias_out) {
        FeedForwardBackwardArgs args;
        args.problem = read_feed_forward(call);
        const FeedForwardProblem& p = args.problem;
        args.dout = read_matrix(dout, p.tokens, p.out_dim, p.dtype);
        args.dinput = read_new_matrix(dinput, p.tokens, p.model_dim, p.dtype);
        args.dweight_in = read_new_matrix(dweight_in, p.ff_dim, p.model_dim, p.dtype);
        args.dbias_in = read_vector(dbias_in, p.ff_dim, p.dtype);
        args.dweight_gate = read_new_matrix(dweight_gate, p.ff_dim, p.model_dim, p.dtype);
        args.dbias_gate = read_vector(dbias_gate, p.ff_dim, p.dtype);
        args.dweight_out = read_new_matrix(dweight_out, p.out_dim, p.ff_dim, p.dtype);
        args.dbias_out = read_vector(dbias_out, p.out_dim, p.dtype);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH_AMX(feed_forward_backward, args);
      },
      "Writes the gradients of a spec.FeedForwardCall with input [tokens, model_dim], not float64; None for one that "
      "is not wanted.");
}

// Tensors [rows, columns] of one shape, side by side.
JoinedMatrix read_joined(const py::list& parts, int64_t rows, int64_t columns, DType dtype) {
  JoinedMatrix joined;
  joined.count = static_cast<int64_t>(parts.size());
  if (joined.count < 1 || joined.count > JoinedMatrix::kMost)
    throw std::invalid_argument("expected one to three parts");
  for (int64_t i = 0; i < joined.count; ++i) {
    const Matrix part = read_matrix(parts[static_cast<size_t>(i)], rows, columns, dtype);
    joined.data[i] = part.data;
    joined.row_stride[i] = part.row_stride;
  }
  return joined;
}

bool linear([[maybe_unused]] const LinearArgs& args) {
#if defined(FASTATTN_HAS_AMX)
  return current_isa() == Isa::kAmx && amx::linear(args);
#else
  return false;
#endif
}

void register_linear(py::module_& m) {
  m.def(
      "linear",
      [](const py::list& left, bool left_transposed, py::handle right, bool right_transposed, py::handle bias,
         const py::list& out) {
        const TensorInfo first = read_tensor(left[0]), last = read_tensor(right), result = read_tensor(out[0]);
        const auto parts = static_cast<int64_t>(left.size()), out_parts = static_cast<int64_t>(out.size());
        LinearArgs args;
        args.rows = result.size[0];
        args.columns = result.size[1] * out_parts;
        args.depth = last.size[right_transposed ? 1 : 0];
        args.dtype = first.dtype;
        args.left_transposed = left_transposed;
        args.left = left_transposed ? read_joined(left, args.depth, args.rows / parts, args.dtype)
                                    : read_joined(left, args.rows, args.depth / parts, args.dtype);
        args.right_transposed = right_transposed;
        const Matrix matrix = right_transposed ? read_matrix(right, args.columns, args.depth, args.dtype)
                                               : read_matrix(right, args.depth, args.columns, args.dtype);
        args.right = matrix.data;
        args.right_stride = matrix.row_stride;
        args.bias = read_vector(bias, args.columns, args.dtype);
        args.wide = result.dtype == DType::kFloat32;
        args.out = read_joined(out, args.rows, args.columns / out_parts, args.wide ? result.dtype : args.dtype);
        for (const py::handle part : out) read_new(part);
        const auto fits = [](int64_t size, int64_t count) { return count == 1 || size % (32 * count) == 0; };
        if (!fits(left_transposed ? args.rows : args.depth, parts) || !fits(args.columns, out_parts)) {
          throw std::invalid_argument("several parts must have multiples of 32 columns each");
        }
        py::gil_scoped_release release;
        return linear(args);
      },
      "Writes out = left @ right + bias, in float32 if that is out's dtype; `left` and `out` are lists of matrices, "
      "side "
      "by side, that are not empty. False: it has to be computed otherwise.");
}

void register_logits(py::module_& m) {
  m.def(
      "logits_statistics",
      [](py::handle logits, py::handle highest, py::handle sum, py::handle total) {
        const TensorInfo info = read_tensor(logits);
        const Matrix matrix = read_matrix(logits, info.size[0], info.size[1], DType::kFloat32);
        const LogitsArgs args{info.size[0], info.size[1], static_cast<float*>(matrix.data), matrix.row_stride};
        auto* max = static_cast<float*>(read_vector(highest, args.rows, DType::kFloat32));
        auto* exps = static_cast<double*>(read_vector(sum, args.rows, DType::kFloat64));
        auto* sums = static_cast<double*>(read_vector(total, args.rows, DType::kFloat64));
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(logits_statistics, args, max, exps, sums);
      },
      "Adds more classes, float32 [rows, classes], to each row's maximum, sum of exponentials below it and sum.");
  m.def(
      "logits_gradient",
      [](py::handle logits, py::handle lse, py::handle scale, double less, py::handle out) {
        const TensorInfo info = read_tensor(logits);
        const Matrix matrix = read_matrix(logits, info.size[0], info.size[1], DType::kFloat32);
        const LogitsArgs args{info.size[0], info.size[1], static_cast<float*>(matrix.data), matrix.row_stride};
        const auto* lses = static_cast<const float*>(read_vector(lse, args.rows, DType::kFloat32));
        const auto* scales = static_cast<const float*>(read_vector(scale, args.rows, DType::kFloat32));
        const DType dtype = read_dtype(out);
        const Matrix to = read_matrix(out, args.rows, args.columns, dtype);
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(logits_gradient, args, lses, scales, static_cast<float>(less), to.data, to.row_stride, dtype);
      },
      "Writes (exp(logits - lse) - less) * scale, float32 or half precision, for float32 [rows, classes].");
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastattn's C++ kernels.";
  fastattn::fetch_python_objects();
  fastattn::register_isa(m);
  fastattn::register_dropout(m);
  fastattn::register_dropout_mask(m);
  fastattn::register_limits(m);
  fastattn::register_feed_forward(m);
  fastattn::register_linear(m);
  fastattn::register_logits(m);
  fastattn::register_attention_forward(m);
  fastattn::register_attention_backward(m);
  fastattn::register_norm(m);
  fastattn::register_embedding(m);
  fastattn::register_rotary_embedding(m);
  fastattn::register_attention_weights(m);
  fastattn::register_softmax(m);
  fastattn::register_plain_calls(m);
}
