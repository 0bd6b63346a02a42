// The mean over the heads of the attention weights, from the probabilities of the forward itself: one product of
// queries and keys and one exponential a score serve both.
//
// A task takes a block of queries through all heads. It keeps the probabilities of a head, tile by tile, with what was
// subtracted from their scores, until the head's sums are known, and then adds them to the block's sums over the heads.
// That is memory for a block of queries and no more, and an order of sums that no thread changes.
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

template <typename C>
class MeanWeights {
 public:
  // The state of a block of queries.
  struct Block {
    C* sum;          // [tiles, rows, keys]: of the heads so far
    char* kept;      // [tiles, tile_bytes]: the probabilities of the head at hand
    C* shift;        // [tiles, rows]: what was subtracted from their scores, in powers of two
    Range* columns;  // [tiles]: which columns they are; none where no key was visible
  };

  // Of blocks of `rows` queries, whose probabilities take `tile_bytes` for each tile of `keys` keys.
  MeanWeights(const AttentionForwardArgs& args, int64_t rows, int64_t keys, int64_t tile_bytes)
      : args_(args), rows_(rows), padded_rows_(round_up(rows, Vec<C>::kWidth)), keys_(keys), tile_bytes_(tile_bytes) {
    tiles_ = wanted() ? ceil_div(args.problem.seq_len_k, keys) : 0;
  }

  bool wanted() const { return args_.weights.data != nullptr; }

  // Bytes of a block.
  int64_t bytes() const {
    const int64_t of_tile =
        tile_bytes_ + static_cast<int64_t>(sizeof(C)) * (rows_ * keys_ + padded_rows_) + sizeof(Range);
    return tiles_ * of_tile + 4 * 64;
  }
  Block carve(Carver* carver) const {
    Block block;
    block.sum = carver->take<C>(tiles_ * rows_ * keys_);
    block.kept = carver->take<char>(tiles_ * tile_bytes_);
    block.shift = carver->take<C>(tiles_ * padded_rows_);
    block.columns = carver->take<Range>(tiles_);
    return block;
  }

  void start(const Block& block) const {
    std::memset(block.sum, 0, static_cast<size_t>(tiles_ * rows_ * keys_) * sizeof(C));
  }
  void start_head(const Block& block) const {
    for (int64_t tile = 0; tile < tiles_; ++tile) block.columns[tile] = {0, 0};
  }

  // Where the probabilities of the tile that `column` is in are to be written.
  char* kept(const Block& block, int64_t column) const { return block.kept + column / keys_ * tile_bytes_; }
  // Notes which columns these are, and the rows' shifts at that time.
  void note(const Block& block, Range columns, const C* shift) const {
    const int64_t tile = columns.begin / keys_;
    block.columns[tile] = columns;
    std::memcpy(block.shift + tile * padded_rows_, shift, static_cast<size_t>(rows_) * sizeof(C));
  }

  // A row whose lse is NaN or +inf: attention_weights knows which of its weights are what.
  void note_lse(double lse) const {
    if (wanted() && !(lse < __builtin_inf())) __atomic_store_n(&regular_, false, __ATOMIC_RELAXED);
  }
  bool regular() const { return regular_; }

  // Adds the weights of a head: factor[i] * 2^(shift at the time - shift[i]) times the probabilities of each of its
  // `height` rows. add_row(sum, kept, i, width, factor) adds row i of a tile.
  template <typename AddRow>
  void add(const Block& block, int64_t height, const C* shift, const C* factor, const AddRow& add_row) const {
    constexpr int W = Vec<C>::kWidth;
    const Vec<C> nothing = Vec<C>::set1(-static_cast<C>(__builtin_inff()));
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const Range columns = block.columns[tile];
      if (columns.end <= columns.begin) continue;
      C* sum = block.sum + tile * rows_ * keys_ + (columns.begin - tile * keys_);
      const char* kept = block.kept + tile * tile_bytes_;
      for (int64_t first = 0; first < height; first += W) {
        const Vec<C> before = load(block.shift + tile * padded_rows_ + first);
        const Vec<C> scale = load(factor + first) * exp2(before - load(shift + first));
        C lanes[W];
        store(lanes, select(eq(before, nothing), Vec<C>::zero(), scale));  // -inf - -inf is NaN
        for (int64_t i = first; i < min(first + W, height); ++i, sum += keys_) {
          add_row(sum, kept, i, columns.end - columns.begin, Vec<C>::set1(lanes[i - first]));
        }
      }
    }
  }

  // Rounds the mean to the output.
  void write(const Block& block, int64_t batch, Range rows) const {
    const Vec<C> scale = Vec<C>::set1(static_cast<C>(1.0 / static_cast<double>(args_.problem.num_heads_q)));
    const int64_t seq_len_k = args_.problem.seq_len_k;
    visit(args_.weights.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          T* to = row_of<T>(args_.weights, batch, 0, i);
          const C* sum = block.sum + (i - rows.begin) * keys_;
          for (int64_t key = 0; key < seq_len_k; key += keys_, sum += rows_ * keys_) {
            for_each_vec<C>(min(keys_, seq_len_k - key),
                            [&](int64_t j, auto n) { store_n(to + key + j, load(sum + j) * scale, n); });
          }
        }
      }
    });
  }

 private:
  const AttentionForwardArgs& args_;
  int64_t rows_, padded_rows_, keys_, tile_bytes_, tiles_;
  mutable bool regular_ = true;
};

}  // namespace fastattn::FASTATTN_ISA
