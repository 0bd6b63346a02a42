// The mean over the heads of the attention weights, from the probabilities of the forward itself: one product of
// queries and keys and one exponential a score serve both.
//
// A task takes a block of queries through all heads. It keeps the probabilities of some heads, tile by tile, with what
// was subtracted from their scores, until the heads' sums are known, and then adds them up; where all heads fit the
// cache together, straight to the output. That is memory for a block of queries and no more, and an order of sums that
// no thread changes.
#pragma once

#include <cstring>

#include "attention_forward.h"
#include "attention_weights.h"
#include "mask.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// What attention_weights needs for the mean, once attention_forward has written the lse.
inline AttentionWeightsArgs mean_weights(const AttentionForwardArgs& args) {
  const AttentionProblem& p = args.problem;
  const View lse = {args.lse, DType::kFloat64, {p.num_heads_q * p.seq_len_q, p.seq_len_q, 1, 1}};
  return {p, lse, args.weights, true};
}

// Kept: how probabilities are kept. kVecs vectors of them are read at once, from column j on of row i of a tile:
//   static void read(const char* tile, int64_t i, int64_t j, Vec<C> (&x)[kVecs]);
template <typename C, typename Kept>
class MeanWeights {
 public:
  // The state of a block of queries.
  struct Block {
    char* kept;  // [heads, tiles, tile_bytes]: the probabilities of the heads at hand
    C* shift;    // [heads, tiles, rows]: what was subtracted from their scores, in powers of two; then their factors
    Range* columns;  // [heads, tiles]: which columns they are; none where no key was visible
    C* sum;          // [tiles, rows, keys]: of the heads before
  };

  // Of blocks of `rows` queries, whose probabilities take `tile_bytes` for each tile of `keys` keys; as many heads are
  // added up together as fit kept_bytes.
  MeanWeights(const AttentionForwardArgs& args, int64_t rows, int64_t keys, int64_t tile_bytes, int64_t kept_bytes)
      : args_(args), rows_(rows), padded_rows_(round_up(rows, Vec<C>::kWidth)), keys_(keys), tile_bytes_(tile_bytes) {
    tiles_ = wanted() ? ceil_div(args.problem.seq_len_k, keys) : 0;
    const int64_t most = min(kMostHeads, args.problem.num_heads_q);
    heads_ = wanted() ? max(1, min(most, kept_bytes / (tiles_ * tile_bytes_))) : 1;
  }

  bool wanted() const { return args_.weights.data != nullptr; }

  // Bytes of a block.
  int64_t bytes() const {
    const int64_t of_head = tile_bytes_ + padded_rows_ * static_cast<int64_t>(sizeof(C)) + sizeof(Range);
    return tiles_ * heads_ * of_head + sum_size() * static_cast<int64_t>(sizeof(C)) + 4 * 64;
  }
  Block carve(Carver* carver) const {
    Block block;
    block.kept = carver->take<char>(heads_ * tiles_ * tile_bytes_);
    block.shift = carver->take<C>(heads_ * tiles_ * padded_rows_);
    block.columns = carver->take<Range>(heads_ * tiles_);
    block.sum = carver->take<C>(sum_size());
    return block;
  }

  void start_head(const Block& block, int64_t head) const {
    for (int64_t tile = 0; tile < tiles_; ++tile) block.columns[index(head, tile)] = {0, 0};
  }

  // Where the probabilities of the tile that `column` is in are to be written.
  char* kept(const Block& block, int64_t head, int64_t column) const {
    return block.kept + index(head, column / keys_) * tile_bytes_;
  }
  // Notes which columns these are, and the rows' shifts at that time.
  void note(const Block& block, int64_t head, Range columns, const C* shift) const {
    const int64_t at = index(head, columns.begin / keys_);
    block.columns[at] = columns;
    std::memcpy(block.shift + at * padded_rows_, shift, static_cast<size_t>(rows_) * sizeof(C));
  }

  // A row whose lse is NaN or +inf: attention_weights knows which of its weights are what.
  void note_lse(double lse) const {
    if (wanted() && !(lse < __builtin_inf())) __atomic_store_n(&regular_, false, __ATOMIC_RELAXED);
  }
  bool regular() const { return regular_; }

