// The bfloat16 feed-forward on AMX for a few tokens, forward: there is more to read than to multiply.
//
// Weights are left operands, read once and where they lie: hidden^T = W_in x^T, whose squares are, without any packing
// but of the tokens, the right operand of out^T = W_out hidden^T.
#pragma once

#include "feed_forward_bfloat16.h"
#include "feed_forward_groups.h"

namespace fastattn::FASTATTN_ISA {

// Fetches 32 rows of a weight into the second-level cache, one row after the other. Measured on one core: a line of
// each row in turn comes at 10 GB/s, however far ahead it is asked for; in the order of their addresses they come
// at 30.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const Matrix& weight, int64_t row, int64_t depth)
      : row_(static_cast<const BFloat16*>(weight.data) + row * weight.row_stride),
        stride_(weight.row_stride),
        depth_(depth),
        left_(depth) {}
  // As many lines as make up all rows in as many calls as a row has steps.
  void fetch_step() {
    if (left_ == 0) return;
    left_ -= kStep;
    for (int64_t i = 0; i < kStep; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(row_ + column_), _MM_HINT_T1);
      column_ += kStep;
      if (column_ == depth_) {
        column_ = 0;
        row_ += stride_;
      }
    }
  }
  void fetch() {
    while (left_ > 0) fetch_step();
  }

 private:
  const BFloat16* row_ = nullptr;
  int64_t stride_ = 0, depth_ = 0, column_ = 0;
  int64_t left_ = 0;  // of the steps, in elements
};

// square[row][token] = W[row] . x[token] for 32 rows; of the tokens, 16 or `both` halves.
inline void multiply_rows(const Matrix& weight, int64_t row, int64_t depth, const char* right, bool both,
                          RowsAhead ahead, float* square) {
  const int64_t bytes = weight.row_stride * static_cast<int64_t>(sizeof(BFloat16));
  const char* a = static_cast<const char*>(weight.data) + row * bytes;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t k = 0; k < depth; k += kStep, a += 64, right += kBlockStep) {
    ahead.fetch_step();
    tile_stream<4>(a, bytes);
    tile_load<6>(right, 64);
    tile_multiply<0, 4, 6>();
    tile_stream<5>(a + 16 * bytes, bytes);
    tile_multiply<2, 5, 6>();
    if (!both) continue;
    tile_load<7>(right + kTileBytes, 64);
    tile_multiply<1, 4, 7>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(square, kStep * 4);
  tile_store<1>(square + 16, kStep * 4);
  tile_store<2>(square + 16 * kStep, kStep * 4);
  tile_store<3>(square + 16 * kStep + 16, kStep * 4);
}

// Whether tokens are few, and all dimensions of whole tiles.
inline bool is_few_tokens_bfloat16(const FeedForwardProblem& p) {
  return p.tokens <= kStep && p.model_dim % kStep == 0 && p.ff_dim % kStep == 0 && p.out_dim % kStep == 0;
}

inline FloatVec broadcast_bfloat16(const void* vector, int64_t i) {
  return FloatVec::set1(vector == nullptr ? 0.0f : to_float(static_cast<const BFloat16*>(vector)[i]));
}

class FewTokensBFloat16 {
 public:
  explicit FewTokensBFloat16(const FeedForwardArgs& args) : args_(args), p_(args.problem) {}

