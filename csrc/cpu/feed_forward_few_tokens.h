// The feed-forward's backward for a handful of tokens: the equations of feed_forward_gradients.h with tokens as lanes.
//
// There is more to read and to write than to multiply. So W_in and W_gate, being left operands, are read where they
// lie: all tokens are a single panel on the right. Of W_out, whose columns belong to a task, some rows at a time are
// packed for dout to be multiplied by. And the weights' gradients, sums over those tokens alone, go from registers to
// where they are to stand. A task is a group of hidden units; into dx tasks add in turn.
#pragma once

#include "feed_forward_backward.h"
#include "feed_forward_blocks.h"
#include "feed_forward_gradients.h"
#include "stream.h"

namespace fastattn::FASTATTN_ISA {

template <typename T>
class FewTokensGradients {
 public:
  static constexpr int64_t kMostTokens = kLanes;

  explicit FewTokensGradients(const FeedForwardBackwardArgs& args) : args_(args), p_(args.problem) {
    gated_ = p_.weight_gate.data != nullptr;
    wants_dx_ = args.dinput.data != nullptr;
    wants_dhidden_ = wants_dx_ || args.dweight_in.data != nullptr || args.dbias_in != nullptr ||
                     args.dweight_gate.data != nullptr || args.dbias_gate != nullptr;
    dout_row_ = round_up(p_.out_dim, FloatVec::kWidth);
  }

