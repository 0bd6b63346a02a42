// Attention weights from a finished softmax's lse: every tile of scores stands for itself, so no row is passed over
// twice (Dao, "FlashAttention-2", 2023, section 3.2).
//
// A task is one tile of keys for one batch entry: it packs the keys once for each head and goes down all queries. With
// the mean over heads a tile's heads are added in scratch and written once.
#include "attention_weights.h"

#include "attention_scores.h"
#include "mask.h"
#include "panel.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRows = 96;   // queries a block: a multiple of kTileRows
constexpr int64_t kKeys = 256;  // keys a tile: a multiple of 64 (a word of mask bits) and of every panel width

template <typename C>
class Weights {
 public:
  explicit Weights(const AttentionWeightsArgs& args)
      : args_(args), p_(args.problem), scores_(p_, ScoreUnit::kNatural), tiles_(ceil_div(p_.seq_len_k, kKeys)) {
    // Without the mean, heads are tasks of their own.
    heads_a_task_ = args.mean ? p_.num_heads_kv : 1;
  }

  void run() const {
    const double work = static_cast<double>(p_.batch * p_.num_heads_q) * static_cast<double>(p_.seq_len_q) *
                        static_cast<double>(p_.seq_len_k) * static_cast<double>(p_.head_dim);
    parallel_for(p_.batch * (p_.num_heads_kv / heads_a_task_) * tiles_, work, [&](int64_t task) { run_tile(task); });
  }

 private:
  void run_tile(int64_t task) const {
    const int64_t group = task / tiles_, begin = task % tiles_ * kKeys;
    const int64_t batch = group * heads_a_task_ / p_.num_heads_kv;
    const int64_t first_kv = group * heads_a_task_ % p_.num_heads_kv;
    const int64_t group_size = p_.num_heads_q / p_.num_heads_kv;
    const Range columns{begin, min(begin + kKeys, p_.seq_len_k)};
    const int64_t k_tile = panels_size<C>(p_.head_dim, kKeys);
    Carver carver(scratch(
        Scratch::kThread,
        static_cast<size_t>(heads_a_task_ * k_tile + kRows * p_.head_dim + 2 * kRows * kKeys) * sizeof(C) + 4 * 64));
    C* k = carver.take<C>(heads_a_task_ * k_tile);
    C* q = carver.take<C>(kRows * p_.head_dim);
    C* s = carver.take<C>(kRows * kKeys);
    C* sum = carver.take<C>(kRows * kKeys);

    // What lies beyond a batch entry's last visible key is never read.
    const int64_t width = min(columns.end, Mask(p_, batch, 0).k_range(0, p_.seq_len_q).end) - columns.begin;
    for (int64_t kv = 0; kv < heads_a_task_ && width > 0; ++kv) {
      visit(p_.k.dtype, [&](auto type) {
        using T = typename decltype(type)::Type;
        pack_transposed(k + kv * k_tile, row_of<const T>(p_.k, batch, first_kv + kv, begin), p_.k.stride[2],
                        p_.head_dim, width);
      });
    }
    for (int64_t first = 0; first < p_.seq_len_q; first += kRows) {
      const Range rows{first, min(first + kRows, p_.seq_len_q)};
      for (int64_t index = 0; index < heads_a_task_ * group_size; ++index) {
        const int64_t head = first_kv * group_size + index;
        const bool visible = width > 0 && weigh(s, q, k + index / group_size * k_tile, batch, head, rows,
                                                {columns.begin, columns.begin + width});
        if (!args_.mean) {
          write(s, visible ? width : 0, batch, head, rows, columns, 1.0);
        } else {
          accumulate(sum, s, index == 0, visible ? width : 0, rows.end - rows.begin);
        }
      }
      if (args_.mean) {
        write(sum, columns.end - columns.begin, batch, 0, rows, columns, 1.0 / static_cast<double>(p_.num_heads_q));
      }
    }
  }

