// The course of attention backward, whatever multiplies (Dao, "FlashAttention-2", 2023, algorithm 2).
//
//   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta);  dV += P^T dO, dK += dS^T Q, dQ += dS K
//
// A task is one tile of keys of one key-value head against all query blocks of all query heads of its group. It packs
// its keys and values once and keeps dK and dV to itself; into dQ the tasks of a head add in turn, in the order of
// their keys. So every sum has one order whatever the threads, nothing is computed twice, and a head may occupy as many
// threads as it has tiles. Memory is O(seq_len): dQ in the compute type, five numbers a query, what the products want
// packed of a head, and each thread's tile.
#pragma once

#include "attention_backward.h"
#include "attention_bias_gradient.h"
#include "attention_scores.h"
#include "mask.h"
#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// One block of queries of one head against the tile of keys of a task.
struct BackwardTile {
  int64_t batch, head, index;
  Range rows, columns;
  bool masked;
  int64_t height() const { return rows.end - rows.begin; }
  int64_t width() const { return columns.end - columns.begin; }
};

// What the tasks of one query head share.
template <typename C>
struct BackwardHead {
  C* dq;          // [blocks * grid.rows, dq_stride], before the scale
  C* shift;       // [seq_len_q]: what makes a score a probability: see RowScale
  C* factor;      // [seq_len_q]
  C* log2_lse;    // [seq_len_q]
  C* delta;       // [seq_len_q]: sum(dout * out) - dlse
  C* dlse;        // [seq_len_q]
  int32_t* turn;  // [blocks]: which tile's turn it is to add to dq
  char* packed;   // what the products want of its queries and dout
};

template <typename C>
inline void clear(C* to, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec<C>::kWidth) store(to + i, Vec<C>::zero());
}

// Rounds factor * from, a finished gradient, once, to its dtype.
template <typename C>
inline void write_rows(const View& view, int64_t batch, int64_t head, Range rows, const C* from, int64_t stride,
                       int64_t columns, double factor) {
  const Vec<C> scale = Vec<C>::set1(static_cast<C>(factor));
  visit(view.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(Compute<T>) == sizeof(C)) {
      for (int64_t i = rows.begin; i < rows.end; ++i, from += stride) {
        T* to = row_of<T>(view, batch, head, i);
        for_each_vec<C>(columns, [&](int64_t d, auto n) { store_n(to + d, load(from + d) * scale, n); });
      }
    }
  });
}

// Tiles does the arithmetic of a tile, in what memory a thread or a head gives it:
//   C, Task              the compute type, a thread's working memory
//   grid()               how queries and keys are cut; tiles are whole words of mask bits
//   dq_stride()          from a row of dq to the next, in elements
//   head_bytes()         for BackwardHead::packed, and
//   pack_queries(...)    fills it, for one block of queries
//   task_bytes(), carve_task(...)
//   begin(...)           packs the keys and values of a tile; dK and dV become 0
//   differentiate(...)   computes P and dS of a block and adds its share of dK and dV
//   ds(task)             dS of that block [rows, grid().keys], from the tile's first visible column on
//   add_dq(...)          adds dS K, to what is still to be written where it is fresh
//   end(...)             writes dK and dV
template <typename Tiles>
class Backward {
 public:
  using C = typename Tiles::C;

  explicit Backward(const AttentionBackwardArgs& args)
      : args_(args), p_(args.problem), tiles_(args), grid_(tiles_.grid()), bias_(args, grid_) {
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    dq_stride_ = tiles_.dq_stride();
  }

  void run() {
    const int64_t groups = p_.batch * p_.num_heads_kv, sink_bytes = sink_sums() * sizeof(double);
    const double work = static_cast<double>(p_.batch * p_.num_heads_q) * static_cast<double>(p_.seq_len_q) *
                        static_cast<double>(p_.seq_len_k) * static_cast<double>(p_.head_dim + p_.head_dim_v);
    // As many groups at once as fit: threads on different heads never wait for each other.
    const int64_t room = min(kSharedBytes, max_threads() * kBytesAThread);
    const int64_t together = max(1, min(groups, room / (group_size_ * head_bytes())));
    Carver carver(scratch(Scratch::kShared,
                          bias_.shared_bytes() + round_up(sink_bytes, 64) + together * group_size_ * head_bytes()));
    bias_.carve_shared(carver);
    sink_sums_ = carver.take<double>(sink_sums());
    heads_ = carver.take<char>(together * group_size_ * head_bytes());
    bias_.prepare();

    for (int64_t first = 0; first < groups; first += together) {
      const int64_t count = min(together, groups - first);
      parallel_for(count * group_size_ * grid_.blocks, work, [&](int64_t task) {
        prepare(first * group_size_ + task / grid_.blocks, task / grid_.blocks, task % grid_.blocks);
      });
      // Where the mask is causal the first keys are seen by most queries: they go first.
      parallel_in_order(
          count * grid_.tiles, work, [&] { return carve_task(scratch(Scratch::kThread, task_bytes())); },
          [&](const Task& task, int64_t index) {
            run_task(task, first + index % count, index % count, index / count);
          });
    }
    bias_.finish();
    if (args_.dsinks != nullptr) finish_sinks();
  }
  const Tiles& tiles() const { return tiles_; }

