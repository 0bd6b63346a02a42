// The bfloat16 feed-forward on AMX, backward: the equations of feed_forward_gradients.h.
//
// Threads meet between three stages, each a grid of independent tasks: packing; H, dB and dG of all tokens, packed as
// they are made, both ways that the products after them want; then dx and the weights' gradients. So no sum is shared,
// and each has one order whatever the threads. Memory: the stages take a group of hidden units and a stretch of tokens
// at a time, such that what lies between them is bounded. Where dB is too large to be kept whole, dx is summed in
// float32 over the groups; where there are several stretches, the weights' gradients of a group are.
//
// Longer than other files: the stages share all their operands.
#pragma once

#include "feed_forward_backward.h"
#include "feed_forward_bfloat16.h"
#include "feed_forward_gradients.h"
#include "stream.h"

namespace fastattn::FASTATTN_ISA {

class BackwardBFloat16 {
 public:
  explicit BackwardBFloat16(const FeedForwardBackwardArgs& args) : args_(args), p_(args.problem) {
    gated_ = p_.weight_gate.data != nullptr;
    wants_dx_ = args.dinput.data != nullptr;
    wants_dgate_ = gated_ && (wants_dx_ || args.dweight_gate.data != nullptr || args.dbias_gate != nullptr);
    wants_dbefore_ = wants_dx_ || args.dweight_in.data != nullptr || args.dbias_in != nullptr;
    wants_dhidden_ = wants_dbefore_ || wants_dgate_;
  }

