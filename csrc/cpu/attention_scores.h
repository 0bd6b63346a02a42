// Scores of a tile: from the raw product of queries and keys to what the softmax sees. Shared by attention's forward,
// backward and weights, so that all three see the same bits.
#pragma once

#include "attention.h"
#include "mask.h"
#include "panel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// kRaw is for products of the queries as they are, unscaled.
enum class ScoreUnit { kCheapest, kNatural, kRaw };

// A score is held in one of two units, unless kNatural asks for the second. Without softcap and bias it stays the
// product of the packed queries and the keys, and the rest of the scale is folded into the exponent: nothing is done to
// a tile that is not masked. Otherwise it is the score itself.
template <typename C>
class Scores {
 public:
  explicit Scores(const AttentionProblem& p, ScoreUnit unit = ScoreUnit::kCheapest) : p_(p) {
    plain_ = unit != ScoreUnit::kNatural && p.softcap == 0 && p.bias[0].data == nullptr && p.bias[1].data == nullptr;
    if (unit == ScoreUnit::kRaw) {
      plain_ = plain_ && p.softmax_scale > 0;
      query_factor_ = 1;
      rest_ = static_cast<C>(p.softmax_scale);
      to_natural_ = plain_ ? p.softmax_scale : 1.0;
      return;
    }
    // The scale's sign and power of two go into the queries, where they cost no rounding; [1/2, 1) is left. A scale of
    // 0 goes there whole: a masked score of -inf must not meet a factor of 0.
    int exponent = 0;
    const double fraction = __builtin_frexp(__builtin_fabs(p.softmax_scale), &exponent);
    query_factor_ =
        static_cast<C>(__builtin_copysign(fraction == 0 ? 0.0 : __builtin_ldexp(1.0, exponent), p.softmax_scale));
    rest_ = fraction == 0 ? C(1) : static_cast<C>(fraction);
    to_natural_ = plain_ ? (fraction == 0 ? 1.0 : fraction) : 1.0;
  }

  double to_natural() const { return to_natural_; }  // natural-log units in one unit of the held score
  C to_log2() const { return static_cast<C>(to_natural_ * kLog2E); }

  // Writes queries [rows.begin, rows.end) as the product wants them: contiguous rows of head_dim.
  void load_queries(C* to, int64_t batch, int64_t head, Range rows) const {
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const Vec<C> factor = Vec<C>::set1(query_factor_);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* from = row_of<const T>(p_.q, batch, head, i);
        for_each_vec<C>(p_.head_dim,
                        [&](int64_t d, auto n) { store_n(to + d, load_as_n<C>(from + d, n) * factor, n); });
        to += p_.head_dim;
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
        scale_and_cap(s, width, slope == nullptr ? nullptr : slope + (i - rows.begin) * stride);
        add_bias(p_.bias[0], s, batch, head, i, columns);
        add_bias(p_.bias[1], s, batch, head, i, columns);
      }
      if (masked) apply_mask(s, width, i, columns.begin, mask);
    }
  }

 private:
  void scale_and_cap(C* s, int64_t width, C* slope) const {
    const Vec<C> rest = Vec<C>::set1(rest_), cap = Vec<C>::set1(static_cast<C>(p_.softcap));
    for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
      Vec<C> x = load(s + j) * rest;
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
        store(s + j, load(s + j) + x);
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

  const AttentionProblem& p_;
  C query_factor_, rest_;
  double to_natural_;
  bool plain_;
};

}  // namespace fastattn::FASTATTN_ISA
