// The bfloat16 feed-forward on AMX, forward.
//
// All threads pack the weights, once. Then each takes a block of tokens through both products: the hidden activation,
// rounded as PyTorch rounds it, is packed as it is made and never leaves the second-level cache. Where tokens are too
// few for that, threads share out the hidden units first and then the output's columns. Every sum is one chain over its
// whole depth, so no choice changes a bit. Memory: the weights once more, and each thread's block.
#pragma once

#include "feed_forward_bfloat16.h"
#include "feed_forward_groups.h"

namespace fastattn::FASTATTN_ISA {

class ForwardBFloat16 {
 public:
  explicit ForwardBFloat16(const FeedForwardArgs& args) : args_(args), p_(args.problem) {}

  // Whether the packed weights are small enough to be kept whole, whatever else the process does.
  static bool takes(const FeedForwardProblem& p) {
    const int64_t columns = p.model_dim * (p.weight_gate.data != nullptr ? 2 : 1) + p.out_dim;
    return p.ff_dim * columns * static_cast<int64_t>(sizeof(BFloat16)) <= kMostBytes;
  }

  void run() {
    const int64_t threads = max_threads(), blocks = steps_of(p_.tokens);
    together_ = threads > 1 && blocks < 2 * threads;
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure([&](Carver& carver) { carve(carver); }))));
    carve(shared);
    widen_vector(bias_in_, p_.bias_in, p_.ff_dim);
    widen_vector(bias_gate_, p_.bias_gate, p_.ff_dim);
    widen_vector(bias_out_, p_.bias_out, p_.out_dim);
    const auto weight = [](const Matrix& m, int64_t rows, int64_t columns, const Packed& to) {
      return PackJob{PackJob::kRightTransposed, static_cast<const BFloat16*>(m.data), m.row_stride, rows, columns, to};
    };
    pack_all({weight(p_.weight_in, p_.ff_dim, p_.model_dim, in_t_),
              weight(p_.weight_gate, p_.ff_dim, p_.model_dim, gate_t_),
              weight(p_.weight_out, p_.out_dim, p_.ff_dim, out_t_),
              together_ ? pack_input(0, p_.tokens, x_) : PackJob{PackJob::kLeft, nullptr, 0, 0, 0, {}}});
    together_ ? run_together(blocks, threads) : run_apart(blocks, threads);
  }

 private:
  static constexpr int64_t kMostBytes = int64_t{48} << 20;

  bool gated() const { return p_.weight_gate.data != nullptr; }
  int64_t unit_panels() const { return steps_of(p_.ff_dim); }
  int64_t out_panels() const { return steps_of(p_.out_dim); }
  double work() const {
    return static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
           static_cast<double>(p_.model_dim + p_.out_dim);
  }

  void carve(Carver& carver) {
    in_t_ = take_packed(carver, p_.ff_dim, p_.model_dim);
    if (gated()) gate_t_ = take_packed(carver, p_.ff_dim, p_.model_dim);
    out_t_ = take_packed(carver, p_.out_dim, p_.ff_dim);
    bias_in_ = carver.take<float>(round_up(p_.ff_dim, kStep));
    bias_gate_ = carver.take<float>(round_up(p_.ff_dim, kStep));
    bias_out_ = carver.take<float>(round_up(p_.out_dim, kStep));
    if (!together_) return;
    x_ = take_packed(carver, p_.tokens, p_.model_dim);
    hidden_ = take_packed(carver, p_.tokens, p_.ff_dim);
  }

  PackJob pack_input(int64_t token, int64_t tokens, const Packed& to) const {
    const BFloat16* from = static_cast<const BFloat16*>(p_.input.data) + token * p_.input.row_stride;
    return {PackJob::kLeft, from, p_.input.row_stride, tokens, p_.model_dim, to};
  }

  // What one thread needs for `blocks` blocks of tokens.
  struct Work {
    float *sums, *gate_sums;
    uint64_t* keep;  // of 64 units, those that dropout spares
    Packed x, hidden;
    Staged out;
  };
  Work prepare(int64_t blocks, int64_t columns) const {
    Work work;
    const auto carve = [&](Carver& carver) {
      work.sums = carver.take<float>(blocks * kSquare);
      work.gate_sums = carver.take<float>(gated() ? blocks * kSquare : 0);
      work.keep = carver.take<uint64_t>(blocks * kStep);
      work.out = Staged::take(carver, blocks * kStep, columns);
      if (together_) return;
      work.x = take_packed(carver, blocks * kStep, p_.model_dim);
      work.hidden = take_packed(carver, blocks * kStep, p_.ff_dim);
    };
    Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure(carve))));
    carve(carver);
    return work;
  }

  void run_apart(int64_t blocks, int64_t threads) const {
    const int64_t bytes = (steps_of(p_.model_dim) + steps_of(p_.ff_dim)) * kBlockStep;
    const Parts parts = share_out(blocks, kBlockCache / bytes, threads);
    parallel_for(parts.parts, work(), [&](int64_t part) {
      const int64_t begin = parts.begin(part), count = parts.begin(part + 1) - begin, token = begin * kStep;
      const Work work = prepare(count, p_.out_dim);
      const PackJob job = pack_input(token, min(count * kStep, p_.tokens - token), work.x);
      for (int64_t piece = 0; piece < job.pieces(); ++piece) job.run(piece);
      TileScope tiles;
      multiply_in(work, work.x, work.hidden, begin, count, 0, unit_panels());
      multiply_out(work, work.hidden, begin, count, 0, out_panels());
    });
  }

  void run_together(int64_t blocks, int64_t threads) const {
    const auto share = [&](int64_t depth, int64_t panels, const auto& body) {
      const Parts rows = share_out(blocks, kBlockCache / (steps_of(depth) * kBlockStep), 1);
      // Two panels at a time: a word of dropout bits is of 64 units.
      const Parts columns = {ceil_div(panels, 2), min(ceil_div(2 * threads, rows.parts), ceil_div(panels, 2))};
      parallel_for(rows.parts * columns.parts, work(), [&](int64_t task) {
        const int64_t row = task % rows.parts, column = task / rows.parts;
        const int64_t begin = rows.begin(row), count = rows.begin(row + 1) - begin;
        const int64_t first = 2 * columns.begin(column), end = min(2 * columns.begin(column + 1), panels);
        const Work work = prepare(count, (end - first) * kStep);
        TileScope tiles;
        body(work, begin, count, first, end);
      });
    };
    share(p_.model_dim, unit_panels(), [&](const Work& work, int64_t block, int64_t count, int64_t first, int64_t end) {
      multiply_in(work, {x_.at(block), x_.block}, {hidden_.at(block), hidden_.block}, block, count, first, end);
    });
    share(p_.ff_dim, out_panels(), [&](const Work& work, int64_t block, int64_t count, int64_t first, int64_t end) {
      multiply_out(work, {hidden_.at(block), hidden_.block}, block, count, first, end);
    });
  }

  // hidden = drop(act(x W_in^T + b_in) * gate) for panels [first, end) of units; x and hidden begin with `block`.
  void multiply_in(const Work& work, const Packed& x, const Packed& hidden, int64_t block, int64_t count, int64_t first,
                   int64_t end) const {
    const int64_t steps = steps_of(p_.model_dim);
    const Factors factors[] = {{x.data, x.block, gate_t_.at(first), gate_t_.block, steps, work.gate_sums},
                               {x.data, x.block, in_t_.at(first), in_t_.block, steps, work.sums}};
    const auto multiply = [&](auto finish) {
      gated() ? multiply_blocks(factors, 2, count, end - first, finish)
              : multiply_blocks(factors + 1, 1, count, end - first, finish);
    };
    visit_activation(p_.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::kValue;
      const auto with = [&](auto gated, auto drops) {
        multiply(Hidden<kActivation, decltype(gated)::value, decltype(drops)::value>{
            bias_in_ + first * kStep,
            bias_gate_ + first * kStep,
            work.gate_sums,
            work.keep,
            {hidden.data + first * kBlockStep, hidden.block},
            p_.dropout,
            block * kStep,
            first * kStep});
      };
      const auto choose = [&](auto gated) {
        p_.dropout.threshold != 0 ? with(gated, std::true_type()) : with(gated, std::false_type());
      };
      gated() ? choose(std::true_type()) : choose(std::false_type());
    });
  }

  // Turns the sums of a slice into hidden activations.
  template <Activation A, bool kGated, bool kDrops>
  struct Hidden {
    const float *bias_in, *bias_gate, *gate_sums;
    uint64_t* keep;
    Packed hidden;
    Dropout dropout;
    int64_t token, unit;  // of the first square

    void operator()(int64_t panel, int64_t block, const float* square, int slice) const {
      const int64_t column = panel * kStep;
      char* to = hidden.at(block) + panel * kBlockStep + slice * 128;
#pragma GCC unroll 2
      for (int line = 0; line < 2; ++line) {
        const int64_t row = 2 * slice + line;
        uint64_t kept = 0;
        if constexpr (kDrops) kept = kept_units(block * kStep + row, unit + column);
        FloatVec y[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int64_t at = row * kStep + half * 16;
          y[half] = activate<A, BFloat16Math>(load(square + at) + load(bias_in + column + half * 16));
          if constexpr (kGated) {
            y[half] = y[half] * (load(gate_sums + block * kSquare + at) + load(bias_gate + column + half * 16));
          }
          if constexpr (kDrops) {
            const FloatVec scaled = y[half] * FloatVec::set1(static_cast<float>(dropout.rescale));
            y[half] = select(mask_from_bits<float>(kept >> (half * 16)), scaled, FloatVec::zero());
          }
        }
        _mm512_store_si512(to + line * 64, row_of_bfloat16(y[0], y[1]));
      }
    }

    // Bit k: whether dropout spares hidden unit `first + k` of a row. A word serves two panels.
    uint64_t kept_units(int64_t row, int64_t first) const {
      if (first % 64 == 0) {
        keep[row] = dropout_keep_bits(dropout, 0, static_cast<uint64_t>(token + row), static_cast<uint64_t>(first));
      }
      return keep[row] >> (first % 64);
    }
  };

  // out = hidden W_out^T + b_out for panels [first, end) of its columns.
  void multiply_out(const Work& work, const Packed& hidden, int64_t block, int64_t count, int64_t first,
                    int64_t end) const {
    const Factors factors = {hidden.data, hidden.block, out_t_.at(first), out_t_.block, steps_of(p_.ff_dim), work.sums};
    const float* bias = bias_out_ + first * kStep;
    const Staged staged = work.out;
    multiply_blocks(&factors, 1, count, end - first, [=](int64_t panel, int64_t i, const float* square, int slice) {
      const FloatVec low = load(bias + panel * kStep), high = load(bias + panel * kStep + 16);
      for (int r = 2 * slice; r < 2 * slice + 2; ++r) {
        staged.keep(i * kStep + r, panel * kStep, load(square + r * kStep) + low, load(square + r * kStep + 16) + high);
      }
    });
    const int64_t token = block * kStep, column = first * kStep;
    staged.copy_to(args_.out, token, column, min(count * kStep, p_.tokens - token),
                   min(end * kStep, p_.out_dim) - column);
  }

  const FeedForwardArgs& args_;
  const FeedForwardProblem& p_;
  bool together_ = false;  // whether threads work on the same tokens
  Packed in_t_, gate_t_, out_t_, x_, hidden_;
  float *bias_in_ = nullptr, *bias_gate_ = nullptr, *bias_out_ = nullptr;
};

}  // namespace fastattn::FASTATTN_ISA