 private:
  static constexpr int64_t kSharedBytes = int64_t{64} << 20, kBytesAThread = int64_t{8} << 20;

  using Head = BackwardHead<C>;
  using Tile = BackwardTile;
  // What one thread needs for a task.
  struct Task {
    typename Tiles::Task tiles;
    typename BiasGradient<C>::Task bias;
  };

  int64_t sink_sums() const { return args_.dsinks != nullptr ? p_.batch * p_.num_heads_q * grid_.blocks : 0; }
  int64_t head_bytes() const {
    return round_up(grid_.blocks * grid_.rows * dq_stride_ * sizeof(C), 64) +
           5 * round_up(p_.seq_len_q * sizeof(C), 64) + round_up(grid_.blocks * sizeof(int32_t), 64) +
           round_up(tiles_.head_bytes(), 64);
  }
  Head carve_head(int64_t slot) const {
    Carver carver(heads_ + slot * head_bytes());
    Head head;
    head.dq = carver.take<C>(grid_.blocks * grid_.rows * dq_stride_);
    head.shift = carver.take<C>(p_.seq_len_q);
    head.factor = carver.take<C>(p_.seq_len_q);
    head.log2_lse = carver.take<C>(p_.seq_len_q);
    head.delta = carver.take<C>(p_.seq_len_q);
    head.dlse = carver.take<C>(p_.seq_len_q);
    head.turn = carver.take<int32_t>(grid_.blocks);
    head.packed = carver.take<char>(tiles_.head_bytes());
    return head;
  }
  int64_t task_bytes() const { return tiles_.task_bytes() + bias_.task_bytes(group_size_); }
  Task carve_task(void* memory) const {
    Carver carver(memory);
    Task task;
    task.tiles = tiles_.carve_task(carver);
    task.bias = bias_.carve_task(carver, group_size_);
    return task;
  }

  Range rows_of(int64_t block) const {
    return {block * grid_.rows, min(block * grid_.rows + grid_.rows, p_.seq_len_q)};
  }
  // The tiles that a block may see: a task outside of them does not take its turn.
  Range tiles_of(Range keys) const {
    return keys.begin < keys.end ? Range{keys.begin / grid_.keys, ceil_div(keys.end, grid_.keys)} : Range{0, 0};
  }

