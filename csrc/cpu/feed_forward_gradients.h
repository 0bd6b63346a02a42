// The feed-forward's backward, over whatever multiplies: an Engine of register tiles or of AMX tiles.
//
//   B = x W_in^T + b_in, G = x W_gate^T + b_gate, H = drop(act(B) * G), dH = drop(dout W_out)
//   dB = dH * G * act'(B), dG = dH * act(B)
//   dW_out = dout^T H, dW_in = dB^T x, dW_gate = dG^T x, dx = dB W_in + dG W_gate
//
// A task is a group of hidden units against all tokens, a block of them at a time. It packs its rows and columns of the
// weights once and keeps their gradients to itself; into dx the tasks add in turn, in the order of their units. So
// every sum has one order whatever the threads, H and dB are never held for more than a block of tokens and a group of
// units, and nothing is computed twice. Memory: dx in float32 (its own where that is its dtype), and each thread's
// group.
//
// An Engine has
//   kUnits          a group is a multiple of so many hidden units
//   kDepth          blocks of tokens of any multiple of it give the same bits
//   kRows, kColumns what results are rounded up to in memory; their columns come in blocks of kColumns
//   kBytes          of an element of a packed operand
//   Left, Right     packed operands of left * right; at(row or column, depth) is a part, from multiples of kRows on
//   take_left, take_right, transposed    their memory; that of a left operand's transpose, in the same place
//   pack_left, pack_left_transposed, pack_right, pack_right_transposed    from rows of any storage type
//   product(rows, columns, depth, left, right, to, start)    to = left * right, or += unless it is the start
// and its pack_* return false where what they met cannot be packed exactly.
#pragma once

#include "activation.h"
#include "feed_forward_backward.h"
#include "feed_forward_groups.h"
#include "panel.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

// Adds up vectors of float in double: a gradient of a bias is one long sum, of which PyTorch too loses next to nothing.
class DoubleSum {
 public:
  void add(const float* x) {
    low_ = low_ + to_double(x);
    high_ = high_ + to_double(x + DoubleVec::kWidth);
  }
  void load_from(const double* from) {
    low_ = load(from);
    high_ = load(from + DoubleVec::kWidth);
  }
  void store_to(double* to) const {
    store(to, low_);
    store(to + DoubleVec::kWidth, high_);
  }

 private:
  static_assert(FloatVec::kWidth == 2 * DoubleVec::kWidth);
  DoubleVec low_ = DoubleVec::zero(), high_ = DoubleVec::zero();
};

// to[first + i] = from[i], rounded once.
template <typename T>
inline void write_sums(void* to, int64_t first, int64_t count, const double* from) {
  for_each_vec<float>(count, [&](int64_t i, auto n) {
    float sums[FloatVec::kWidth];
    for (int k = 0; k < FloatVec::kWidth; ++k) sums[k] = static_cast<float>(from[i + k]);
    store_n(static_cast<T*>(to) + first + i, load(sums), n);
  });
}

// The gradient of bias_out: the sum of dout over all tokens.
template <typename T>
inline void sum_dout(const FeedForwardBackwardArgs& args) {
  constexpr int64_t kWide = 64;
  const int64_t tokens = args.problem.tokens, columns = args.problem.out_dim;
  const double work = static_cast<double>(tokens) * static_cast<double>(columns);
  parallel_for(ceil_div(columns, kWide), work, [&](int64_t task) {
    const int64_t column = task * kWide;
    for_each_vec<float>(min(kWide, columns - column), [&](int64_t i, auto n) {
      const T* from = static_cast<const T*>(args.dout.data) + column + i;
      DoubleSum sum;
      for (int64_t t = 0; t < tokens; ++t) {
        float row[FloatVec::kWidth];
        store(row, load_as_n<float>(from + t * args.dout.row_stride, n));
        sum.add(row);
      }
      double sums[FloatVec::kWidth];
      sum.store_to(sums);
      write_sums<T>(args.dbias_out, column + i, n, sums);
    });
  });
}

template <typename T, typename Engine>
class FeedForwardGradients {
 public:
  // Tasks follow each other a part of a block apart: many threads want many blocks.
  explicit FeedForwardGradients(const FeedForwardBackwardArgs& args)
      : args_(args),
        p_(args.problem),
        blocks_(
            token_blocks<Engine>(p_.tokens, max(p_.model_dim, p_.out_dim), max_threads() > 1 ? 2 * max_threads() : 1)),
        dx_(args.dinput, p_.tokens, p_.model_dim, blocks_) {
    gated_ = p_.weight_gate.data != nullptr;
    wants_dx_ = args.dinput.data != nullptr;
    wants_dhidden_ = wants_dx_ || args.dweight_in.data != nullptr || args.dbias_in != nullptr ||
                     args.dweight_gate.data != nullptr || args.dbias_gate != nullptr;
  }

