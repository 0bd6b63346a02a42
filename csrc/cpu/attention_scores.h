// Scores of a tile: from the raw product of queries and keys to what the softmax sees. Shared by attention's forward,
// backward and weights, so that all three see the same bits.
#pragma once

#include "attention.h"
#include "mask.h"
#include "panel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// to[i * stride + j] = sum_d a[i * a_row + d] * panels[d, j]. Few rows, whose time is that of packing the panels, are
// summed in pieces along d: so does PyTorch, and one chain of sums is less exact.
template <typename C>
inline void multiply_along_dim(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row, const C* panels,
                               C* to, int64_t stride) {
  constexpr int64_t kFewRows = 4, kPiece = 16;
  const int64_t step = rows < kFewRows ? kPiece : depth;
  for (int64_t d = 0; d < depth; d += step) {
    multiply(rows, columns, min(step, depth - d), a + d, a_row, 1, panels + d * kPanelWidth<C>, panel_size<C>(depth),
             [&](int64_t i, int64_t j, Vec<C> value) {
               C* at = to + i * stride + j;
               store(at, d == 0 ? value : load(at) + value);
             });
  }
}

// What the product of queries and keys starts from: queries that carry the scale, or (kRaw) the caller's own.
enum class ScoreUnit { kLog2, kRaw };

// A score is held in powers of two, score * log2(e): the scale and log2(e) are multiplied into the queries, one
// rounding each, so that a probability is exp2(score - shift) and nothing is done to a tile without mask, softcap and
// bias. The product of raw queries needs to_log2() there.
template <typename C>
class Scores {
 public:
  explicit Scores(const AttentionProblem& p, ScoreUnit unit = ScoreUnit::kLog2)
      : p_(p), raw_(unit == ScoreUnit::kRaw), scale_(p.softmax_scale * kLog2E) {
    plain_ = p.softcap == 0 && p.bias[0].data == nullptr && p.bias[1].data == nullptr;
    // A masked score of -inf must not meet a factor of 0.
    if (raw_) plain_ = plain_ && p.softmax_scale > 0;
  }

  // Powers of two in one unit of the held score: 1, but for raw products that finish() leaves as they are.
  C to_log2() const { return raw_ && plain_ ? static_cast<C>(scale_) : C(1); }