  // Fills what the tasks of a head share of one block of queries.
  void prepare(int64_t slice, int64_t slot, int64_t block) const {
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q;
    const Head shared = carve_head(slot);
    const Range rows = rows_of(block);
    const double* lse = args_.lse + slice * p_.seq_len_q;
    shared.turn[block] = 0;
    double sink = 0, sink_sum = 0;
    if (p_.sinks.data != nullptr) sink = read_sink(head);
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* out = row_of<const T>(args_.out, batch, head, i);
        const T* dout = row_of<const T>(args_.dout, batch, head, i);
        Vec<C> sum = Vec<C>::zero();
        for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
          sum = fma(load_as_n<C>(out + d, n), load_as_n<C>(dout + d, n), sum);
        });
        const RowScale<C> scale(lse[i]);
        shared.shift[i] = scale.shift;
        shared.factor[i] = scale.factor;
        shared.log2_lse[i] = scale.log2_lse;
        const bool empty = lse[i] == -__builtin_inf();
        const double dlse = args_.dlse != nullptr ? args_.dlse[slice * p_.seq_len_q + i] : 0.0;
        const double dot = static_cast<double>(reduce_add(sum)), delta = empty ? 0.0 : dot - dlse;
        shared.delta[i] = static_cast<C>(delta);
        shared.dlse[i] = static_cast<C>(empty ? 0.0 : dlse);
        const double sink_weight = p_.sinks.data == nullptr || empty ? 0.0 : __builtin_exp(sink - lse[i]);
        sink_sum -= sink_weight * delta;
        bias_.row_sum(slice, i, sink_weight, empty ? 0.0 : dot, empty ? 0.0 : dlse);
      }
    });
    if (args_.dsinks != nullptr) sink_sums_[slice * grid_.blocks + block] = sink_sum;
    const Range tiles = tiles_of(Mask(p_, batch, head).k_range(rows.begin, rows.end));
    if (tiles.begin < tiles.end) {
      tiles_.pack_queries(shared, batch, head, rows);
    } else if (args_.dq.data != nullptr) {
      clear(shared.dq + rows.begin * dq_stride_, (rows.end - rows.begin) * dq_stride_);
      write_rows(args_.dq, batch, head, rows, shared.dq + rows.begin * dq_stride_, dq_stride_, p_.head_dim, 1);
    }
  }

  void run_task(Task task, int64_t group, int64_t slot, int64_t index) const {
    const int64_t batch = group / p_.num_heads_kv, head_kv = group % p_.num_heads_kv;
    const int64_t first_head = head_kv * group_size_, begin = index * grid_.keys;
    const Range whole{begin, min(begin + grid_.keys, p_.seq_len_k)};
    // What lies beyond what any query may see (padding, another sequence) is never read.
    const Range seen = Mask(p_, batch, first_head).k_range(0, p_.seq_len_q);
    const int64_t count = whole.end <= seen.begin ? 0 : max(0, min(whole.end, seen.end) - begin);
    tiles_.begin(task.tiles, batch, head_kv, {begin, begin + count});
    bias_.begin_task(task.bias, group_size_);
    // Late queries first: there the tasks of a causal head all have work, and follow each other without waiting.
    for (int64_t block = grid_.blocks - 1; block >= 0; --block) {
      for (int64_t g = 0; g < group_size_; ++g) {
        run_tile(task, carve_head(slot * group_size_ + g), batch, first_head, g, index, block);
      }
    }
    bias_.end_task(task.bias, group_size_, batch, first_head, index);
    tiles_.end(task.tiles, batch, head_kv, whole);
  }

  void run_tile(const Task& task, const Head& shared, int64_t batch, int64_t first_head, int64_t in_group,
                int64_t index, int64_t block) const {
    const int64_t head = first_head + in_group, begin = index * grid_.keys;
    const Mask mask(p_, batch, head);
    Tile tile{batch, head, index, rows_of(block), {begin, begin}, false};
    const Range seen = mask.k_range(tile.rows.begin, tile.rows.end);
    const Range tiles = tiles_of(seen);
    const bool in_turn = tiles.begin <= index && index < tiles.end;
    if (in_turn) {
      // Whole words of mask bits, so the first columns of the first tile may be invisible.
      const Range columns{max(begin, seen.begin / 64 * 64), min(begin + grid_.keys, seen.end)};
      const Coverage coverage = mask.coverage(tile.rows, columns);
      if (coverage != Coverage::kNone) {
        tile.columns = columns;
        tile.masked = coverage != Coverage::kAll;
        tiles_.differentiate(task.tiles, shared, tile, mask);
      }
    }
    const bool visible = tile.width() > 0;
    const C* ds = tiles_.ds(task.tiles);
    if (bias_.wanted() && (visible || bias_.wants_invisible_tiles())) {
      bias_.add_tile(task.bias, in_group, batch, head, tile.rows, index, tile.columns, ds);
    }
    if (in_turn) {
      // The products before this one need no order: threads meet here alone.
      wait_for_turn(shared.turn + block, index - tiles.begin);
      if (args_.dq.data != nullptr) {
        C* dq = shared.dq + tile.rows.begin * dq_stride_;
        const bool fresh = index == tiles.begin;
        if (visible) {
          tiles_.add_dq(task.tiles, tile, mask, dq, fresh);
        } else if (fresh) {
          clear(dq, grid_.rows * dq_stride_);
        }
        if (index == tiles.end - 1) {
          write_rows(args_.dq, batch, head, tile.rows, dq, dq_stride_, p_.head_dim, p_.softmax_scale);
        }
      }
      pass_turn(shared.turn + block);
    }
  }

  double read_sink(int64_t head) const {
    double sink = 0;
    visit(p_.sinks.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      sink = to_double(*row_of<const T>(p_.sinks, 0, head, 0));
    });
    return sink;
  }

  void finish_sinks() const {
    for (int64_t head = 0; head < p_.num_heads_q; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < p_.batch; ++batch) {
        const double* sums = sink_sums_ + (batch * p_.num_heads_q + head) * grid_.blocks;
        for (int64_t block = 0; block < grid_.blocks; ++block) sum += sums[block];
      }
      static_cast<C*>(args_.dsinks)[head] = static_cast<C>(sum);
    }
  }

  const AttentionBackwardArgs& args_;
  const AttentionProblem& p_;
  const Tiles tiles_;
  const Grid grid_;
  BiasGradient<C> bias_;
  int64_t group_size_, dq_stride_;
  char* heads_ = nullptr;
  double* sink_sums_ = nullptr;
};

// Whether anything of the scores' gradients is wanted.
inline bool wants_ds(const AttentionBackwardArgs& args) {
  return args.dq.data != nullptr || args.dk.data != nullptr || args.dbias.data != nullptr ||
         args.drelative.data != nullptr;
}

}  // namespace fastattn::FASTATTN_ISA