  // Ends a head, whose weights are factor[i] * 2^(shift at the time - shift[i]) times the probabilities. After the last
  // head the mean of these rows is in the output.
  void end_head(const Block& block, int64_t batch, int64_t head, Range rows, const C* shift, const C* factor) const {
    constexpr int W = Vec<C>::kWidth;
    const Vec<C> nothing = Vec<C>::set1(-static_cast<C>(__builtin_inff()));
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      C* const at = block.shift + index(head, tile) * padded_rows_;
      for (int64_t i = 0; i < rows.end - rows.begin; i += W) {
        const Vec<C> before = load(at + i), scale = load(factor + i) * exp2(before - load(shift + i));
        store(at + i, select(eq(before, nothing), Vec<C>::zero(), scale));  // -inf - -inf is NaN
      }
    }
    const bool last = head + 1 == args_.problem.num_heads_q;
    if (!last && (head + 1) % heads_ != 0) return;
    const int64_t count = head % heads_ + 1;
    if (!last) {
      const Vec<C> one = Vec<C>::set1(1);
      return add_heads(block, count, head < heads_, rows, one, [&](int64_t tile, int64_t i, int64_t j, Vec<C> x) {
        store(block.sum + (tile * rows_ + i) * keys_ + j, x);
      });
    }
    const Vec<C> share = Vec<C>::set1(static_cast<C>(1.0 / static_cast<double>(args_.problem.num_heads_q)));
    visit(args_.weights.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        add_heads(block, count, head < heads_, rows, share, [&](int64_t tile, int64_t i, int64_t j, Vec<C> x) {
          const int64_t column = tile * keys_ + j, n = min(W, args_.problem.seq_len_k - column);
          T* const to = row_of<T>(args_.weights, batch, 0, rows.begin + i) + column;
          if (n == W) {
            store_n(to, x, AllLanes<C>());
          } else if (n > 0) {
            store_n(to, x, static_cast<int>(n));
          }
        });
      }
    });
  }

 private:
  static constexpr int64_t kMostHeads = 16;

  int64_t index(int64_t head, int64_t tile) const { return head % heads_ * tiles_ + tile; }
  int64_t sum_size() const { return heads_ < args_.problem.num_heads_q ? tiles_ * rows_ * keys_ : 0; }

  // Calls write(tile, i, j, factor * the weights of `count` heads and of the heads before them, if there are any).
  template <typename Write>
  void add_heads(const Block& block, int64_t count, bool first, Range rows, Vec<C> factor, const Write& write) const {
    constexpr int W = Vec<C>::kWidth, kVecs = Kept::kVecs;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const char* kept[kMostHeads];
      const C* scale[kMostHeads];
      Range columns{keys_, 0};  // in the tile, the same for all heads that see it
      int64_t seen = 0;
      for (int64_t head = 0; head < count; ++head) {
        const Range of_head = block.columns[index(head, tile)];
        if (of_head.end <= of_head.begin) continue;
        columns = {of_head.begin - tile * keys_, of_head.end - tile * keys_};
        kept[seen] = block.kept + index(head, tile) * tile_bytes_;
        scale[seen++] = block.shift + index(head, tile) * padded_rows_;
      }
      const C* sum = block.sum + tile * rows_ * keys_;
      for (int64_t i = 0; i < rows.end - rows.begin; ++i, sum += keys_) {
        for (int64_t j = 0; j < keys_; j += kVecs * W) {
          Vec<C> total[kVecs];
          for (int k = 0; k < kVecs; ++k) total[k] = first ? Vec<C>::zero() : load(sum + j + k * W);
          if (j >= columns.begin && j < columns.end) {
            for (int64_t head = 0; head < seen; ++head) {
              Vec<C> x[kVecs];
              Kept::read(kept[head], i, j - columns.begin, x);
              for (int k = 0; k < kVecs; ++k) total[k] = fma(x[k], Vec<C>::set1(scale[head][i]), total[k]);
            }
          }
          for (int k = 0; k < kVecs; ++k) write(tile, i, j + k * W, total[k] * factor);
        }
      }
    }
  }

  const AttentionForwardArgs& args_;
  int64_t rows_, padded_rows_, keys_, tile_bytes_, tiles_, heads_;
  mutable bool regular_ = true;
};

}  // namespace fastattn::FASTATTN_ISA
