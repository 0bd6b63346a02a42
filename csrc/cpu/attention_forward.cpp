// Attention forward: blocks of queries against tiles of keys with a running softmax (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023).
//
// Keys (transposed) and values of a key-value head are packed once, widened to the compute type, and shared by all
// query blocks of all query heads of the group. A block keeps its scores, its output and its row statistics in scratch
// that stays in the caches; memory is O(seq_len_k) for the packed keys and values of the heads being worked on.
#include "attention_forward.h"

#include "attention_decode.h"
#include "attention_mean.h"
#include "attention_rows.h"
#include "attention_schedule.h"
#include "attention_scores.h"
#include "mask.h"
#include "panel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxRows = 96;  // queries a block: a multiple of kTileRows
constexpr int64_t kKeys = 256;    // keys a tile: a multiple of 64 (a word of mask bits) and of every panel width
constexpr int64_t kKeptBytes = int64_t{1} << 20;  // of probabilities, for the mean weights

// Probabilities of a tile as the kernel leaves them: rows of kKeys.
template <typename C>
struct KeptRows {
  static constexpr int kVecs = 1;
  static void read(const char* tile, int64_t i, int64_t j, Vec<C> (&x)[1]) {
    x[0] = load(reinterpret_cast<const C*>(tile) + i * kKeys + j);
  }
};

template <typename C>
class Forward {
 public:
  explicit Forward(const AttentionForwardArgs& args)
      : args_(args),
        p_(args.problem),
        scores_(p_),
        rows_(block_rows(args)),
        mean_(args, rows_, kKeys, tile_bytes(), kKeptBytes) {
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    blocks_ = ceil_div(p_.seq_len_q, rows_);
    tiles_ = ceil_div(p_.seq_len_k, kKeys);
    out_stride_ = round_up(p_.head_dim_v, Vec<C>::kWidth);
    k_tile_ = panels_size<C>(p_.head_dim, kKeys);
    v_tile_ = panels_size<C>(kKeys, p_.head_dim_v);
  }

  void run() const {
    if (mean_.wanted()) return run_all_heads();
    const GroupWork work{p_.batch * p_.num_heads_kv, tiles_, packed_bytes(), group_size_ * blocks_, block_bytes()};
    for_each_block(
        p_, work,
        [&](char* memory, int64_t group, int64_t tile) { pack_tile(carve_packed(Carver(memory)), group, tile); },
        [&](char* packed, char* memory, int64_t group, int64_t task) {
          const int64_t head = group % p_.num_heads_kv * group_size_ + task % group_size_;
          run_block(carve_packed(Carver(packed)), carve_block(Carver(memory)), group / p_.num_heads_kv, head,
                    rows_of(task / group_size_));
        });
  }

 private:
  // A block goes through all heads, so that its mean weights are complete.
  void run_all_heads() const {
    const GroupWork work{p_.batch, p_.num_heads_kv * tiles_, p_.num_heads_kv * packed_bytes(), blocks_, block_bytes()};
    for_each_block(
        p_, work,
        [&](char* memory, int64_t batch, int64_t task) {
          const int64_t head = task / tiles_;
          pack_tile(carve_packed(Carver(memory + head * packed_bytes())), batch * p_.num_heads_kv + head,
                    task % tiles_);
        },
        [&](char* packed, char* memory, int64_t batch, int64_t task) {
          const Block block = carve_block(Carver(memory));
          const Range rows = rows_of(task);
          for (int64_t head = 0; head < p_.num_heads_q; ++head) {
            mean_.start_head(block.mean, head);
            run_block(carve_packed(Carver(packed + head / group_size_ * packed_bytes())), block, batch, head, rows);
            mean_.end_head(block.mean, batch, head, rows, block.max, block.factor);
          }
        });
    if (!mean_.regular()) attention_weights(mean_weights(args_));
  }

  // Blocks of equal size; what is kept of one for the mean weights stays in the second-level cache.
  static int64_t block_rows(const AttentionForwardArgs& args) {
    const AttentionProblem& p = args.problem;
    int64_t most = kMaxRows;
    if (args.weights.data != nullptr) {
      const int64_t row = 2 * static_cast<int64_t>(sizeof(C)) * round_up(p.seq_len_k, kKeys);
      most = max(kTileRows, min(kMaxRows, kKeptBytes / row / kTileRows * kTileRows));
    }
    return round_up(ceil_div(p.seq_len_q, ceil_div(p.seq_len_q, most)), kTileRows);
  }
  Range rows_of(int64_t block) const { return {block * rows_, min((block + 1) * rows_, p_.seq_len_q)}; }
  int64_t tile_bytes() const { return rows_ * kKeys * static_cast<int64_t>(sizeof(C)); }