  void run() {
    if (args_.dbias_out != nullptr) sum_dout<T>(args_);
    if (!wants_dhidden_ && args_.dweight_out.data == nullptr) return;
    const auto carve_shared = [&](Carver& carver) {
      x_t_ = carver.take<float>(panel_size<float>(round_up(p_.model_dim, FloatVec::kWidth)));
      dx_t_ = carver.take<float>(panel_size<float>(round_up(p_.model_dim, FloatVec::kWidth)));
      x_ = carver.take<float>(panels_size<float>(p_.tokens, p_.model_dim));
      dout_ = carver.take<float>(p_.tokens * dout_row_);
    };
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure(carve_shared))));
    carve_shared(shared);
    const T *x = at(p_.input, 0, 0), *dout = at(args_.dout, 0, 0);
    pack_transposed(x_t_, x, p_.input.row_stride, p_.model_dim, p_.tokens);
    pack(x_, x, p_.input.row_stride, p_.tokens, p_.model_dim, panel_size<float>(p_.tokens));
    for (int64_t t = 0; t < p_.tokens; ++t) {
      for_each_vec<float>(p_.out_dim, [&](int64_t i, auto n) {
        store(dout_ + t * dout_row_ + i, load_as_n<float>(dout + t * args_.dout.row_stride + i, n));
      });
    }
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    const auto prepare = [&] {
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure([&](Carver& c) { carve(c); }))));
      return carve(carver);
    };
    turn_ = 0;
    parallel_in_order(ceil_div(p_.ff_dim, kUnits), work, prepare, [&](const Task& task, int64_t index) {
      run_task(task, index * kUnits, min(kUnits, p_.ff_dim - index * kUnits), index);
    });
    if (wants_dx_) write_dx();
  }

 private:
  static constexpr int64_t kUnits = 128;
  static constexpr int64_t kOutRows = 64;  // of W_out: 32 KiB, which stay in the first-level cache
  static constexpr bool kInPlace = sizeof(T) == sizeof(float);

  struct Task {
    float *in, *gate;                    // [kUnits, row()], where weights are no float32
    float* out;                          // panels [kOutRows, kUnits]
    float* dhidden_t;                    // [tokens, kUnits]
    float *before, *gate_sum, *dhidden;  // [kUnits, kLanes]; later hidden, dgate and dbefore
    float* hidden_t;                     // panels [tokens, kUnits]
  };
  Task carve(Carver& carver) const {
    Task task{};
    if (!kInPlace) task.in = carver.take<float>(kUnits * row());
    if (!kInPlace && gated_) task.gate = carver.take<float>(kUnits * row());
    task.out = carver.take<float>(panels_size<float>(kOutRows, kUnits));
    task.dhidden_t = carver.take<float>(p_.tokens * kUnits);
    task.before = carver.take<float>(kUnits * kLanes);
    task.gate_sum = carver.take<float>(kUnits * kLanes);
    task.dhidden = carver.take<float>(kUnits * kLanes);
    task.hidden_t = carver.take<float>(panels_size<float>(p_.tokens, kUnits));
    return task;
  }
  int64_t row() const { return round_up(p_.model_dim, FloatVec::kWidth) + FloatVec::kWidth; }

  static const T* at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  }

  void run_task(const Task& task, int64_t f, int64_t units, int64_t turn) {
    const Block in = left_rows(p_.weight_in, f, units, task.in), gate = left_rows(p_.weight_gate, f, units, task.gate);
    sum_products(units, in, task.before);
    if (gated_) sum_products(units, gate, task.gate_sum);
    if (wants_dhidden_) multiply_dout(task, f, units);
    visit_activation(p_.activation, [&](auto tag) { apply<decltype(tag)::kValue>(task, f, units); });
    // hidden stands in `before` now, dbefore in `dhidden`, dgate in `gate_sum`.
    if (args_.dweight_out.data != nullptr) {
      pack_transposed(task.hidden_t, task.before, kLanes, p_.tokens, units);
      write_product(args_.dweight_out, 0, f, p_.out_dim, units, dout_, 1, dout_row_, task.hidden_t);
    }
    const auto write_rows = [&](const Matrix& to, const float* from) {
      if (to.data != nullptr) write_product(to, f, 0, units, p_.model_dim, from, kLanes, 1, x_);
    };
    write_rows(args_.dweight_in, task.dhidden);
    write_rows(args_.dweight_gate, task.gate_sum);
    stream_end();
    if (args_.dbias_in != nullptr) sum_rows(args_.dbias_in, f, units, task.dhidden);
    if (args_.dbias_gate != nullptr) sum_rows(args_.dbias_gate, f, units, task.gate_sum);
    if (!wants_dx_) return;
    wait_for_turn(&turn_, turn);
    const auto add_dx = [&](const Block& weight, const float* from, bool start) {
      multiply<float>(p_.model_dim, p_.tokens, units, weight.data, 1, weight.row_stride, from, 0,
                      [&](int64_t i, int64_t t, FloatVec value) {
                        float* p = dx_t_ + i * kLanes + t;
                        store(p, start ? value : load(p) + value);
                      });
    };
    add_dx(in, task.dhidden, turn == 0);
    if (gated_) add_dx(gate, task.gate_sum, false);
    pass_turn(&turn_);
  }

  // Rows of a weight as a left operand: where they lie, or widened. Empty for an absent weight.
  Block left_rows(const Matrix& weight, int64_t first, int64_t rows, float* buffer) const {
    if constexpr (kInPlace) {
      return {weight.data == nullptr ? nullptr : at(weight, first, 0), weight.row_stride};
    } else {
      for (int64_t i = 0; i < rows && weight.data != nullptr; ++i) {
        const T* from = at(weight, first + i, 0);
        for_each_vec<float>(p_.model_dim,
                            [&](int64_t k, auto n) { store(buffer + i * row() + k, load_as_n<float>(from + k, n)); });
      }
      return {buffer, row()};
    }
  }

  // to[i][token] = W[i] . x[token], in steps of kDepth.
  void sum_products(int64_t rows, const Block& weight, float* to) const {
    for (int64_t k = 0; k < p_.model_dim; k += kDepth) {
      multiply<float>(rows, p_.tokens, min(kDepth, p_.model_dim - k), weight.data + k, weight.row_stride, 1,
                      x_t_ + k * kLanes, 0, [&](int64_t i, int64_t t, FloatVec value) {
                        float* p = to + i * kLanes + t;
                        store(p, k == 0 ? value : load(p) + value);
                      });
    }
  }

  // dhidden[i][token] = dout[token] . W_out[..][f + i], in steps of kOutRows.
  void multiply_dout(const Task& task, int64_t f, int64_t units) const {
    for (int64_t o = 0; o < p_.out_dim; o += kOutRows) {
      const int64_t depth = min(kOutRows, p_.out_dim - o);
      pack(task.out, at(p_.weight_out, o, f), p_.weight_out.row_stride, depth, units, panel_size<float>(depth));
      multiply<float>(p_.tokens, units, depth, dout_ + o, dout_row_, 1, task.out, panel_size<float>(depth),
                      [&](int64_t t, int64_t i, FloatVec value) {
                        float* p = task.dhidden_t + t * kUnits + i;
                        store(p, o == 0 ? value : load(p) + value);
                      });
    }
    constexpr int W = FloatVec::kWidth;
    for (int64_t t = 0; t < p_.tokens; t += W) {
      for (int64_t i = 0; i < units; i += W) {
        FloatVec square[W];
        for (int k = 0; k < W; ++k) {
          square[k] = t + k < p_.tokens ? load(task.dhidden_t + (t + k) * kUnits + i) : FloatVec::zero();
        }
        transpose<float>(square);
        for (int k = 0; k < W; ++k) store(task.dhidden + (i + k) * kLanes + t, square[k]);
      }
    }
  }

  // to[row + i][column + n] = sum over tokens of a(i, token) * panels[token][n], rounded once.
  void write_product(const Matrix& to, int64_t row, int64_t column, int64_t rows, int64_t columns, const float* a,
                     int64_t a_row, int64_t a_column, const float* panels) const {
    T* first = static_cast<T*>(to.data) + row * to.row_stride + column;
    // All rows of all weights together are too large for the caches to keep, and reading them first would cost as much
    // again.
    constexpr uintptr_t kRegister = FloatVec::kWidth * sizeof(T);
    const bool past_caches = reinterpret_cast<uintptr_t>(first) % kRegister == 0 &&
                             static_cast<uintptr_t>(to.row_stride) * sizeof(T) % kRegister == 0 &&
                             p_.ff_dim * max(p_.model_dim, p_.out_dim) * static_cast<int64_t>(sizeof(T)) >= kCacheBytes;
    multiply<float>(rows, columns, p_.tokens, a, a_row, a_column, panels, panel_size<float>(p_.tokens),
                    [&](int64_t i, int64_t n, FloatVec value) {
                      T* p = first + i * to.row_stride + n;
                      if (n + FloatVec::kWidth <= columns) {
                        past_caches ? stream(p, value) : store(p, value);
                      } else {
                        store_n(p, value, static_cast<int>(columns - n));
                      }
                    });
  }

  template <Activation A>
  void apply(const Task& task, int64_t f, int64_t units) const {
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    const bool drops = p_.dropout.threshold != 0;
    uint64_t keep[4] = {};
    for (int64_t i = 0; i < units; ++i) {
      if (drops && i % 4 == 0) {
        dropout_keep_bits_of_rows(p_.dropout, 0, 0, static_cast<uint64_t>(f + i), kLanes, keep);
      }
      const FloatVec bias = broadcast<T>(p_.bias_in, f + i), gate_bias = broadcast<T>(p_.bias_gate, f + i);
      for (int64_t t = 0; t < p_.tokens; t += FloatVec::kWidth) {
        const int64_t index = i * kLanes + t;
        const FloatVec gate = gated_ ? load(task.gate_sum + index) + gate_bias : zero;
        const HiddenGradients found = differentiate_hidden<A>(load(task.before + index) + bias,
                                                              wants_dhidden_ ? load(task.dhidden + index) : zero,
                                                              gated_, gate, drops, keep[i % 4] >> t, rescale);
        store(task.before + index, found.hidden);
        store(task.dhidden + index, found.dbefore);
        if (gated_) store(task.gate_sum + index, found.dgate);
      }
    }
  }

  // to[f + i] = the sum of row i over all tokens.
  void sum_rows(void* to, int64_t f, int64_t count, const float* rows) const {
    for_each_vec<float>(count, [&](int64_t i, auto n) {
      float sums[FloatVec::kWidth] = {};
      for (int64_t k = 0; k < n; ++k) {
        double sum = 0;
        for (int64_t t = 0; t < p_.tokens; ++t) sum += static_cast<double>(rows[(i + k) * kLanes + t]);
        sums[k] = static_cast<float>(sum);
      }
      store_n(static_cast<T*>(to) + f + i, load(sums), n);
    });
  }

  void write_dx() const {
    constexpr int W = FloatVec::kWidth;
    for (int64_t t = 0; t < p_.tokens; t += W) {
      for (int64_t d = 0; d < p_.model_dim; d += W) {
        FloatVec square[W];
        for (int k = 0; k < W; ++k) square[k] = load(dx_t_ + (d + k) * kLanes + t);
        transpose<float>(square);
        for (int64_t k = 0; k < min(W, p_.tokens - t); ++k) {
          store_n(static_cast<T*>(args_.dinput.data) + (t + k) * args_.dinput.row_stride + d, square[k],
                  static_cast<int>(min(W, p_.model_dim - d)));
        }
      }
    }
  }

  const FeedForwardBackwardArgs& args_;
  const FeedForwardProblem& p_;
  bool gated_, wants_dx_, wants_dhidden_;
  int64_t dout_row_;
  // What all tasks share: x^T and dx^T as panels [.., kLanes], x as panels, dout as rows; all float32.
  float *x_t_ = nullptr, *dx_t_ = nullptr, *x_ = nullptr, *dout_ = nullptr;
  int32_t turn_ = 0;  // which task's turn it is to add to dx
};

}  // namespace fastattn::FASTATTN_ISA