  // Writes queries [rows.begin, rows.end) as the product wants them: contiguous rows of head_dim, times the scale.
  void load_queries(C* to, int64_t batch, int64_t head, Range rows) const {
    // In two parts: a rounded scale would be a softmax at another temperature. The parts have one sign and neither is
    // 0, because inf - inf and inf * 0 are NaN.
    C high = static_cast<C>(scale_);
    if (__builtin_fabs(static_cast<double>(high)) >= __builtin_fabs(scale_)) high *= C(1) - kHalfUlp;
    const Vec<C> low = Vec<C>::set1(static_cast<C>(scale_ - static_cast<double>(high))), factor = Vec<C>::set1(high);
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* from = row_of<const T>(p_.q, batch, head, i);
        for_each_vec<C>(p_.head_dim, [&](int64_t d, auto n) {
          const Vec<C> x = load_as_n<C>(from + d, n);
          store_n(to + d, fma(x, factor, x * low), n);
        });
        to += p_.head_dim;
      }
    });
  }

  // Fetches the bias of a few columns, at most a page of them, of rows that finish() is to meet soon.
  void fetch_bias(int64_t batch, int64_t head, Range rows, Range columns) const {
    const View& bias = p_.bias[0];
    if (bias.data == nullptr || bias.stride[3] != 1 || bias.stride[2] == 0) return;
    visit(bias.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      constexpr int64_t kLine = 64 / sizeof(T);
      asm volatile("");  // a function that does nothing but fetch has no effect to GCC, which drops its calls
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* from = row_of<const T>(bias, batch, head, i);
        for (int64_t j = columns.begin; j < columns.end; j += kLine) __builtin_prefetch(from + j);
      }
    });
  }

  // Turns raw products s[(i - rows.begin) * stride + (j - columns.begin)] into scores, in place. With `masked`,
  // invisible ones become -inf, up to the end of the last vector of each row; columns.begin is then a multiple of 64.
  // With softcap, `slope` (if not null) gets each score's derivative by the score before it.
  void finish(C* s, int64_t stride, int64_t batch, int64_t head, Range rows, Range columns, bool masked,
              const Mask& mask, C* slope = nullptr) const {
    const int64_t width = columns.end - columns.begin;
    for (int64_t i = rows.begin; i < rows.end; ++i, s += stride) {
      if (!plain_) {
        if (raw_ || p_.softcap != 0) {
          scale_and_cap(s, width, slope == nullptr ? nullptr : slope + (i - rows.begin) * stride);
        }
        add_bias(p_.bias[0], s, batch, head, i, columns);
        add_bias(p_.bias[1], s, batch, head, i, columns);
      }
      if (masked) apply_mask(s, width, i, columns.begin, mask);
    }
  }

 private:
  void scale_and_cap(C* s, int64_t width, C* slope) const {
    const Vec<C> scale = Vec<C>::set1(raw_ ? static_cast<C>(scale_) : C(1));
    const Vec<C> cap = Vec<C>::set1(static_cast<C>(p_.softcap * kLog2E));
    for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
      Vec<C> x = load(s + j) * scale;
      if (p_.softcap != 0) {
        const Vec<C> t = tanh(x / cap);
        if (slope != nullptr) store(slope + j, fnma(t, t, Vec<C>::set1(C(1))));
        x = cap * t;
      }
      store(s + j, x);
    }
  }

  static void add_bias(const View& bias, C* s, int64_t batch, int64_t head, int64_t row, Range columns) {
    if (bias.data == nullptr) return;
    const Vec<C> log2_e = Vec<C>::set1(static_cast<C>(kLog2E));
    visit(bias.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const T* from = row_of<const T>(bias, batch, head, row) + columns.begin * bias.stride[3];
      for_each_vec<C>(columns.end - columns.begin, [&](int64_t j, auto n) {
        Vec<C> x;
        if (bias.stride[3] == 1) {
          x = load_as_n<C>(from + j, n);
        } else {
          C lanes[Vec<C>::kWidth] = {};
          for (int k = 0; k < n; ++k) lanes[k] = to_compute<C>(from[(j + k) * bias.stride[3]]);
          x = load(lanes);
        }
        store(s + j, fma(x, log2_e, load(s + j)));
      });
    });
  }

  static void apply_mask(C* s, int64_t width, int64_t row, int64_t column, const Mask& mask) {
    const Vec<C> hidden = Vec<C>::set1(-static_cast<C>(__builtin_inff()));
    for (int64_t j = 0; j < width; j += 64) {
      const uint64_t bits = mask.visible_bits(row, column + j);
      const int64_t end = min(64, round_up(width - j, Vec<C>::kWidth));
      for (int64_t k = 0; k < end; k += Vec<C>::kWidth) {
        store(s + j + k, select(mask_from_bits<C>(bits >> k), load(s + j + k), hidden));
      }
    }
  }

  static constexpr C kHalfUlp = sizeof(C) == 4 ? C(0x1p-24) : C(0x1p-53);

  const AttentionProblem& p_;
  const bool raw_;
  const double scale_;
  bool plain_;
};

// The probabilities of a row whose lse is known: exp2_less(score, shift) * factor, 0 for an empty row. The shift is the
// lse's whole powers of two, the factor the rest: nothing is subtracted from a score, and no rounding of the lse is an
// error of the whole row.
template <typename C>
struct RowScale {
  C shift, factor;
  C log2_lse;  // in one number, rounded: for probabilities that are rounded more than that; 0 for an empty row

  explicit RowScale(double lse) {
    // An infinite lse (of a score of +inf) is not subtracted: what is finite beside it must become 0.
    constexpr double kHighest = sizeof(C) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
    const bool empty = lse == -__builtin_inf(), infinite = lse == __builtin_inf();
    const double exact = empty ? 0.0 : infinite ? kHighest : lse * kLog2E;
    log2_lse = static_cast<C>(exact);
    shift = static_cast<C>(__builtin_rint(exact));
    // Far out a double holds nothing of the sum beside the maximum, and the nearest C is that maximum.
    const bool far = exact > 0x1p45 || exact < -0x1p45;
    double rest[Vec<double>::kWidth];
    store(rest, exp2(Vec<double>::set1(far ? 0.0 : static_cast<double>(shift) - exact)));
    factor = empty ? C(0) : static_cast<C>(rest[0]);
  }
};

// The probability of a score, by its row's scale. Another kernel's sum may have given the lse a largest score that
// differs from this one in its last bits, and beside huge scores those are many powers of two: what would exceed 1, and
// make Inf * 0 of a gradient, is held to it.
template <typename C>
inline Vec<C> probability(Vec<C> score, Vec<C> shift, Vec<C> factor) {
  return min(Vec<C>::set1(1), exp2_less(score, shift) * factor);
}

}  // namespace fastattn::FASTATTN_ISA