  // The packed keys and values of one group.
  struct Packed {
    C* k;             // tile after tile of panels of the transposed keys
    C* v;             // tile after tile of panels of the values
    uint8_t* finite;  // [tiles]: no value of the tile is NaN or Inf
  };
  // The state of one block of queries.
  struct Block {
    C* q;       // [rows, head_dim]
    C* s;       // [rows, kKeys]: scores, then probabilities
    C* out;     // [rows, out_stride]
    C* max;     // [rows]: running maximum of the scores
    C* alpha;   // [rows]: what the last tile's new maximum scales the past by
    C* factor;  // [rows]: what the weighted values are multiplied by at the end
    C* sum;     // [rows, kWidth]: running sum of the probabilities, lane by lane
    typename MeanWeights<C, KeptRows<C>>::Block mean;
  };

  int64_t packed_bytes() const {
    return round_up(tiles_ * k_tile_ * sizeof(C), 64) + round_up(tiles_ * v_tile_ * sizeof(C), 64) +
           round_up(tiles_, 64);
  }
  int64_t block_bytes() const {
    return (rows_ * (p_.head_dim + kKeys + out_stride_ + 3 + Vec<C>::kWidth)) * sizeof(C) + 8 * 64 + mean_.bytes();
  }
  Packed carve_packed(Carver carver) const {
    Packed packed;
    packed.k = carver.take<C>(tiles_ * k_tile_);
    packed.v = carver.take<C>(tiles_ * v_tile_);
    packed.finite = carver.take<uint8_t>(tiles_);
    return packed;
  }
  Block carve_block(Carver carver) const {
    Block block;
    block.q = carver.take<C>(rows_ * p_.head_dim);
    block.s = carver.take<C>(rows_ * kKeys);
    block.out = carver.take<C>(rows_ * out_stride_);
    block.max = carver.take<C>(rows_);
    block.alpha = carver.take<C>(rows_);
    block.sum = carver.take<C>(rows_ * Vec<C>::kWidth);
    block.factor = carver.take<C>(rows_);
    block.mean = mean_.carve(&carver);
    return block;
  }