  // Returns whether the Engine could pack all there was to multiply; if not, the gradients are void.
  bool run() {
    if (args_.dbias_out != nullptr) sum_dout<T>(args_);
    if (!wants_dhidden_ && args_.dweight_out.data == nullptr) return true;
    const auto bytes = [&](int64_t subblocks) { return measure([&](Carver& carver) { carve(carver, subblocks); }); };
    const UnitGroups groups = unit_groups<Engine>(p_.ff_dim, p_.tokens, max_threads(), bytes);
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure([&](Carver& carver) { dx_.carve(carver); }))));
    dx_.carve(shared);
    dx_.start();
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    const auto prepare = [&] {
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(bytes(groups.group))));
      return carve(carver, groups.group);
    };
    parallel_in_order(groups.tasks, work, prepare, [&](const Task& task, int64_t index) {
      run_task(task, groups.begin(index), groups.begin(index + 1), index, index == groups.tasks - 1);
    });
    return packed_;
  }

 private:
  using Left = typename Engine::Left;
  using Right = typename Engine::Right;
  using Result = ProductResult<Engine::kColumns>;
  static constexpr int64_t kUnits = Engine::kUnits, kColumns = Engine::kColumns, kRows = Engine::kRows;

  // What one thread needs for a task: packed operands, and sums in float32.
  struct Task {
    int64_t group;                        // hidden units there is room for
    Right in_t, gate_t, out;              // W_in^T, W_gate^T and W_out of the group
    Right in;                             // W_in and W_gate, joined: [joined(group), model_dim]
    Left x, x_t, dout, dout_t;            // of a block of tokens, each pair in the same memory
    Left dbefore;                         // dbefore and dgate, joined: [block, joined(group)]
    Right right;                          // hidden, dbefore or dgate of kUnits: [block, kUnits]
    Result before, gate_sum, dhidden;     // [block, group]; later hidden, dgate and dbefore
    Result dweight_in_t, dweight_gate_t;  // [model_dim, group]
    Result dweight_out;                   // [out_dim, group]
    double *dbias_in, *dbias_gate;        // [group]
    uint64_t* keep;                       // [block]: of 64 units, those that dropout spares
  };

  Task carve(Carver& carver, int64_t subblocks) const {
    Task task;
    const int64_t group = subblocks * kUnits;
    const auto floats = [&](int64_t count) { return carver.template take<float>(count); };
    const auto by_rows = [&] { return Result{floats(blocks_.size * group), group, kColumns}; };
    // A block of columns after the other, so that they are read and written from first to last.
    const auto by_columns = [&](int64_t n) {
      const int64_t rows = round_up(n, max(kRows, FloatVec::kWidth));
      return Result{floats(rows * group), kColumns, rows * kColumns};
    };
    task.group = group;
    task.in_t = Engine::take_right(carver, p_.model_dim, group);
    task.out = Engine::take_right(carver, p_.out_dim, group);
    task.in = Engine::take_right(carver, joined(group), p_.model_dim);
    task.x = Engine::take_left(carver, blocks_.size, p_.model_dim);
    task.x_t = Engine::transposed(task.x, blocks_.size);
    task.dout = Engine::take_left(carver, blocks_.size, p_.out_dim);
    task.dout_t = Engine::transposed(task.dout, blocks_.size);
    task.dbefore = Engine::take_left(carver, blocks_.size, joined(group));
    task.right = Engine::take_right(carver, blocks_.size, kUnits);
    task.before = by_rows();
    task.dhidden = by_rows();
    task.dweight_in_t = by_columns(p_.model_dim);
    task.dweight_out = by_columns(p_.out_dim);
    task.dbias_in = carver.template take<double>(group);
    task.keep = carver.template take<uint64_t>(blocks_.size);
    if (gated_) {
      task.gate_t = Engine::take_right(carver, p_.model_dim, group);
      task.gate_sum = by_rows();
      task.dweight_gate_t = by_columns(p_.model_dim);
      task.dbias_gate = carver.template take<double>(group);
    }
    return task;
  }

  // The hidden units of sub-blocks [begin, end) against all tokens.
  void run_task(const Task& task, int64_t begin, int64_t end, int64_t turn, bool last) const {
    const int64_t first = begin * kUnits, units = min(end * kUnits, p_.ff_dim) - first;
    pack_weights(task, first, units);
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const int64_t token = block * blocks_.size, tokens = min(blocks_.size, p_.tokens - token);
      differentiate(task, first, units, token, tokens);
      if (wants_dx_) {
        dx_.add(block, turn, last, nullptr, [&](const Result& dx) {
          Engine::product(tokens, p_.model_dim, joined(units), task.dbefore, task.in, dx, turn == 0);
        });
      }
    }
    write_weights(task, first, units);
  }

  // Where a gate's kUnits follow those of W_in, so that a sum over both has one order however many units a task has:
  // how far the first `units` of the joined dimension reach, and where the gates of the units from f on begin.
  int64_t joined(int64_t units) const {
    const int64_t rest = units % kUnits;
    return gated_ ? 2 * (units - rest) + round_up(rest, kRows) + rest : units;
  }
  int64_t joined_gate(int64_t f, int64_t units) const { return 2 * f + round_up(min(kUnits, units - f), kRows); }

  void note(bool packed) const {
    if (!packed) __atomic_store_n(&packed_, false, __ATOMIC_RELAXED);
  }

  static const T* at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  }

  void pack_weights(const Task& task, int64_t first, int64_t units) const {
    const auto pack_transposed = [&](const Matrix& weight, const Right& to) {
      note(Engine::pack_right_transposed(to, at(weight, first, 0), weight.row_stride, p_.model_dim, units));
    };
    pack_transposed(p_.weight_in, task.in_t);
    if (gated_) pack_transposed(p_.weight_gate, task.gate_t);
    for (int64_t f = 0; wants_dx_ && f < units; f += kUnits) {
      const auto pack = [&](const Matrix& weight, int64_t depth) {
        const T* from = at(weight, first + f, 0);
        note(Engine::pack_right(task.in.at(0, depth), from, weight.row_stride, min(kUnits, units - f), p_.model_dim));
      };
      pack(p_.weight_in, joined(f));
      if (gated_) pack(p_.weight_gate, joined_gate(f, units));
    }
    if (!wants_dhidden_) return;
    note(Engine::pack_right(task.out, at(p_.weight_out, 0, first), p_.weight_out.row_stride, p_.out_dim, units));
  }

  // Computes what a block of tokens adds to the weights' gradients, and dbefore and dgate. One product after the other:
  // each finds its block of tokens in the second-level cache, while weights and their gradients pass by.
  void differentiate(const Task& task, int64_t first, int64_t units, int64_t token, int64_t tokens) const {
    const T *x = at(p_.input, token, 0), *dout = at(args_.dout, token, 0);
    note(Engine::pack_left(task.x, x, p_.input.row_stride, tokens, p_.model_dim));
    Engine::product(tokens, units, p_.model_dim, task.x, task.in_t, task.before, true);
    if (gated_) Engine::product(tokens, units, p_.model_dim, task.x, task.gate_t, task.gate_sum, true);
    note(Engine::pack_left(task.dout, dout, args_.dout.row_stride, tokens, p_.out_dim));
    if (wants_dhidden_) Engine::product(tokens, units, p_.out_dim, task.dout, task.out, task.dhidden, true);
    visit_activation(p_.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::kValue;
      gated_ ? apply<kActivation, true>(task, first, units, token, tokens)
             : apply<kActivation, false>(task, first, units, token, tokens);
    });
    // hidden stands in `before` now, dbefore in `dhidden`, dgate in `gate_sum`.
    for (int64_t f = 0; wants_dx_ && f < units; f += kUnits) {
      const auto pack = [&](const Result& from, int64_t depth) {
        note(Engine::pack_left(task.dbefore.at(0, depth), from.data + f, task.group, tokens, min(kUnits, units - f)));
      };
      pack(task.dhidden, joined(f));
      if (gated_) pack(task.gate_sum, joined_gate(f, units));
    }
    // to (+)= left * from, kUnits columns at a time.
    const auto add = [&](int64_t rows, const Left& left, const Result& from, const Result& to) {
      for (int64_t f = 0; f < units; f += kUnits) {
        const int64_t count = min(kUnits, units - f);
        note(Engine::pack_right(task.right, from.data + f, task.group, tokens, count));
        Engine::product(rows, count, tokens, left, task.right, to.at(0, f), token == 0);
      }
    };
    if (args_.dweight_out.data != nullptr) {
      note(Engine::pack_left_transposed(task.dout_t, dout, args_.dout.row_stride, p_.out_dim, tokens));
      add(p_.out_dim, task.dout_t, task.before, task.dweight_out);
    }
    if (args_.dweight_in.data == nullptr && args_.dweight_gate.data == nullptr) return;
    note(Engine::pack_left_transposed(task.x_t, x, p_.input.row_stride, p_.model_dim, tokens));
    if (args_.dweight_in.data != nullptr) add(p_.model_dim, task.x_t, task.dhidden, task.dweight_in_t);
    if (args_.dweight_gate.data != nullptr) add(p_.model_dim, task.x_t, task.gate_sum, task.dweight_gate_t);
  }

  // Turns sums into hidden activations and gradients, in place, and adds up the gradients of the biases.
  template <Activation A, bool kGated>
  void apply(const Task& task, int64_t first, int64_t units, int64_t token, int64_t tokens) const {
    const bool drops = p_.dropout.threshold != 0;
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    for_each_vec<float>(units, [&](int64_t i, auto n) {
      if (drops && i % 64 == 0) draw_kept_units(p_.dropout, token, tokens, first + i, task.keep);
      const FloatVec bias = bias_at<T>(p_.bias_in, first + i, n), gate_bias = bias_at<T>(p_.bias_gate, first + i, n);
      DoubleSum dbias, dbias_gate;
      if (token != 0) {
        dbias.load_from(task.dbias_in + i);
        if constexpr (kGated) dbias_gate.load_from(task.dbias_gate + i);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t index = t * task.group + i;
        float *before = task.before.data + index, *dhidden = task.dhidden.data + index;
        FloatVec gate = zero;
        if constexpr (kGated) gate = load(task.gate_sum.data + index) + gate_bias;
        const HiddenGradients found =
            differentiate_hidden<A>(load(before) + bias, wants_dhidden_ ? load(dhidden) : zero, kGated, gate, drops,
                                    drops ? task.keep[t] >> (i % 64) : 0, rescale);
        store(before, found.hidden);
        store(dhidden, found.dbefore);
        if constexpr (kGated) {
          store(task.gate_sum.data + index, found.dgate);
          dbias_gate.add(task.gate_sum.data + index);
        }
        dbias.add(dhidden);
      }
      dbias.store_to(task.dbias_in + i);
      if constexpr (kGated) dbias_gate.store_to(task.dbias_gate + i);
    });
  }

  void write_weights(const Task& task, int64_t first, int64_t units) const {
    if (args_.dweight_in.data != nullptr) write_transposed(args_.dweight_in, first, units, task.dweight_in_t);
    if (args_.dweight_gate.data != nullptr) write_transposed(args_.dweight_gate, first, units, task.dweight_gate_t);
    if (args_.dweight_out.data != nullptr) {
      for (int64_t o = 0; o < p_.out_dim; ++o) {
        T* to = static_cast<T*>(args_.dweight_out.data) + o * args_.dweight_out.row_stride + first;
        round(to, task.dweight_out.at(o, 0), units);
      }
    }
    if (args_.dbias_in != nullptr) write_sums<T>(args_.dbias_in, first, units, task.dbias_in);
    if (args_.dbias_gate != nullptr) write_sums<T>(args_.dbias_gate, first, units, task.dbias_gate);
  }

  // Rounds the first row of a result, once, to its dtype.
  static void round(T* to, const Result& from, int64_t count) {
    for_each_vec<float>(count, [&](int64_t i, auto n) { store_n(to + i, load(from.at(0, i).data), n); });
  }

  // to[first + i][d] = from[d][i]
  void write_transposed(const Matrix& to, int64_t first, int64_t units, const Result& from) const {
    constexpr int W = FloatVec::kWidth;
    for (int64_t i = 0; i < units; i += W) {
      for (int64_t d = 0; d < p_.model_dim; d += W) {
        const int n = static_cast<int>(min(W, p_.model_dim - d));
        FloatVec square[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) square[k] = load(from.at(d + k, i).data);
        transpose<float>(square);
        T* row = static_cast<T*>(to.data) + (first + i) * to.row_stride + d;
        for (int k = 0; k < min(W, units - i); ++k) store_n(row + k * to.row_stride, square[k], n);
      }
    }
  }

  const FeedForwardBackwardArgs& args_;
  const FeedForwardProblem& p_;
  const TokenBlocks blocks_;
  TurnSum<T, Engine> dx_;
  bool gated_, wants_dx_, wants_dhidden_;
  mutable bool packed_ = true;
};

}  // namespace fastattn::FASTATTN_ISA