  void run() {
    if (args_.dbias_out != nullptr) sum_dout<BFloat16>(args_);
    if (!wants_dhidden_ && args_.dweight_out.data == nullptr) return;
    const Parts stretches = share_out(steps_of(p_.tokens), kStretch / kStep, 1);
    stretch_ = ceil_div(stretches.count, stretches.parts) * kStep;
    sums_weights_ = stretches.parts > 1;
    whole_ = !sums_weights_ && stretch_ * p_.ff_dim * (gated_ ? 4 : 2) <= kJoinedBytes;
    const auto bytes = [&](int64_t pairs) {
      group_ = pairs * kPair;
      sums_dx_ = !whole_ && group_ < p_.ff_dim;
      return measure([&](Carver& carver) { carve(carver); });
    };
    // Groups in pairs of panels: a word of dropout bits is of 64 units.
    const int64_t pairs = ceil_div(p_.ff_dim, kPair), one = bytes(1), more = bytes(2) - one;
    const int64_t room = max(min(kGroupBytes, kMostBytes - (one - more)), kGroupBytes / 2);
    const Parts groups = share_out(pairs, room / more, 1);
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(bytes(ceil_div(pairs, groups.parts)))));
    carve(shared);
    for (int64_t group = 0; group < groups.parts; ++group) {
      first_ = groups.begin(group) * kPair;
      units_ = min(groups.begin(group + 1) * kPair, p_.ff_dim) - first_;
      first_group_ = group == 0;
      last_group_ = group == groups.parts - 1;
      for (int64_t stretch = 0; stretch < stretches.parts; ++stretch) {
        token_ = stretches.begin(stretch) * kStep;
        tokens_ = min(stretches.begin(stretch + 1) * kStep, p_.tokens) - token_;
        first_stretch_ = stretch == 0;
        last_stretch_ = stretch == stretches.parts - 1;
        pack();
        differentiate();
        multiply();
        sum_biases();
      }
    }
  }

 private:
  static constexpr int64_t kPair = 2 * kStep;                // hidden units
  static constexpr int64_t kStretch = 2048;                  // most tokens at a time
  static constexpr int64_t kGroupBytes = int64_t{20} << 20;  // of what a group of hidden units leaves between stages
  static constexpr int64_t kMostBytes = int64_t{62} << 20;  // of all working memory where it can be: scratch() keeps it
  static constexpr int64_t kJoinedBytes = int64_t{24} << 20;  // of dB and dG of all hidden units

  // Hidden units of dx's depth, their first step in it and that of their gates.
  int64_t joined_units(int64_t group) const { return whole_ ? p_.ff_dim : group; }
  int64_t joined_steps() const { return steps_of(joined_units(units_)) * (gated_ ? 2 : 1); }
  int64_t joined_step() const { return whole_ ? first_ / kStep : 0; }
  int64_t joined_gate_step() const { return steps_of(joined_units(units_)) + joined_step(); }

  void carve(Carver& carver) {
    in_t_ = take_packed(carver, group_, p_.model_dim);
    out_ = take_packed(carver, group_, p_.out_dim);
    const int64_t joined = round_up(joined_units(group_), kStep) * (gated_ ? 2 : 1);
    in_ = take_packed(carver, p_.model_dim, joined);
    x_ = take_packed(carver, stretch_, p_.model_dim);
    dout_ = take_packed(carver, stretch_, p_.out_dim);
    x_t_ = take_packed(carver, p_.model_dim, stretch_);
    dout_t_ = take_packed(carver, p_.out_dim, stretch_);
    hidden_ = take_packed(carver, group_, stretch_);
    dbefore_ = take_packed(carver, group_, stretch_);
    joined_ = take_packed(carver, stretch_, joined);
    bias_in_ = carver.take<float>(group_);
    bias_gate_ = carver.take<float>(group_);
    dbias_in_ = carver.take<float>(steps_of(stretch_) * group_);
    dbias_in_sum_ = carver.take<double>(group_);
    if (gated_) {
      gate_t_ = take_packed(carver, group_, p_.model_dim);
      dgate_ = take_packed(carver, group_, stretch_);
      dbias_gate_ = carver.take<float>(steps_of(stretch_) * group_);
      dbias_gate_sum_ = carver.take<double>(group_);
    }
    if (sums_dx_) dx_sum_ = carver.take<float>(round_up(p_.tokens, kStep) * round_up(p_.model_dim, kStep));
    if (!sums_weights_) return;
    const auto squares = [&](int64_t rows) { return carver.take<float>(round_up(rows, kStep) * group_); };
    dweight_out_sum_ = squares(p_.out_dim);
    dweight_in_sum_ = squares(p_.model_dim);
    if (gated_) dweight_gate_sum_ = squares(p_.model_dim);
  }

  static const BFloat16* at(const Matrix& matrix, int64_t row, int64_t column) {
    return matrix.data == nullptr ? nullptr
                                  : static_cast<const BFloat16*>(matrix.data) + row * matrix.row_stride + column;
  }
  template <typename T>
  static T* at(T* vector, int64_t i) {
    return vector == nullptr ? nullptr : vector + i;
  }

  void pack() {
    const auto job = [](PackJob::Kind kind, bool wanted, const Matrix& m, int64_t row, int64_t column, int64_t rows,
                        int64_t columns, const Packed& to, int64_t first_step = 0) {
      return PackJob{kind, wanted ? at(m, row, column) : nullptr, m.row_stride, rows, columns, to, first_step};
    };
    // What does not depend on the stretch, and what does not depend on the group where there is one stretch alone.
    const bool weights = first_stretch_, inputs = first_group_ || sums_weights_;
    const bool wants_x_t = args_.dweight_in.data != nullptr || args_.dweight_gate.data != nullptr;
    if (weights) {
      widen_vector(bias_in_, at(static_cast<const BFloat16*>(p_.bias_in), first_), units_);
      widen_vector(bias_gate_, at(static_cast<const BFloat16*>(p_.bias_gate), first_), units_);
    }
    pack_all({
        job(PackJob::kRightTransposed, weights, p_.weight_in, first_, 0, units_, p_.model_dim, in_t_),
        job(PackJob::kRightTransposed, weights, p_.weight_gate, first_, 0, units_, p_.model_dim, gate_t_),
        job(PackJob::kRight, weights && wants_dhidden_, p_.weight_out, 0, first_, p_.out_dim, units_, out_),
        job(PackJob::kRight, weights && wants_dx_, p_.weight_in, first_, 0, units_, p_.model_dim, in_, joined_step()),
        job(PackJob::kRight, weights && wants_dx_, p_.weight_gate, first_, 0, units_, p_.model_dim, in_,
            joined_gate_step()),
        job(PackJob::kLeft, inputs, p_.input, token_, 0, tokens_, p_.model_dim, x_),
        job(PackJob::kLeft, inputs && wants_dhidden_, args_.dout, token_, 0, tokens_, p_.out_dim, dout_),
        job(PackJob::kLeftTransposed, inputs && wants_x_t, p_.input, token_, 0, tokens_, p_.model_dim, x_t_),
        job(PackJob::kLeftTransposed, inputs && args_.dweight_out.data != nullptr, args_.dout, token_, 0, tokens_,
            p_.out_dim, dout_t_),
    });
  }

  static double work(int64_t a, int64_t b, int64_t c) {
    return static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c);
  }

  // A grid of tasks over blocks of a left operand and panels, two by two, of a right one.
  struct Grid {
    Parts rows{0, 0}, columns{0, 0};
    int64_t panels = 0;
    int64_t tasks() const { return rows.parts * columns.parts; }
    struct Task {
      int64_t block, blocks, panel, panels;
    };
    Task task(int64_t index) const {
      const int64_t row = index / columns.parts, column = index % columns.parts, begin = rows.begin(row),
                    first = 2 * columns.begin(column);
      return {begin, rows.begin(row + 1) - begin, first, min(2 * columns.begin(column + 1), panels) - first};
    }
  };
  // `bytes` of a block of the left operands, which are to stay in the second-level cache.
  static Grid grid(int64_t rows, int64_t columns, int64_t bytes) {
    // Of many panels a task takes about 16: the more there are, the more often is what it leaves in the cache used.
    constexpr int64_t kFewPairs = 8;
    const int64_t threads = max_threads(), pairs = ceil_div(steps_of(columns), 2);
    Grid result;
    result.rows = share_out(steps_of(rows), kBlockCache / bytes, 1);
    const int64_t wanted = threads == 1 ? 1 : ceil_div(4 * threads, result.rows.parts);
    result.columns = {pairs, max(min(wanted, pairs / kFewPairs), min(threads, pairs))};
    if (threads == 1) result.columns.parts = 1;
    result.panels = steps_of(columns);
    return result;
  }

  void differentiate() {
    const Grid tasks = grid(tokens_, units_, (steps_of(p_.model_dim) + steps_of(p_.out_dim)) * kBlockStep);
    parallel_for(tasks.tasks(), work(tokens_, units_, p_.model_dim + p_.out_dim), [&](int64_t index) {
      const Grid::Task task = tasks.task(index);
      float *before, *gate, *dhidden;
      uint64_t* keep;
      const auto carve = [&](Carver& carver) {
        before = carver.take<float>(task.blocks * kSquare);
        gate = carver.take<float>(task.blocks * kSquare);
        dhidden = carver.take<float>(task.blocks * kSquare);
        keep = carver.take<uint64_t>(task.blocks * kStep);
      };
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure(carve))));
      carve(carver);
      const int64_t x_steps = steps_of(p_.model_dim);
      Factors factors[3];
      int count = 0;
      if (gated_) {
        factors[count++] = {x_.at(task.block), x_.block, gate_t_.at(task.panel), gate_t_.block, x_steps, gate};
      }
      if (wants_dhidden_) {
        factors[count++] = {dout_.at(task.block), dout_.block,          out_.at(task.panel),
                            out_.block,           steps_of(p_.out_dim), dhidden};
      }
      factors[count++] = {x_.at(task.block), x_.block, in_t_.at(task.panel), in_t_.block, x_steps, before};
      TileScope tiles;
      const auto run = [&](auto activation, auto gated, auto drops) {
        using Finish = Slopes<decltype(activation)::kValue, decltype(gated)::value, decltype(drops)::value>;
        multiply_blocks(factors, count, task.blocks, task.panels, Finish{*this, task, gate, dhidden, keep});
        stream_end();
      };
      visit_activation(p_.activation, [&](auto activation) {
        const auto choose = [&](auto gated) {
          p_.dropout.threshold != 0 ? run(activation, gated, std::true_type())
                                    : run(activation, gated, std::false_type());
        };
        gated_ ? choose(std::true_type()) : choose(std::false_type());
      });
    });
  }

  // Turns the sums of a slice into H, dB and dG.
  template <Activation A, bool kGated, bool kDrops>
  struct Slopes {
    const BackwardBFloat16& of;
    Grid::Task task;
    const float *gate_sums, *dhidden;
    uint64_t* keep;

    void operator()(int64_t task_panel, int64_t task_block, const float* square, int slice) const {
      const int64_t panel = task.panel + task_panel, block = task.block + task_block, column = panel * kStep;
      FloatVec h[2][2], db[2][2], dg[2][2];  // [line][half]
      const FloatVec zero = FloatVec::zero(), rescale = FloatVec::set1(static_cast<float>(of.p_.dropout.rescale));
#pragma GCC unroll 2
      for (int line = 0; line < 2; ++line) {
        const int64_t row = 2 * slice + line;
        uint64_t kept = 0;
        if constexpr (kDrops) kept = kept_units(task_block * kStep + row, of.first_ + column);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int64_t at = row * kStep + half * 16, in_block = task_block * kSquare + at;
          FloatVec gate = zero;
          if constexpr (kGated) gate = load(gate_sums + in_block) + load(of.bias_gate_ + column + half * 16);
          const HiddenGradients found = differentiate_hidden<A, BFloat16Math>(
              load(square + at) + load(of.bias_in_ + column + half * 16),
              of.wants_dhidden_ ? load(dhidden + in_block) : zero, kGated, gate, kDrops, kept >> (half * 16), rescale);
          h[line][half] = found.hidden;
          db[line][half] = found.dbefore;
          if constexpr (kGated) dg[line][half] = found.dgate;
        }
      }
      if (of.args_.dweight_out.data != nullptr) keep_right(of.hidden_, panel, block, slice, h);
      if (of.wants_dhidden_) {
        if (of.args_.dweight_in.data != nullptr) keep_right(of.dbefore_, panel, block, slice, db);
        if (of.wants_dx_) keep_left(of.joined_, block, of.joined_step() + panel, slice, db);
        if (of.args_.dbias_in != nullptr) add_rows(of.dbias_in_ + block * of.group_ + column, slice, db);
      }
      if constexpr (kGated) {
        if (of.wants_dhidden_) {
          if (of.args_.dweight_gate.data != nullptr) keep_right(of.dgate_, panel, block, slice, dg);
          if (of.wants_dx_) keep_left(of.joined_, block, of.joined_gate_step() + panel, slice, dg);
          if (of.args_.dbias_gate != nullptr) add_rows(of.dbias_gate_ + block * of.group_ + column, slice, dg);
        }
      }
    }

    // Tokens are the depth of a right operand, and the rows of a left one. Both go past the caches, whole lines at a
    // time: too much to stay there, and a line read first only to be overwritten costs more.
    static void keep_right(const Packed& to, int64_t panel, int64_t step, int slice, const FloatVec (&x)[2][2]) {
      char* line = to.at(panel) + step * kBlockStep + slice * 64;
      _mm512_stream_si512((__m512i*)line, pairs_of_bfloat16(x[0][0], x[1][0]));
      _mm512_stream_si512((__m512i*)(line + kTileBytes), pairs_of_bfloat16(x[0][1], x[1][1]));
    }
    static void keep_left(const Packed& to, int64_t block, int64_t step, int slice, const FloatVec (&x)[2][2]) {
      char* row = to.at(block) + step * kBlockStep + slice * 128;
      _mm512_stream_si512((__m512i*)row, row_of_bfloat16(x[0][0], x[0][1]));
      _mm512_stream_si512((__m512i*)(row + 64), row_of_bfloat16(x[1][0], x[1][1]));
    }
    static void add_rows(float* to, int slice, const FloatVec (&x)[2][2]) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const FloatVec sum = x[0][half] + x[1][half];
        store(to + half * 16, slice == 0 ? sum : load(to + half * 16) + sum);
      }
    }
    // Bit k: whether dropout spares hidden unit `first + k` of a row. A word serves two panels.
    uint64_t kept_units(int64_t row, int64_t first) const {
      if (first % 64 == 0) {
        const int64_t token = of.token_ + task.block * kStep + row;
        keep[row] = dropout_keep_bits(of.p_.dropout, 0, static_cast<uint64_t>(token), static_cast<uint64_t>(first));
      }
      return keep[row] >> (first % 64);
    }
  };

  void multiply() {
    const int64_t stretch_bytes = steps_of(tokens_) * kBlockStep;
    const auto wanted = [&](bool wants, int64_t rows, int64_t columns, int64_t bytes) {
      return wants ? grid(rows, columns, bytes) : Grid{};
    };
    const Grid grids[] = {
        wanted(wants_dx_ && (last_group_ || !whole_), tokens_, p_.model_dim, joined_steps() * kBlockStep),
        wanted(args_.dweight_out.data != nullptr, p_.out_dim, units_, stretch_bytes),
        wanted(args_.dweight_in.data != nullptr, p_.model_dim, units_, stretch_bytes),
        wanted(args_.dweight_gate.data != nullptr, p_.model_dim, units_, stretch_bytes)};
    int64_t tasks = 0;
    for (const Grid& grid : grids) tasks += grid.tasks();
    parallel_for(tasks, work(tokens_, units_, p_.model_dim + p_.out_dim), [&](int64_t index) {
      int k = 0;
      for (; index >= grids[k].tasks(); ++k) index -= grids[k].tasks();
      const Grid::Task task = grids[k].task(index);
      float* sums = nullptr;
      Staged staged{};
      const auto carve = [&](Carver& carver) {
        sums = carver.take<float>(task.blocks * kSquare);
        const int64_t rows = task.blocks * kStep, columns = task.panels * kStep;
        staged = k < 2 ? Staged::take(carver, rows, columns) : Staged::take(carver, columns, rows);
      };
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure(carve))));
      carve(carver);
      TileScope tiles;
      switch (k) {
        case 0:
          return multiply_dx(task, sums, staged);
        case 1:
          return multiply_weight_out(task, sums, staged);
        case 2:
          return multiply_weight(task, x_t_, dbefore_, args_.dweight_in, dweight_in_sum_, sums, staged);
      }
      multiply_weight(task, x_t_, dgate_, args_.dweight_gate, dweight_gate_sum_, sums, staged);
    });
  }

  // Adds what earlier groups or stretches have left of a slice, and leaves the sum for later ones.
  static void accumulate(float* square, float* sum, bool first, bool last, int slice) {
    for (int64_t i = 2 * slice * kStep; i < (2 * slice + 2) * kStep; i += FloatVec::kWidth) {
      const FloatVec value = first ? load(square + i) : load(square + i) + load(sum + i);
      store((last ? square : sum) + i, value);
    }
  }

  static void keep_rows(const Staged& to, int64_t row, int64_t column, const float* square, int slice) {
    for (int64_t r = 2 * slice; r < 2 * slice + 2; ++r) {
      to.keep(row + r, column, load(square + r * kStep), load(square + r * kStep + 16));
    }
  }

  void multiply_dx(const Grid::Task& task, float* sums, const Staged& staged) const {
    const Factors factors = {joined_.at(task.block), joined_.block, in_.at(task.panel), in_.block,
                             joined_steps(),         sums};
    const int64_t blocks = steps_of(p_.tokens), token = token_ + task.block * kStep, column = task.panel * kStep;
    multiply_blocks(&factors, 1, task.blocks, task.panels, [=](int64_t panel, int64_t block, float* square, int slice) {
      if (sums_dx_) {
        float* sum = dx_sum_ + ((task.panel + panel) * blocks + token / kStep + block) * kSquare;
        accumulate(square, sum, first_group_, last_group_, slice);
        if (!last_group_) return;
      }
      keep_rows(staged, block * kStep, panel * kStep, square, slice);
    });
    if (!last_group_) return;
    staged.copy_to(args_.dinput, token, column, min(task.blocks * kStep, token_ + tokens_ - token),
                   min(task.panels * kStep, p_.model_dim - column));
  }

  void multiply_weight_out(const Grid::Task& task, float* sums, const Staged& staged) const {
    const Factors factors = {dout_t_.at(task.block), dout_t_.block,     hidden_.at(task.panel),
                             hidden_.block,          steps_of(tokens_), sums};
    const int64_t blocks = steps_of(p_.out_dim), row = task.block * kStep, column = task.panel * kStep;
    multiply_blocks(&factors, 1, task.blocks, task.panels, [=](int64_t panel, int64_t block, float* square, int slice) {
      if (sums_weights_) {
        float* sum = dweight_out_sum_ + ((task.panel + panel) * blocks + task.block + block) * kSquare;
        accumulate(square, sum, first_stretch_, last_stretch_, slice);
        if (!last_stretch_) return;
      }
      keep_rows(staged, block * kStep, panel * kStep, square, slice);
    });
    if (!last_stretch_) return;
    staged.copy_to(args_.dweight_out, row, first_ + column, min(task.blocks * kStep, p_.out_dim - row),
                   min(task.panels * kStep, units_ - column));
  }

  // dW^T = x^T d, written as dW.
  void multiply_weight(const Grid::Task& task, const Packed& x_t, const Packed& d, const Matrix& to, float* sum,
                       float* sums, const Staged& staged) const {
    const Factors factors = {x_t.at(task.block), x_t.block, d.at(task.panel), d.block, steps_of(tokens_), sums};
    const int64_t blocks = steps_of(p_.model_dim), column = task.block * kStep, unit = task.panel * kStep;
    multiply_blocks(&factors, 1, task.blocks, task.panels, [=](int64_t panel, int64_t block, float* square, int slice) {
      if (sums_weights_) {
        float* earlier = sum + ((task.panel + panel) * blocks + task.block + block) * kSquare;
        accumulate(square, earlier, first_stretch_, last_stretch_, slice);
        if (!last_stretch_) return;
      }
      // Rows of the result are columns of the square, which are whole after the last slice.
      if (slice != kSlices - 1) return;
      for (int64_t half = 0; half < kStep; half += 16) {
        BFloat16* first = staged.data + (panel * kStep + half) * staged.row + block * kStep;
        const auto row_of = [&](int64_t i) { return first + i * staged.row; };
        write_transposed(row_of, kStep, square + half, kStep, FloatVec::set1(1.0f));
      }
    });
    if (!last_stretch_) return;
    staged.copy_to(to, first_ + unit, column, min(task.panels * kStep, units_ - unit),
                   min(task.blocks * kStep, p_.model_dim - column));
  }

  // Adds up what blocks of tokens have left, in their order.
  void sum_biases() const {
    const auto sum = [&](void* to, const float* parts, double* sums) {
      if (to == nullptr) return;
      for (int64_t i = 0; i < units_; i += FloatVec::kWidth) {
        DoubleSum total;
        if (!first_stretch_) total.load_from(sums + i);
        for (int64_t block = 0; block < steps_of(tokens_); ++block) total.add(parts + block * group_ + i);
        total.store_to(sums + i);
      }
      if (last_stretch_) write_sums<BFloat16>(to, first_, units_, sums);
    };
    sum(args_.dbias_in, dbias_in_, dbias_in_sum_);
    sum(args_.dbias_gate, dbias_gate_, dbias_gate_sum_);
  }

  const FeedForwardBackwardArgs& args_;
  const FeedForwardProblem& p_;
  bool gated_, wants_dx_, wants_dgate_, wants_dbefore_, wants_dhidden_;
  bool whole_ = false;                           // whether dx has dB and dG of all hidden units before it
  bool sums_dx_ = false, sums_weights_ = false;  // whether they come from several groups, or stretches
  bool first_group_ = true, last_group_ = true, first_stretch_ = true, last_stretch_ = true;
  int64_t stretch_ = 0, group_ = 0;                             // tokens and hidden units there is room for
  int64_t token_ = 0, tokens_ = 0, first_ = 0, units_ = 0;      // at present
  Packed in_t_, gate_t_, out_;                                  // panels of hidden units
  Packed in_;                                                   // W_in, then W_gate: panels of model_dim
  Packed x_, dout_, x_t_, dout_t_;                              // left operands
  Packed hidden_, dbefore_, dgate_;                             // right operands: tokens are their depth
  Packed joined_;                                               // dbefore, then dgate: a left operand
  float *bias_in_ = nullptr, *bias_gate_ = nullptr;             // [group]
  float *dbias_in_ = nullptr, *dbias_gate_ = nullptr;           // [blocks of tokens][group]
  double *dbias_in_sum_ = nullptr, *dbias_gate_sum_ = nullptr;  // [group]
  float* dx_sum_ = nullptr;                                     // squares: [panels of model_dim][blocks of tokens]
  float *dweight_out_sum_ = nullptr, *dweight_in_sum_ = nullptr,
        *dweight_gate_sum_ = nullptr;  // squares: [panels of units][blocks]
};

}  // namespace fastattn::FASTATTN_ISA