  // Packs what any query may see of a tile; what lies beyond (padding, another sequence) is never read.
  void pack_tile(const Packed& packed, int64_t group, int64_t tile) const {
    const int64_t batch = group / p_.num_heads_kv, head = group % p_.num_heads_kv;
    const Range seen = Mask(p_, batch, head * group_size_).k_range(0, p_.seq_len_q);
    const int64_t begin = tile * kKeys, count = min(kKeys, seen.end - begin);
    if (count <= 0 || begin + kKeys <= seen.begin) return;
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      pack_transposed(packed.k + tile * k_tile_, row_of<const T>(p_.k, batch, head, begin), p_.k.stride[2], p_.head_dim,
                      count);
      packed.finite[tile] = pack(packed.v + tile * v_tile_, row_of<const T>(p_.v, batch, head, begin), p_.v.stride[2],
                                 count, p_.head_dim_v, panel_size<C>(kKeys));
    });
  }

  void run_block(const Packed& packed, Block block, int64_t batch, int64_t head, Range rows) const {
    const int64_t height = rows.end - rows.begin;
    const Mask mask(p_, batch, head);
    const Range seen = mask.k_range(rows.begin, rows.end);

    scores_.load_queries(block.q, batch, head, rows);
    for (int64_t i = 0; i < height * out_stride_; i += Vec<C>::kWidth) store(block.out + i, Vec<C>::zero());
    for (int64_t i = 0; i < height; ++i) {
      block.max[i] = -infinity<C>();
      store(block.sum + i * Vec<C>::kWidth, Vec<C>::zero());
    }

    for (int64_t tile = seen.begin / kKeys; tile * kKeys < seen.end; ++tile) {
      // Whole words of mask bits, so the first columns of the first tile may be invisible.
      const int64_t first = max(tile * kKeys, seen.begin / 64 * 64);
      const Range columns{first, min(tile * kKeys + kKeys, seen.end)};
      const Coverage coverage = mask.coverage(rows, columns);
      if (coverage == Coverage::kNone) continue;
      const int64_t width = columns.end - columns.begin, offset = columns.begin - tile * kKeys;
      if (mean_.wanted()) block.s = reinterpret_cast<C*>(mean_.kept(block.mean, head, columns.begin));
      const C* k = packed.k + tile * k_tile_ + offset / kPanelWidth<C> * panel_size<C>(p_.head_dim);
      const C* v = packed.v + tile * v_tile_ + offset * kPanelWidth<C>;

      multiply(height, width, p_.head_dim, block.q, p_.head_dim, 1, k, panel_size<C>(p_.head_dim),
               [&](int64_t i, int64_t j, Vec<C> value) { store(block.s + i * kKeys + j, value); });
      // A ragged tile's last vector holds columns that do not exist: the mask hides them.
      const bool masked = coverage != Coverage::kAll || width % Vec<C>::kWidth != 0;
      scores_.finish(block.s, kKeys, batch, head, rows, columns, masked, mask);
      softmax_tile(block, height, width);
      if (mean_.wanted()) mean_.note(block.mean, head, columns, block.max);
      if (p_.dropout.threshold != 0) {  // the survivors are rescaled once, at the end
        for (int64_t i = 0; i < height; ++i) {
          drop_row(block.s + i * kKeys, width, p_.dropout, batch * p_.num_heads_q + head, rows.begin + i,
                   columns.begin);
        }
      }
      if (packed.finite[tile]) {
        multiply(height, p_.head_dim_v, width, block.s, kKeys, 1, v, panel_size<C>(kKeys),
                 [&](int64_t i, int64_t d, Vec<C> value) {
                   C* out = block.out + i * out_stride_ + d;
                   store(out, fma(load(out), Vec<C>::set1(block.alpha[i]), value));
                 });
      } else {
        multiply_visible(block, v, rows, columns, mask);
      }
    }
    write(block, batch, head, rows);
  }

  // Moves the running maximum and sum over a tile and turns its scores into probabilities relative to the new maximum.
  void softmax_tile(const Block& block, int64_t height, int64_t width) const {
    for (int64_t i = 0; i < height; ++i) {
      RowState<C> row{block.max[i], load(block.sum + i * Vec<C>::kWidth), {}};
      softmax_row(block.s + i * kKeys, width, &row);
      block.max[i] = row.max;
      store(block.sum + i * Vec<C>::kWidth, row.sum);
      store_n(block.alpha + i, row.alpha, 1);
    }
  }

  // out = out * alpha + P V where V holds NaN or Inf: 0 * NaN is NaN, so invisible values must not be touched at all.
  void multiply_visible(const Block& block, const C* v, Range rows, Range columns, const Mask& mask) const {
    constexpr int W = Vec<C>::kWidth;
    const int64_t width = columns.end - columns.begin;
    for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
      C* out = block.out + i * out_stride_;
      for (int64_t d = 0; d < out_stride_; d += W) store(out + d, load(out + d) * Vec<C>::set1(block.alpha[i]));
      for (int64_t j = 0; j < width; ++j) {
        if (!mask.visible(rows.begin + i, columns.begin + j)) continue;
        const Vec<C> weight = Vec<C>::set1(block.s[i * kKeys + j]);
        for (int64_t d = 0; d < out_stride_; d += W) {
          const C* value = v + d / kPanelWidth<C> * panel_size<C>(kKeys) + j * kPanelWidth<C> + d % kPanelWidth<C>;
          store(out + d, fma(weight, load(value), load(out + d)));
        }
      }
    }
  }

  // Divides by the sum and rounds once, to the output's dtype.
  void write(const Block& block, int64_t batch, int64_t head, Range rows) const {
    double* lse = args_.lse + (batch * p_.num_heads_q + head) * p_.seq_len_q;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t at = i - rows.begin;
      const C sum = reduce_add(load(block.sum + at * Vec<C>::kWidth));
      block.factor[at] = end_row(p_, head, sum, block.max[at], &lse[i]);
      mean_.note_lse(lse[i]);
      write_row(args_.out, batch, head, i, p_.head_dim_v, block.out + at * out_stride_, block.factor[at]);
    }
  }

  const AttentionForwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<C> scores_;
  const int64_t rows_;  // queries a block
  const MeanWeights<C, KeptRows<C>> mean_;
  int64_t group_size_, blocks_, tiles_, out_stride_, k_tile_, v_tile_;
};

}  // namespace

void attention_forward(const AttentionForwardArgs& args) {
  // Packing a key costs about as much as 16 rows' use of it.
  const int64_t rows = args.problem.num_heads_q / args.problem.num_heads_kv * args.problem.seq_len_q;
  if (rows <= kDecodeRows) {
    attention_decode(args);
    if (args.weights.data != nullptr) attention_weights(mean_weights(args));
    return;
  }
  if (args.problem.q.dtype == DType::kFloat64) {
    Forward<double>(args).run();
  } else {
    Forward<float>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
