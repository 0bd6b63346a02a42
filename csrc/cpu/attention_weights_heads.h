// Attention weights, each head's or their mean, over any sort of tiles.
//
// A task is one tile of keys for one batch entry: it packs the keys once for each head and goes down all queries. With
// the mean over heads a tile's heads are added in scratch and written once.
#pragma once

#include "attention_weights.h"
#include "attention_weights_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

// Tiles: a WeightTiles<C>.
template <typename C, typename Tiles>
class Weights {
 public:
  explicit Weights(const AttentionWeightsArgs& args)
      : args_(args), p_(args.problem), weights_(p_, args.lse), tiles_(ceil_div(p_.seq_len_k, kKeys)) {
    // Without the mean, heads are tasks of their own.
    heads_a_task_ = args.mean ? p_.num_heads_kv : 1;
  }

  void run() const {
    const double work = static_cast<double>(p_.batch * p_.num_heads_q) * static_cast<double>(p_.seq_len_q) *
                        static_cast<double>(p_.seq_len_k) * static_cast<double>(p_.head_dim);
    parallel_for(p_.batch * (p_.num_heads_kv / heads_a_task_) * tiles_, work, [&](int64_t task) { run_tile(task); });
  }

 private:
  static constexpr int64_t kRows = Tiles::kRows, kKeys = Tiles::kKeys;

  void run_tile(int64_t task) const {
    const int64_t group = task / tiles_, begin = task % tiles_ * kKeys;
    const int64_t batch = group * heads_a_task_ / p_.num_heads_kv;
    const int64_t first_kv = group * heads_a_task_ % p_.num_heads_kv;
    const int64_t group_size = p_.num_heads_q / p_.num_heads_kv;
    const Range columns{begin, min(begin + kKeys, p_.seq_len_k)};
    const int64_t k_tile = weights_.keys_size();
    Carver carver(
        scratch(Scratch::kThread,
                static_cast<size_t>(heads_a_task_ * k_tile + weights_.queries_size() + 2 * kRows * kKeys) * sizeof(C) +
                    4 * 64));
    C* k = carver.take<C>(heads_a_task_ * k_tile);
    C* q = carver.take<C>(weights_.queries_size());
    C* s = carver.take<C>(kRows * kKeys);
    C* sum = carver.take<C>(kRows * kKeys);

    // What lies beyond a batch entry's last visible key is never read.
    const int64_t width = min(columns.end, Mask(p_, batch, 0).k_range(0, p_.seq_len_q).end) - columns.begin;
    for (int64_t kv = 0; kv < heads_a_task_ && width > 0; ++kv) {
      weights_.pack(k + kv * k_tile, batch, first_kv + kv, {columns.begin, columns.begin + width});
    }
    for (int64_t first = 0; first < p_.seq_len_q; first += kRows) {
      const Range rows{first, min(first + kRows, p_.seq_len_q)};
      for (int64_t index = 0; index < heads_a_task_ * group_size; ++index) {
        const int64_t head = first_kv * group_size + index;
        const bool visible = width > 0 && weights_.weigh(s, q, k + index / group_size * k_tile, batch, head, rows,
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
  const Tiles weights_;
  int64_t tiles_, heads_a_task_;
};

}  // namespace fastattn::FASTATTN_ISA