  void run() {
    const auto carve = [&](Carver& carver) {
      x_t_ = take_packed(carver, kStep, p_.model_dim).data;
      hidden_t_ = take_packed(carver, kStep, p_.ff_dim).data;
    };
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure(carve))));
    carve(shared);
    TileEngine<1>::pack_right_transposed({x_t_, 0}, static_cast<const BFloat16*>(p_.input.data), p_.input.row_stride,
                                         p_.model_dim, p_.tokens);
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    share(p_.ff_dim, work, [&](int64_t first, int64_t end) {
      visit_activation(p_.activation, [&](auto tag) { run_in<decltype(tag)::kValue>(first, end); });
    });
    share(p_.out_dim, work, [&](int64_t first, int64_t end) { run_out(first, end); });
  }

 private:
  template <typename Body>
  static void share(int64_t rows, double work, const Body& body) {
    // Some tasks more than threads, so that none waits long for another; a word of dropout bits is of 4 rows.
    const Parts parts = {rows / kStep, min(4 * max_threads(), rows / kStep)};
    parallel_for(parts.parts, work, [&](int64_t part) {
      TileScope tiles;
      body(parts.begin(part), parts.begin(part + 1));
    });
  }

  template <Activation A>
  void run_in(int64_t first, int64_t end) const {
    alignas(64) float square[kSquare], gates[kSquare];
    const bool gated = p_.weight_gate.data != nullptr;
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    const auto rows = [&](const Matrix& weight, int64_t block) {
      return block < end ? RowsAhead(weight, block * kStep, p_.model_dim) : RowsAhead();
    };
    rows(p_.weight_in, first).fetch();
    for (int64_t block = first; block < end; ++block) {
      const int64_t unit = block * kStep;
      multiply_rows(p_.weight_in, unit, p_.model_dim, x_t_, p_.tokens > 16,
                    gated ? rows(p_.weight_gate, block) : rows(p_.weight_in, block + 1), square);
      if (gated) {
        multiply_rows(p_.weight_gate, unit, p_.model_dim, x_t_, p_.tokens > 16, rows(p_.weight_in, block + 1), gates);
      }
      uint64_t keep[4];
      for (int64_t half = 0; half < round_up(p_.tokens, 16); half += 16) {
        FloatVec even = zero;
        for (int64_t i = 0; i < kStep; ++i) {
          FloatVec y =
              activate<A, BFloat16Math>(load(square + i * kStep + half) + broadcast_bfloat16(p_.bias_in, unit + i));
          if (gated) y = y * (load(gates + i * kStep + half) + broadcast_bfloat16(p_.bias_gate, unit + i));
          if (p_.dropout.threshold != 0) {
            if (i % 4 == 0) {
              dropout_keep_bits_of_rows(p_.dropout, 0, static_cast<uint64_t>(half), static_cast<uint64_t>(unit + i), 16,
                                        keep);
            }
            y = select(mask_from_bits<float>(keep[i % 4]), y * rescale, zero);
          }
          if (i % 2 == 0) {
            even = y;
          } else {
            char* line = hidden_t_ + block * kBlockStep + half / 16 * kTileBytes + i / 2 * 64;
            _mm512_store_si512(line, pairs_of_bfloat16(even, y));
          }
        }
      }
    }
  }

  void run_out(int64_t first, int64_t end) const {
    alignas(64) float square[kSquare];
    const auto rows = [&](int64_t block) {
      return block < end ? RowsAhead(p_.weight_out, block * kStep, p_.ff_dim) : RowsAhead();
    };
    rows(first).fetch();
    for (int64_t block = first; block < end; ++block) {
      const int64_t column = block * kStep;
      multiply_rows(p_.weight_out, column, p_.ff_dim, hidden_t_, p_.tokens > 16, rows(block + 1), square);
      for (int64_t i = 0; i < kStep; ++i) {
        const FloatVec bias = broadcast_bfloat16(p_.bias_out, column + i);
        for (int64_t half = 0; half < kStep; half += 16) {
          store(square + i * kStep + half, load(square + i * kStep + half) + bias);
        }
      }
      for (int64_t half = 0; half < p_.tokens; half += 16) {
        const auto row_of = [&](int64_t i) {
          BFloat16* out = static_cast<BFloat16*>(args_.out.data) + (half + i) * args_.out.row_stride + column;
          return half + i < p_.tokens ? out : nullptr;
        };
        write_transposed(row_of, kStep, square + half, kStep, FloatVec::set1(1.0f));
      }
    }
  }

  const FeedForwardArgs& args_;
  const FeedForwardProblem& p_;
  char *x_t_ = nullptr, *hidden_t_ = nullptr;  // right operands: tokens are their columns
};

}  // namespace fastattn::FASTATTN_ISA
