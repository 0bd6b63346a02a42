// The bfloat16 feed-forward on AMX for a few tokens, backward: the equations of feed_forward_gradients.h, where there
// is more to read and to write than to multiply.
//
// A task is a group of hidden units. It takes them four blocks at a time: reads their weights once, packing what has to
// be packed as it goes, and writes their gradients past the caches. Of dx it leaves its share, which are added up in
// the order of their units; so that the bits are the same at any thread count, groups depend on the call's shape alone.
//
// Four blocks side by side are 256 bytes of a row of W_out. Measured on one core: lines of 64 bytes, each in another
// row, are read at 10 GB/s and written past the caches at 12.5; 256 bytes at a time, at 30 and 23.5.
#pragma once

#include "feed_forward_bfloat16_few_tokens.h"
#include "feed_forward_gradients.h"
#include "stream.h"

namespace fastattn::FASTATTN_ISA {

class FewTokensBackwardBFloat16 {
 public:
  explicit FewTokensBackwardBFloat16(const FeedForwardBackwardArgs& args) : args_(args), p_(args.problem) {
    gated_ = p_.weight_gate.data != nullptr;
    wants_dx_ = args.dinput.data != nullptr;
  }

  void run() {
    if (args_.dbias_out != nullptr) sum_dout<BFloat16>(args_);
    const Parts groups = {p_.ff_dim / kStep, min(kMostGroups, p_.ff_dim / kStep)};
    const int64_t most = ceil_div(groups.count, groups.parts);
    const auto carve_shared = [&](Carver& carver) {
      x_t_ = take_packed(carver, kStep, p_.model_dim).data;
      x_ = take_packed(carver, p_.model_dim, kStep);
      dout_ = take_packed(carver, kStep, p_.out_dim).data;
      dout_t_ = take_packed(carver, p_.out_dim, kStep);
      dx_ = carver.take<float>(groups.parts * kStep * p_.model_dim);
    };
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure(carve_shared))));
    carve_shared(shared);
    using Engine = TileEngine<1>;
    const auto *x = static_cast<const BFloat16*>(p_.input.data), *dout = static_cast<const BFloat16*>(args_.dout.data);
    Engine::pack_right_transposed({x_t_, 0}, x, p_.input.row_stride, p_.model_dim, p_.tokens);
    Engine::pack_right({x_.data, x_.block}, x, p_.input.row_stride, p_.tokens, p_.model_dim);
    Engine::pack_left({dout_, 0}, dout, args_.dout.row_stride, p_.tokens, p_.out_dim);
    Engine::pack_left_transposed({dout_t_.data, dout_t_.block}, dout, args_.dout.row_stride, p_.out_dim, p_.tokens);
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    parallel_for(groups.parts, work, [&](int64_t group) {
      Task task;
      const auto carve = [&](Carver& carver) {
        for (Squares* squares : {&task.before, &task.gate, &task.dhidden, &task.sums}) {
          squares->data = carver.take<float>(kRun * kSquare);
        }
        task.out = take_packed(carver, kRun * kStep, p_.out_dim);
        task.steps = take_packed(carver, kRun * kStep, kStep);
        task.rows = carver.take<BFloat16>(kSquare);
        task.hidden = take_packed(carver, kRun * kStep, kStep);
        task.left = take_packed(carver, kRun * kStep, kStep);
        task.joined = carver.take<char>(2 * most * kBlockStep);
      };
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure(carve))));
      carve(carver);
      TileScope tiles;
      const int64_t first = groups.begin(group), end = groups.begin(group + 1);
      const Parts runs = {end - first, ceil_div(end - first, kRun)};
      for (int64_t run = 0; run < runs.parts; ++run) {
        const int64_t begin = runs.begin(run);
        differentiate(task, (first + begin) * kStep, runs.begin(run + 1) - begin, task.joined + begin * kBlockStep,
                      task.joined + (most + begin) * kBlockStep);
      }
      if (wants_dx_) multiply_dx(task, first, end, most, dx_ + group * kStep * p_.model_dim);
      stream_end();
    });
    if (wants_dx_) sum_dx(groups.parts);
  }

 private:
  static constexpr int64_t kMostGroups = 16, kRun = 4;

  // One for each block of a run.
  struct Squares {
    float* data;
    float* at(int64_t block) const { return data + block * kSquare; }
  };
  // Squares are [unit][token] but for `sums`.
  struct Task {
    Squares before, gate, dhidden, sums;  // later hidden, dgate and dbefore
    Packed out;                           // W_out of a run: a right operand
    BFloat16* rows;                       // [token][unit]
    Packed hidden, left;  // of a run, tokens are the depth: a right operand; dbefore or dgate, a left one
    Packed steps;         // of right operands
    char* joined;         // dbefore, and dgate, of the group's blocks: a left operand each
  };

  static const BFloat16* at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const BFloat16*>(matrix.data) + row * matrix.row_stride + column;
  }

  static void zero() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  static void multiply_step(const char* left, const char* right) {
    tile_load<4>(left, 64);
    tile_load<5>(left + kTileBytes, 64);
    tile_load<6>(right, 64);
    tile_load<7>(right + kTileBytes, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  // The same where tokens are the left operand's rows, of which there may be 16 or `both` halves.
  static void multiply_tokens(const char* left, const char* right, bool both) {
    tile_load<4>(left, 64);
    tile_load<6>(right, 64);
    tile_load<7>(right + kTileBytes, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    if (!both) return;
    tile_load<5>(left + kTileBytes, 64);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  static void store_square(float* square) {
    tile_store<0>(square, kStep * 4);
    tile_store<1>(square + 16, kStep * 4);
    tile_store<2>(square + 16 * kStep, kStep * 4);
    tile_store<3>(square + 16 * kStep + 16, kStep * 4);
  }

  // The transpose of a square, rounded, as a left operand of one step.
  static void round_transposed(char* to, const float* square) {
    for (int64_t half = 0; half < kStep; half += 16) {
      const auto row_of = [&](int64_t i) { return reinterpret_cast<BFloat16*>(to + (half + i) * 64); };
      write_transposed(row_of, kStep, square + half, kStep, FloatVec::set1(1.0f));
    }
  }

  // Packs 32 rows of as many right operands as stand side by side, `to_block` bytes apart, row by row. Without asking
  // for rows ahead: that made it slower, at 17 GB/s for 30.
  static void pack_step(char* to, int64_t to_block, const BFloat16* from, int64_t stride, int64_t blocks) {
    const __m512i left = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int64_t l = 0; l < 16; ++l, from += 2 * stride, to += 64) {
      for (int64_t block = 0; block < blocks; ++block) {
        const __m512i even = _mm512_loadu_si512(from + block * kStep),
                      odd = _mm512_loadu_si512(from + stride + block * kStep);
        _mm512_store_si512(to + block * to_block, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_store_si512(to + block * to_block + kTileBytes, _mm512_permutex2var_epi16(even, right, odd));
      }
    }
  }

  void differentiate(const Task& task, int64_t unit, int64_t blocks, char* dbefore, char* dgate) const {
    const bool both = p_.tokens > 16;
    for (int64_t o = 0; o < p_.out_dim; o += kStep) {
      pack_step(task.out.at(0) + o / kStep * kBlockStep, task.out.block, at(p_.weight_out, o, unit),
                p_.weight_out.row_stride, blocks);
    }
    const auto rows = [&](const Matrix& weight, int64_t block) {
      return block < blocks ? RowsAhead(weight, unit + block * kStep, p_.model_dim) : RowsAhead();
    };
    rows(p_.weight_in, 0).fetch();
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = unit + block * kStep;
      multiply_rows(p_.weight_in, first, p_.model_dim, x_t_, both,
                    gated_ ? rows(p_.weight_gate, block) : rows(p_.weight_in, block + 1), task.before.at(block));
      if (gated_) {
        multiply_rows(p_.weight_gate, first, p_.model_dim, x_t_, both, rows(p_.weight_in, block + 1),
                      task.gate.at(block));
      }
      zero();
      for (int64_t step = 0; step < p_.out_dim / kStep; ++step) {
        multiply_tokens(dout_ + step * kBlockStep, task.out.at(block) + step * kBlockStep, both);
      }
      store_square(task.sums.at(0));
      transpose_square(task.dhidden.at(block), task.sums.at(0));
      visit_activation(p_.activation, [&](auto tag) {
        constexpr Activation kActivation = decltype(tag)::kValue;
        gated_ ? apply<kActivation, true>(task, first, block) : apply<kActivation, false>(task, first, block);
      });
      // hidden stands in `before` now, dbefore in `dhidden`, dgate in `gate`.
      round_transposed(reinterpret_cast<char*>(task.rows), task.before.at(block));
      pack_step(task.hidden.at(block), 0, task.rows, kStep, 1);
    }
    if (args_.dweight_out.data != nullptr) {
      for (int64_t o = 0; o < p_.out_dim; o += kStep) {
        write_products(task, args_.dweight_out, {dout_t_.at(o / kStep), task.hidden, o, unit, blocks});
      }
    }
    const auto finish = [&](const Squares& squares, const Matrix& dweight, void* dbias, char* joined) {
      for (int64_t block = 0; block < blocks; ++block) {
        const float* d = squares.at(block);
        const int64_t first = unit + block * kStep;
        if (dweight.data != nullptr) {
          for (int64_t r = 0; r < kStep; ++r) {
            const __m512i row = row_of_bfloat16(load(d + r * kStep), load(d + r * kStep + 16));
            _mm512_store_si512(task.left.at(block) + r * 64, row);
          }
        }
        if (dbias != nullptr) {
          double sums[kStep];
          for (int64_t r = 0; r < kStep; ++r) {
            sums[r] = static_cast<double>(reduce_add(load(d + r * kStep) + load(d + r * kStep + 16)));
          }
          write_sums<BFloat16>(dbias, first, kStep, sums);
        }
        if (wants_dx_) round_transposed(joined + block * kBlockStep, d);
      }
      if (dweight.data == nullptr) return;
      const int64_t panels = p_.model_dim / kStep;
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t panel = 0; panel < panels; panel += kRun) {
          write_products(task, dweight,
                         {task.left.at(block),
                          {x_.at(panel), x_.block},
                          unit + block * kStep,
                          panel * kStep,
                          min(kRun, panels - panel)});
        }
      }
    };
    finish(task.dhidden, args_.dweight_in, args_.dbias_in, dbefore);
    if (gated_) finish(task.gate, args_.dweight_gate, args_.dbias_gate, dgate);
  }

  template <Activation A, bool kGated>
  void apply(const Task& task, int64_t unit, int64_t block) const {
    float *const before = task.before.at(block), *const gate_sum = task.gate.at(block),
                 *const dhidden = task.dhidden.at(block);
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    const bool drops = p_.dropout.threshold != 0;
    uint64_t keep[4] = {};
    for (int64_t r = 0; r < kStep; ++r) {
      if (drops && r % 4 == 0) {
        dropout_keep_bits_of_rows(p_.dropout, 0, 0, static_cast<uint64_t>(unit + r), kStep, keep);
      }
      const FloatVec bias = broadcast_bfloat16(p_.bias_in, unit + r),
                     gate_bias = broadcast_bfloat16(p_.bias_gate, unit + r);
      for (int64_t t = 0; t < kStep; t += 16) {
        const int64_t i = r * kStep + t;
        FloatVec gate = zero;
        if constexpr (kGated) gate = load(gate_sum + i) + gate_bias;
        const HiddenGradients found = differentiate_hidden<A, BFloat16Math>(
            load(before + i) + bias, load(dhidden + i), kGated, gate, drops, keep[r % 4] >> t, rescale);
        store(before + i, found.hidden);
        store(dhidden + i, found.dbefore);
        if constexpr (kGated) store(gate_sum + i, found.dgate);
      }
    }
  }

  static void transpose_square(float* to, const float* from) {
    for (int64_t i = 0; i < kStep; i += 16) {
      for (int64_t j = 0; j < kStep; j += 16) {
        FloatVec block[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) block[k] = load(from + (i + k) * kStep + j);
        transpose<float>(block);
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) store(to + (j + k) * kStep + i, block[k]);
      }
    }
  }

  // Squares side by side of a weight's gradient: one step deep, the tokens.
  struct Strip {
    const char* left;
    Packed right;  // `squares` panels
    int64_t row, column, squares;
  };
  // Writes a strip's products row by row, past the caches.
  static void write_products(const Task& task, const Matrix& to, const Strip& strip) {
    for (int64_t k = 0; k < strip.squares; ++k) {
      zero();
      multiply_step(strip.left, strip.right.at(k));
      store_square(task.sums.at(k));
    }
    auto* first = static_cast<BFloat16*>(to.data) + strip.row * to.row_stride + strip.column;
    const bool whole_lines = reinterpret_cast<uintptr_t>(first) % 64 == 0 && to.row_stride % kStep == 0;
    for (int64_t r = 0; r < kStep; ++r) {
      const float* sums = task.sums.data + r * kStep;
      auto* line = reinterpret_cast<__m512i*>(first + r * to.row_stride);
      for (int64_t k = 0; k < strip.squares; ++k, sums += kSquare, ++line) {
        const __m512i values = row_of_bfloat16(load(sums), load(sums + 16));
        whole_lines ? _mm512_stream_si512(line, values) : _mm512_storeu_si512(line, values);
      }
    }
  }

  // The group's share of dx = dB W_in + dG W_gate: squares [panels of model_dim].
  void multiply_dx(const Task& task, int64_t first, int64_t end, int64_t most, float* dx) const {
    const bool both = p_.tokens > 16;
    for (int64_t k = 0; k < p_.model_dim; k += kStep) {
      zero();
      const auto add = [&](const Matrix& weight, const char* joined) {
        for (int64_t block = first; block < end; ++block, joined += kBlockStep) {
          // Packed elsewhere than the one before, whose tiles may still be loading.
          char* step = task.steps.at(block % kRun);
          pack_step(step, 0, at(weight, block * kStep, k), weight.row_stride, 1);
          multiply_tokens(joined, step, both);
        }
      };
      add(p_.weight_in, task.joined);
      if (gated_) add(p_.weight_gate, task.joined + most * kBlockStep);
      store_square(dx + k / kStep * kSquare);
    }
  }

  void sum_dx(int64_t groups) const {
    const double work =
        static_cast<double>(groups) * static_cast<double>(p_.tokens) * static_cast<double>(p_.model_dim);
    parallel_for(p_.model_dim / kStep, work, [&](int64_t panel) {
      for (int64_t t = 0; t < p_.tokens; ++t) {
        FloatVec low = FloatVec::zero(), high = FloatVec::zero();
        for (int64_t group = 0; group < groups; ++group) {
          const float* share = dx_ + group * kStep * p_.model_dim + panel * kSquare + t * kStep;
          low = low + load(share);
          high = high + load(share + 16);
        }
        auto* to = static_cast<BFloat16*>(args_.dinput.data) + t * args_.dinput.row_stride + panel * kStep;
        _mm512_storeu_si512(to, row_of_bfloat16(low, high));
      }
    });
  }

  const FeedForwardBackwardArgs& args_;
  const FeedForwardProblem& p_;
  bool gated_, wants_dx_;
  char *x_t_ = nullptr, *dout_ = nullptr;  // tokens are the columns of a right operand; the rows of a left one
  Packed x_, dout_t_;                      // tokens are the depth: panels of model_dim; blocks of out_dim
  float* dx_ = nullptr;                    // each group's share
};

}  // namespace fastattn::FASTATTN_ISA
