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
//   kUnits               hidden units that are taken at once, a multiple of 64
//   kAlign               what the rows and columns of a result are rounded up to in memory
//   Left, Right          operands of left * right, with `at(row, depth)` and `at(depth)`: where a part begins
//   take_left, take_right, transposed    their memory; that of the transpose, in the same place
//   pack_left, pack_left_transposed, pack_right, pack_right_transposed    from rows of any storage type
//   product(rows, columns, depth, left, right, to, to_stride, start)      to (+)= left * right, in float32
#pragma once

#include "activation.h"
#include "feed_forward_backward.h"
#include "panel.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

template <typename T, typename Engine>
class FeedForwardGradients {
 public:
  explicit FeedForwardGradients(const FeedForwardBackwardArgs& args) : args_(args), p_(args.problem) {
    gated_ = p_.weight_gate.data != nullptr;
    wants_dbefore_ = args.dinput.data != nullptr || args.dweight_in.data != nullptr || args.dbias_in != nullptr;
    wants_dgate_ =
        gated_ && (args.dinput.data != nullptr || args.dweight_gate.data != nullptr || args.dbias_gate != nullptr);
    subblocks_ = ceil_div(p_.ff_dim, kUnits);
    const int64_t fit = kBlockBytes / (static_cast<int64_t>(sizeof(float)) * (p_.model_dim + p_.out_dim));
    block_ = min(max(fit / kLeast * kLeast, kLeast), kMostTokens);
    blocks_ = ceil_div(p_.tokens, block_);
    block_ = round_up(ceil_div(p_.tokens, blocks_), 64);  // of equal size
    blocks_ = ceil_div(p_.tokens, block_);
    x_stride_ = round_up(p_.model_dim, kAlign);
    out_stride_ = round_up(p_.out_dim, kAlign);
  }

