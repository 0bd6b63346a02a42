// Tiles of attention weights from a finished softmax's lse: each tile of scores stands for itself, so no row is passed
// over twice (Dao, "FlashAttention-2", 2023, section 3.2). Shared by the weights and by their reductions.
#pragma once

#include "attention.h"
#include "attention_scores.h"
#include "mask.h"
#include "panel.h"
#include "philox.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

template <typename C>
class WeightTiles {
 public:
  static constexpr int64_t kRows = 96;   // queries a tile: a multiple of kTileRows
  static constexpr int64_t kKeys = 256;  // keys a tile: a multiple of 64 (a word of mask bits) and of every panel width

  WeightTiles(const AttentionProblem& p, const View& lse, ScoreUnit unit = ScoreUnit::kLog2)
      : p_(p), lse_(lse), scores_(p, unit) {}

  int64_t queries_size() const { return kRows * p_.head_dim; }
  int64_t keys_size() const { return panels_size<C>(p_.head_dim, kKeys); }

  // Packs keys [columns.begin, columns.end) of a key head.
  void pack(C* k, int64_t batch, int64_t head_kv, Range columns) const {
    visit(p_.k.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      pack_transposed(k, row_of<const T>(p_.k, batch, head_kv, columns.begin), p_.k.stride[2], p_.head_dim,
                      columns.end - columns.begin);
    });
  }

  // Writes a tile of scores, in powers of two, to s [rows, kKeys], -inf where invisible and in the rest of each row's
  // last vector; returns false, and writes nothing, where no key is visible. `q` is memory for the queries, `k` the
  // packed columns.
  bool score(C* s, C* q, const C* k, int64_t batch, int64_t head, Range rows, Range columns) const {
    const Mask mask(p_, batch, head);
    const Coverage coverage = mask.coverage(rows, columns);
    if (coverage == Coverage::kNone) return false;
    const int64_t width = columns.end - columns.begin;
    scores_.load_queries(q, batch, head, rows);
    multiply_along_dim(rows.end - rows.begin, width, p_.head_dim, q, p_.head_dim, k, s, kKeys);
    scores_.finish(s, kKeys, batch, head, rows, columns, coverage != Coverage::kAll || width % Vec<C>::kWidth != 0,
                   mask);
    return true;
  }

  // Writes the weights of a tile of scores to w, which may be s; whole vectors of each row.
  void exponentiate(C* w, const C* s, int64_t batch, int64_t head, Range rows, Range columns) const {
    const int64_t width = columns.end - columns.begin;
    const Vec<C> hidden = Vec<C>::set1(-static_cast<C>(__builtin_inff())), unit = Vec<C>::set1(scores_.to_log2());
    for (int64_t i = rows.begin; i < rows.end; ++i, s += kKeys, w += kKeys) {
      const RowScale<C> row = scale(batch, head, i);
      const Vec<C> shift = Vec<C>::set1(row.shift), factor = Vec<C>::set1(row.factor);
      if (row.shift == row.shift) {
        for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
          store(w + j, probability(load(s + j) * unit, shift, factor));
        }
      } else {  // a NaN reaches the keys that its row sees and no other
        for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
          store(w + j, select(eq(load(s + j), hidden), Vec<C>::zero(), shift));
        }
      }
      if (p_.dropout.threshold != 0) drop(w, width, batch * p_.num_heads_q + head, i, columns.begin);
    }
  }

  // score() and exponentiate() in place.
  bool weigh(C* s, C* q, const C* k, int64_t batch, int64_t head, Range rows, Range columns) const {
    const bool visible = score(s, q, k, batch, head, rows, columns);
    if (visible) exponentiate(s, s, batch, head, rows, columns);
    return visible;
  }

  RowScale<C> scale(int64_t batch, int64_t head, int64_t row) const {
    return RowScale<C>(*row_of<const double>(lse_, batch, head, row));
  }

 protected:
  void drop(C* w, int64_t width, int64_t slice, int64_t row, int64_t column) const {
    const Vec<C> rescale = Vec<C>::set1(static_cast<C>(p_.dropout.rescale));
    for (int64_t j = 0; j < width; j += 64) {
      const uint64_t keep = dropout_keep_bits(p_.dropout, static_cast<uint64_t>(slice), static_cast<uint64_t>(row),
                                              static_cast<uint64_t>(column + j));
      for (int64_t k = 0; k < 64 && j + k < width; k += Vec<C>::kWidth) {
        const Vec<C> kept = load(w + j + k) * rescale;
        store(w + j + k, select(mask_from_bits<C>(keep >> k), kept, Vec<C>::zero()));
      }
    }
  }

  const AttentionProblem& p_;
  const View& lse_;
  const Scores<C> scores_;
};

}  // namespace fastattn::FASTATTN_ISA
