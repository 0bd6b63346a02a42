// The bfloat16 feed-forward on AMX for a few tokens, backward: the equations of feed_forward_gradients.h, where there
// is more to read and to write than to multiply.
//
// A task is a group of hidden units: it reads their weights once, packing what has to be packed as it goes, and writes
// their gradients past the caches. Of dx it leaves its share, which are added up in the order of their units; so that
// the bits are the same at any thread count, groups depend on the call's shape alone.
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
        const auto square = [&] { return carver.take<float>(kSquare); };
        task.before = square(), task.gate = square(), task.dhidden = square(), task.sum = square();
        task.packed = carver.take<char>(kBlockStep);
        task.left = carver.take<char>(kBlockStep);
        task.right = carver.take<char>(kBlockStep);
        task.rows = carver.take<BFloat16>(kSquare);
        task.joined = carver.take<char>(2 * most * kBlockStep);
      };
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(measure(carve))));
      carve(carver);
      TileScope tiles;
      const int64_t first = groups.begin(group), end = groups.begin(group + 1);
      for (int64_t block = first; block < end; ++block) {
        differentiate(task, block * kStep, task.joined + (block - first) * kBlockStep,
                      task.joined + (most + block - first) * kBlockStep);
      }
      if (wants_dx_) multiply_dx(task, first, end, most, dx_ + group * kStep * p_.model_dim);
      stream_end();
    });
    if (wants_dx_) sum_dx(groups.parts);
  }

 private:
  static constexpr int64_t kMostGroups = 16;

  // Squares are [unit][token] but for what stands in `sum`.
  struct Task {
    float *before, *gate, *dhidden, *sum;  // later hidden, dgate and dbefore
    char *packed, *left, *right;
    BFloat16* rows;  // [token][unit]
    char* joined;    // dbefore, and dgate, of the group's blocks: a left operand each
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

  void differentiate(const Task& task, int64_t unit, char* dbefore, char* dgate) const {
    multiply_rows(p_.weight_in, unit, p_.model_dim, x_t_, true, task.before);
    if (gated_) multiply_rows(p_.weight_gate, unit, p_.model_dim, x_t_, true, task.gate);
    // dH = dout W_out, of which W_out comes by columns.
    zero();
    for (int64_t o = 0; o < p_.out_dim; o += kStep) {
      TileEngine<1>::pack_right({task.packed, 0}, at(p_.weight_out, o, unit), p_.weight_out.row_stride, kStep, kStep);
      multiply_step(dout_ + o / kStep * kBlockStep, task.packed);
    }
    store_square(task.sum);
    transpose_square(task.dhidden, task.sum);
    visit_activation(p_.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::kValue;
      gated_ ? apply<kActivation, true>(task, unit) : apply<kActivation, false>(task, unit);
    });
    // hidden stands in `before` now, dbefore in `dhidden`, dgate in `gate`.
    if (args_.dweight_out.data != nullptr) {
      round_transposed(reinterpret_cast<char*>(task.rows), task.before);
      TileEngine<1>::pack_right({task.right, 0}, task.rows, kStep, kStep, kStep);
      for (int64_t o = 0; o < p_.out_dim; o += kStep) {
        write_product(task, args_.dweight_out, o, unit, dout_t_.at(o / kStep), task.right);
      }
    }
    const auto finish = [&](const float* d, const Matrix& dweight, void* dbias, char* joined) {
      if (dweight.data != nullptr) {
        for (int64_t r = 0; r < kStep; ++r) {
          _mm512_store_si512(task.left + r * 64, row_of_bfloat16(load(d + r * kStep), load(d + r * kStep + 16)));
        }
        for (int64_t k = 0; k < p_.model_dim; k += kStep) {
          write_product(task, dweight, unit, k, task.left, x_.at(k / kStep));
        }
      }
      if (dbias != nullptr) {
        double sums[kStep];
        for (int64_t r = 0; r < kStep; ++r) {
          sums[r] = static_cast<double>(reduce_add(load(d + r * kStep) + load(d + r * kStep + 16)));
        }
        write_sums<BFloat16>(dbias, unit, kStep, sums);
      }
      if (wants_dx_) round_transposed(joined, d);
    };
    finish(task.dhidden, args_.dweight_in, args_.dbias_in, dbefore);
    if (gated_) finish(task.gate, args_.dweight_gate, args_.dbias_gate, dgate);
  }

  template <Activation A, bool kGated>
  void apply(const Task& task, int64_t unit) const {
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    uint64_t keep[4];
    for (int64_t r = 0; r < kStep; ++r) {
      if (p_.dropout.threshold != 0 && r % 4 == 0) {
        dropout_keep_bits_of_rows(p_.dropout, 0, 0, static_cast<uint64_t>(unit + r), kStep, keep);
      }
      const FloatVec bias = broadcast_bfloat16(p_.bias_in, unit + r),
                     gate_bias = broadcast_bfloat16(p_.bias_gate, unit + r);
      for (int64_t t = 0; t < kStep; t += 16) {
        const int64_t i = r * kStep + t;
        FloatVec slope, gate;
        const FloatVec y = activate_bfloat16<A>(load(task.before + i) + bias, &slope);
        FloatVec hidden = y, d = load(task.dhidden + i);
        if constexpr (kGated) {
          gate = load(task.gate + i) + gate_bias;
          hidden = y * gate;
        }
        if (p_.dropout.threshold != 0) {
          const auto kept = mask_from_bits<float>(keep[r % 4] >> t);
          hidden = select(kept, hidden * rescale, zero);
          d = select(kept, d * rescale, zero);
        }
        store(task.before + i, hidden);
        if constexpr (kGated) {
          store(task.gate + i, d * y);
          d = d * gate;
        }
        d = d * slope;
        // A gradient of NaN does not pass where relu is flat.
        if constexpr (A == Activation::kRelu) d = select(eq(slope, zero), zero, d);
        store(task.dhidden + i, d);
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

  // A square of a weight's gradient: one step deep, the tokens.
  void write_product(const Task& task, const Matrix& to, int64_t row, int64_t column, const char* left,
                     const char* right) const {
    zero();
    multiply_step(left, right);
    store_square(task.sum);
    auto* first = static_cast<BFloat16*>(to.data) + row * to.row_stride + column;
    const bool whole_lines = reinterpret_cast<uintptr_t>(first) % 64 == 0 && to.row_stride % kStep == 0;
    for (int64_t r = 0; r < kStep; ++r) {
      const __m512i values = row_of_bfloat16(load(task.sum + r * kStep), load(task.sum + r * kStep + 16));
      auto* line = reinterpret_cast<__m512i*>(first + r * to.row_stride);
      whole_lines ? _mm512_stream_si512(line, values) : _mm512_storeu_si512(line, values);
    }
  }

  // The group's share of dx = dB W_in + dG W_gate: squares [panels of model_dim].
  void multiply_dx(const Task& task, int64_t first, int64_t end, int64_t most, float* dx) const {
    for (int64_t k = 0; k < p_.model_dim; k += kStep) {
      zero();
      const auto add = [&](const Matrix& weight, const char* joined) {
        for (int64_t block = first; block < end; ++block, joined += kBlockStep) {
          TileEngine<1>::pack_right({task.packed, 0}, at(weight, block * kStep, k), weight.row_stride, kStep, kStep);
          multiply_step(joined, task.packed);
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