  // Returns whether the Engine could pack all there was to multiply; if not, the gradients are void.
  bool run() {
    if (args_.dbias_out != nullptr) sum_dout();
    if (!wants_dbefore_ && !wants_dgate_ && args_.dweight_out.data == nullptr) return true;
    const int64_t threads = max_threads();
    const int64_t more = task_bytes(2) - task_bytes(1);
    const int64_t fit = min(kMostGroup, max((kTaskBytes - task_bytes(1)) / more + 1, 2));
    // As many tasks as threads, or a multiple of it.
    int64_t tasks = ceil_div(subblocks_, fit);
    tasks = subblocks_ >= threads ? min(round_up(tasks, threads), subblocks_) : subblocks_;
    const int64_t group = ceil_div(subblocks_, tasks);

    // dx is added up where it is to stand if that is float32 and whole tiles fit.
    const bool in_place =
        sizeof(T) == sizeof(float) && p_.model_dim % kAlign == 0 && p_.tokens % Engine::kAlignRows == 0;
    const bool owns_dx = args_.dinput.data != nullptr && !in_place;
    const int64_t dx_size = owns_dx ? blocks_ * block_ * x_stride_ : 0;
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(dx_size) * sizeof(float) +
                                                static_cast<size_t>(blocks_) * sizeof(int32_t) + 2 * 64));
    turn_ = shared.take<int32_t>(blocks_);
    for (int64_t block = 0; block < blocks_; ++block) turn_[block] = 0;
    dx_ = owns_dx ? shared.take<float>(dx_size) : static_cast<float*>(args_.dinput.data);
    dx_stride_ = owns_dx ? x_stride_ : args_.dinput.row_stride;
    owns_dx_ = owns_dx;

    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    parallel_in_order(
        tasks, work, [&] { return carve(scratch(Scratch::kThread, static_cast<size_t>(task_bytes(group))), group); },
        [&](const Task& task, int64_t index) {
          run_task(task, index * subblocks_ / tasks, (index + 1) * subblocks_ / tasks, index, index == tasks - 1);
        });
    return packed_;
  }

 private:
  using Left = typename Engine::Left;
  using Right = typename Engine::Right;
  static constexpr int64_t kUnits = Engine::kUnits, kAlign = Engine::kAlign;
  static constexpr int64_t kLeast = 128, kMostTokens = 256;  // tokens of a block, multiples of the products' depth
  static constexpr int64_t kBlockBytes = int64_t{1} << 20;   // of a block's input and dout: half a second-level cache
  static constexpr int64_t kMostGroup = 512 / kUnits;        // units of a task: a block of tokens is packed for each
  static constexpr uintptr_t kAlignment = 64;
  static constexpr int64_t kTaskBytes = int64_t{16} << 20;

  // What belongs to kUnits hidden units of a task.
  struct Units {
    Right in_t, gate_t, out;                             // W_in^T, W_gate^T and W_out
    float *dweight_in_t, *dweight_gate_t, *dweight_out;  // [model_dim or out_dim, kUnits]
    float *dbias_in, *dbias_gate;                        // [2, kUnits]: sums, and what they lost by rounding
  };
  // Adds up a vector for each token as exactly as PyTorch does: sums of a few, then their compensated sum (Kahan,
  // "Further remarks on reducing truncation errors", 1965).
  class Sum {
   public:
    Sum(float* at, bool start) : at_(at) {
      if (at == nullptr) return;
      total_ = start ? FloatVec::zero() : load(at);
      lost_ = start ? FloatVec::zero() : load(at + kUnits);
    }
    void add(FloatVec x, int64_t index) {
      few_ = few_ + x;
      if (index % kFew == kFew - 1) pass_on();
    }
    void finish() {
      pass_on();
      store(at_, total_);
      store(at_ + kUnits, lost_);
    }
    FloatVec total() {
      pass_on();
      return total_;
    }

   private:
    static constexpr int64_t kFew = 16;
    void pass_on() {
      const FloatVec x = few_ - lost_, sum = total_ + x, lost = (sum - total_) - x;
      lost_ = select(eq(lost, lost), lost, FloatVec::zero());  // Inf - Inf
      total_ = sum;
      few_ = FloatVec::zero();
    }
    float* at_;
    FloatVec few_ = FloatVec::zero(), total_ = FloatVec::zero(), lost_ = FloatVec::zero();
  };
  struct Task {
    Units units[kMostGroup];
    Right in, gate;                      // W_in and W_gate of the whole group
    Left x, x_t, dout, dout_t;           // of a block of tokens, each pair in the same memory
    Left dbefore, dgate;                 // [block, group]
    Right right;                         // hidden, dbefore or dgate: [block, kUnits]
    float *before, *gate_sum, *dhidden;  // [group / kUnits][block, kUnits]
    uint64_t* keep;                      // [block, kUnits / 64]
  };

  bool wants_dhidden() const { return wants_dbefore_ || wants_dgate_; }

  Task carve(void* memory, int64_t group) const {
    Carver carver(memory);
    return lay_out(carver, group);
  }
  int64_t task_bytes(int64_t group) const {
    char* const nowhere = reinterpret_cast<char*>(kAlignment);  // measured, never touched
    Carver carver(nowhere);
    lay_out(carver, group);
    return carver.next() - nowhere;
  }
  Task lay_out(Carver& carver, int64_t group) const {
    Task task;
    const auto floats = [&](int64_t count) { return carver.template take<float>(count); };
    for (int64_t g = 0; g < group; ++g) {
      Units& units = task.units[g];
      units.in_t = Engine::take_right(carver, p_.model_dim, kUnits);
      units.out = Engine::take_right(carver, p_.out_dim, kUnits);
      units.dweight_in_t = floats(x_stride_ * kUnits);
      units.dweight_out = floats(out_stride_ * kUnits);
      units.dbias_in = floats(2 * kUnits);
      if (gated_) {
        units.gate_t = Engine::take_right(carver, p_.model_dim, kUnits);
        units.dweight_gate_t = floats(x_stride_ * kUnits);
        units.dbias_gate = floats(2 * kUnits);
      }
    }
    task.in = Engine::take_right(carver, group * kUnits, p_.model_dim);
    task.x = Engine::take_left(carver, block_, p_.model_dim);
    task.x_t = Engine::transposed(task.x, block_);
    task.dout = Engine::take_left(carver, block_, p_.out_dim);
    task.dout_t = Engine::transposed(task.dout, block_);
    task.dbefore = Engine::take_left(carver, block_, group * kUnits);
    task.right = Engine::take_right(carver, block_, kUnits);
    task.before = floats(block_ * group * kUnits);
    task.dhidden = floats(block_ * group * kUnits);
    if (gated_) {
      task.gate = Engine::take_right(carver, group * kUnits, p_.model_dim);
      task.dgate = Engine::take_left(carver, block_, group * kUnits);
      task.gate_sum = floats(block_ * group * kUnits);
    }
    task.keep = carver.template take<uint64_t>(block_ * kUnits / 64);
    return task;
  }

  // The hidden units of sub-blocks [begin, end) against all tokens.
  void run_task(const Task& task, int64_t begin, int64_t end, int64_t turn, bool last) const {
    const int64_t first = begin * kUnits, units = min(end * kUnits, p_.ff_dim) - first;
    pack_weights(task, first, units);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t token = block * block_, tokens = min(block_, p_.tokens - token);
      differentiate(task, first, units, token, tokens);
      if (args_.dinput.data != nullptr) {
        // All else needs no order: threads meet here alone.
        wait_for_turn(turn_ + block, turn);
        add_dx(task, token, tokens, units, turn == 0);
        if (last && owns_dx_) write_dx(token, tokens);
        pass_turn(turn_ + block);
      }
    }
    for (int64_t f = 0; f < units; f += kUnits) {
      write_weights(task.units[f / kUnits], first + f, min(kUnits, units - f));
    }
  }

  void note(bool packed) const {
    if (!packed) __atomic_store_n(&packed_, false, __ATOMIC_RELAXED);
  }

  static const T* at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  }

  void pack_weights(const Task& task, int64_t first, int64_t units) const {
    const auto pack_t = [&](const Right& to, const Matrix& weight, int64_t f, int64_t count) {
      note(Engine::pack_right_transposed(to, at(weight, f, 0), weight.row_stride, p_.model_dim, count));
    };
    for (int64_t f = 0; f < units; f += kUnits) {
      const Units& to = task.units[f / kUnits];
      const int64_t count = min(kUnits, units - f);
      pack_t(to.in_t, p_.weight_in, first + f, count);
      if (gated_) pack_t(to.gate_t, p_.weight_gate, first + f, count);
      if (wants_dhidden()) {
        note(Engine::pack_right(to.out, at(p_.weight_out, 0, first + f), p_.weight_out.row_stride, p_.out_dim, count));
      }
    }
    if (args_.dinput.data == nullptr) return;
    note(Engine::pack_right(task.in, at(p_.weight_in, first, 0), p_.weight_in.row_stride, units, p_.model_dim));
    if (gated_) {
      note(Engine::pack_right(task.gate, at(p_.weight_gate, first, 0), p_.weight_gate.row_stride, units, p_.model_dim));
    }
  }

  // Computes what a block of tokens adds to the weights' gradients, and dbefore and dgate. One product after the other
  // for the whole group: each then finds its block of tokens in the second-level cache.
  void differentiate(const Task& task, int64_t first, int64_t units, int64_t token, int64_t tokens) const {
    const T *x = at(p_.input, token, 0), *dout = at(args_.dout, token, 0);
    const bool start = token == 0;
    // Calls body(Units, f, count, sums' offset) for each kUnits hidden units.
    const auto for_each_units = [&](const auto& body) {
      for (int64_t f = 0; f < units; f += kUnits) body(task.units[f / kUnits], f, min(kUnits, units - f), f * block_);
    };
    note(Engine::pack_left(task.x, x, p_.input.row_stride, tokens, p_.model_dim));
    for_each_units([&](const Units& unit, int64_t, int64_t count, int64_t at) {
      Engine::product(tokens, count, p_.model_dim, task.x, unit.in_t, task.before + at, kUnits, true);
      if (gated_) Engine::product(tokens, count, p_.model_dim, task.x, unit.gate_t, task.gate_sum + at, kUnits, true);
    });
    if (wants_dhidden()) {
      note(Engine::pack_left(task.dout, dout, args_.dout.row_stride, tokens, p_.out_dim));
      for_each_units([&](const Units& unit, int64_t, int64_t count, int64_t at) {
        Engine::product(tokens, count, p_.out_dim, task.dout, unit.out, task.dhidden + at, kUnits, true);
      });
    }
    for_each_units([&](const Units& unit, int64_t f, int64_t count, int64_t at) {
      visit_activation(p_.activation, [&](auto tag) {
        constexpr Activation kActivation = decltype(tag)::kValue;
        gated_ ? apply<kActivation, true>(task, unit, token, tokens, first + f, count, at)
               : apply<kActivation, false>(task, unit, token, tokens, first + f, count, at);
      });
      if (args_.dinput.data != nullptr) {
        note(Engine::pack_left(task.dbefore.at(0, f), task.dhidden + at, kUnits, tokens, count));
        if (gated_) note(Engine::pack_left(task.dgate.at(0, f), task.gate_sum + at, kUnits, tokens, count));
      }
    });
    // hidden stands in `before` now, dbefore in `dhidden`, dgate in `gate_sum`.
    if (args_.dweight_out.data != nullptr) {
      if (!wants_dhidden()) note(Engine::pack_left(task.dout, dout, args_.dout.row_stride, tokens, p_.out_dim));
      note(Engine::pack_left_transposed(task.dout_t, dout, args_.dout.row_stride, p_.out_dim, tokens));
      for_each_units([&](const Units& unit, int64_t, int64_t count, int64_t at) {
        note(Engine::pack_right(task.right, task.before + at, kUnits, tokens, count));
        Engine::product(p_.out_dim, count, tokens, task.dout_t, task.right, unit.dweight_out, kUnits, start);
      });
    }
    if (args_.dweight_in.data == nullptr && args_.dweight_gate.data == nullptr) return;
    note(Engine::pack_left_transposed(task.x_t, x, p_.input.row_stride, p_.model_dim, tokens));
    for_each_units([&](const Units& unit, int64_t, int64_t count, int64_t at) {
      if (args_.dweight_in.data != nullptr) {
        note(Engine::pack_right(task.right, task.dhidden + at, kUnits, tokens, count));
        Engine::product(p_.model_dim, count, tokens, task.x_t, task.right, unit.dweight_in_t, kUnits, start);
      }
      if (args_.dweight_gate.data != nullptr) {
        note(Engine::pack_right(task.right, task.gate_sum + at, kUnits, tokens, count));
        Engine::product(p_.model_dim, count, tokens, task.x_t, task.right, unit.dweight_gate_t, kUnits, start);
      }
    });
  }

  // Turns sums into hidden activations and gradients, in place, and adds up the gradients of the biases.
  template <Activation A, bool kGated>
  void apply(const Task& task, const Units& units, int64_t token, int64_t tokens, int64_t f, int64_t count,
             int64_t at) const {
    constexpr int W = FloatVec::kWidth;
    const bool drops = p_.dropout.threshold != 0;
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    if (drops) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < count; i += 64) {
          task.keep[t * (kUnits / 64) + i / 64] =
              dropout_keep_bits(p_.dropout, 0, static_cast<uint64_t>(token + t), static_cast<uint64_t>(f + i));
        }
      }
    }
    for (int64_t i = 0; i < count; i += W) {
      const int n = static_cast<int>(min(W, count - i));
      const FloatVec bias = bias_at(p_.bias_in, f + i, n), gate_bias = bias_at(p_.bias_gate, f + i, n);
      Sum dbias(units.dbias_in + i, token == 0), dbias_gate(kGated ? units.dbias_gate + i : nullptr, token == 0);
      for (int64_t t = 0; t < tokens; ++t) {
        float *before = task.before + at + t * kUnits + i, *dhidden = task.dhidden + at + t * kUnits + i;
        FloatVec slope;
        const FloatVec y = activate<A>(load(before) + bias, &slope);
        FloatVec hidden = y, d = wants_dhidden() ? load(dhidden) : zero;
        FloatVec gate;
        float* gate_sum = nullptr;
        if constexpr (kGated) {
          gate_sum = task.gate_sum + at + t * kUnits + i;
          gate = load(gate_sum) + gate_bias;
          hidden = y * gate;
        }
        if (drops) {
          const auto kept = mask_from_bits<float>(task.keep[t * (kUnits / 64) + i / 64] >> (i % 64));
          hidden = select(kept, hidden * rescale, zero);
          d = select(kept, d * rescale, zero);
        }
        store(before, hidden);
        if constexpr (kGated) {
          const FloatVec dgate = d * y;
          dbias_gate.add(dgate, t);
          store(gate_sum, dgate);
          d = d * gate;
        }
        d = d * slope;
        // A gradient of NaN does not pass where relu is flat.
        if constexpr (A == Activation::kRelu) d = select(eq(slope, zero), zero, d);
        dbias.add(d, t);
        store(dhidden, d);
      }
      dbias.finish();
      if constexpr (kGated) dbias_gate.finish();
    }
  }

  static FloatVec bias_at(const void* bias, int64_t i, int n) {
    return bias == nullptr ? FloatVec::zero() : load_as_n<float>(static_cast<const T*>(bias) + i, n);
  }

  void add_dx(const Task& task, int64_t token, int64_t tokens, int64_t units, bool start) const {
    float* dx = dx_ + token * dx_stride_;
    Engine::product(tokens, p_.model_dim, units, task.dbefore, task.in, dx, dx_stride_, start);
    if (gated_) Engine::product(tokens, p_.model_dim, units, task.dgate, task.gate, dx, dx_stride_, false);
  }

  void write_dx(int64_t token, int64_t tokens) const {
    for (int64_t t = token; t < token + tokens; ++t) {
      T* to = static_cast<T*>(args_.dinput.data) + t * args_.dinput.row_stride;
      for_each_vec<float>(p_.model_dim, [&](int64_t d, auto n) { store_n(to + d, load(dx_ + t * dx_stride_ + d), n); });
    }
  }

  void write_weights(const Units& units, int64_t f, int64_t count) const {
    if (args_.dweight_in.data != nullptr) write_transposed(args_.dweight_in, f, count, units.dweight_in_t);
    if (args_.dweight_gate.data != nullptr) write_transposed(args_.dweight_gate, f, count, units.dweight_gate_t);
    if (args_.dweight_out.data != nullptr) {
      for (int64_t o = 0; o < p_.out_dim; ++o) {
        T* to = static_cast<T*>(args_.dweight_out.data) + o * args_.dweight_out.row_stride + f;
        round(to, units.dweight_out + o * kUnits, count);
      }
    }
    if (args_.dbias_in != nullptr) round(static_cast<T*>(args_.dbias_in) + f, units.dbias_in, count);
    if (args_.dbias_gate != nullptr) round(static_cast<T*>(args_.dbias_gate) + f, units.dbias_gate, count);
  }
  static void round(T* to, const float* from, int64_t count) {
    for_each_vec<float>(count, [&](int64_t i, auto n) { store_n(to + i, load(from + i), n); });
  }

  // to[f + i][d] = from[d][i]
  void write_transposed(const Matrix& to, int64_t f, int64_t count, const float* from) const {
    constexpr int W = FloatVec::kWidth;
    for (int64_t i = 0; i < count; i += W) {
      for (int64_t d = 0; d < p_.model_dim; d += W) {
        const int n = static_cast<int>(min(W, p_.model_dim - d));
        FloatVec square[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) square[k] = load(from + (d + k) * kUnits + i);
        transpose<float>(square);
        T* row = static_cast<T*>(to.data) + (f + i) * to.row_stride + d;
        for (int k = 0; k < min(W, count - i); ++k) store_n(row + k * to.row_stride, square[k], n);
      }
    }
  }

  void sum_dout() const {
    constexpr int64_t kColumns = 64;
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.out_dim);
    parallel_for(ceil_div(p_.out_dim, kColumns), work, [&](int64_t task) {
      const int64_t column = task * kColumns;
      for_each_vec<float>(min(kColumns, p_.out_dim - column), [&](int64_t i, auto n) {
        Sum sum(nullptr, true);
        for (int64_t t = 0; t < p_.tokens; ++t) sum.add(load_as_n<float>(at(args_.dout, t, column + i), n), t);
        store_n(static_cast<T*>(args_.dbias_out) + column + i, sum.total(), n);
      });
    });
  }

  const FeedForwardBackwardArgs& args_;
  const FeedForwardProblem& p_;
  bool gated_, wants_dbefore_, wants_dgate_;
  int64_t subblocks_;       // of kUnits hidden units
  int64_t block_, blocks_;  // tokens of a block, and how many there are
  int64_t x_stride_, out_stride_;
  float* dx_ = nullptr;  // [blocks * block, dx_stride]
  int64_t dx_stride_ = 0;
  bool owns_dx_ = false;  // dx_ is not dinput itself
  mutable bool packed_ = true;
  int32_t* turn_ = nullptr;  // [blocks]: which task's turn it is to add to dx
};

}  // namespace fastattn::FASTATTN_ISA