  // Writes the weights of a tile to s [rows, kKeys]; returns false, and writes nothing, where no key is visible.
  bool weigh(C* s, C* q, const C* k, int64_t batch, int64_t head, Range rows, Range columns) const {
    constexpr int W = Vec<C>::kWidth;
    const Mask mask(p_, batch, head);
    const Coverage coverage = mask.coverage(rows, columns);
    if (coverage == Coverage::kNone) return false;
    const int64_t width = columns.end - columns.begin;
    scores_.load_queries(q, batch, head, rows);
    multiply(rows.end - rows.begin, width, p_.head_dim, q, p_.head_dim, 1, k, panel_size<C>(p_.head_dim),
             [&](int64_t i, int64_t j, Vec<C> value) { store(s + i * kKeys + j, value); });
    scores_.finish(s, kKeys, batch, head, rows, columns, coverage != Coverage::kAll || width % W != 0, mask);

    const Vec<C> log2_e = Vec<C>::set1(static_cast<C>(kLog2E));
    for (int64_t i = rows.begin; i < rows.end; ++i, s += kKeys) {
      const C lse = *(row_of<const C>(args_.lse, batch, head, i));
      // -inf minus -inf is NaN, so an empty row subtracts 0 instead.
      const Vec<C> shift = Vec<C>::set1(lse == -static_cast<C>(__builtin_inff()) ? C(0) : lse);
      for (int64_t j = 0; j < width; j += W) store(s + j, exp2((load(s + j) - shift) * log2_e));
      if (p_.dropout.threshold != 0) drop(s, width, batch * p_.num_heads_q + head, i, columns.begin);
    }
    return true;
  }

  void drop(C* s, int64_t width, int64_t slice, int64_t row, int64_t column) const {
    const Vec<C> rescale = Vec<C>::set1(static_cast<C>(p_.dropout.rescale));
    for (int64_t j = 0; j < width; j += 64) {
      const uint64_t keep = dropout_keep_bits(p_.dropout, static_cast<uint64_t>(slice), static_cast<uint64_t>(row),
                                              static_cast<uint64_t>(column + j));
      for (int64_t k = 0; k < 64 && j + k < width; k += Vec<C>::kWidth) {
        const Vec<C> kept = load(s + j + k) * rescale;
        store(s + j + k, select(mask_from_bits<C>(keep >> k), kept, Vec<C>::zero()));
      }
    }
  }

  // sum (+)= s, whose columns from `width` on are 0.
  void accumulate(C* sum, const C* s, bool first, int64_t width, int64_t height) const {
    for (int64_t i = 0; i < height; ++i, sum += kKeys, s += kKeys) {
      for (int64_t j = 0; j < kKeys; j += Vec<C>::kWidth) {
        const Vec<C> x = j < width ? load(s + j) : Vec<C>::zero();
        store(sum + j, first ? x : load(sum + j) + x);
      }
    }
  }

  // Rounds factor * s to the output; columns from `width` on are 0.
  void write(const C* s, int64_t width, int64_t batch, int64_t head, Range rows, Range columns, double factor) const {
    const Vec<C> scale = Vec<C>::set1(static_cast<C>(factor));
    visit(args_.out.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        for (int64_t i = rows.begin; i < rows.end; ++i, s += kKeys) {
          T* to = row_of<T>(args_.out, batch, head, i) + columns.begin;
          for_each_vec<C>(columns.end - columns.begin, [&](int64_t j, auto n) {
            store_n(to + j, j < width ? load(s + j) * scale : Vec<C>::zero(), n);
          });
        }
      }
    });
  }

  const AttentionWeightsArgs& args_;
  const AttentionProblem& p_;
  const Scores<C> scores_;
  int64_t tiles_, heads_a_task_;
};

}  // namespace

void attention_weights(const AttentionWeightsArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Weights<double>(args).run();
  } else {
    Weights<float>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
