// What the gradients of the scores add up to besides those of queries and keys: the gradient of a bias, summed along
// each dimension it is broadcast along, and of a relative bias, summed along diagonals.
//
// Each sum has one order, whatever the threads: within a tile, then over tiles, then over heads. A bias with a row for
// each query and a column for each key is added to in place, or written once, in its own dtype, where no heads share
// it; all other sums are kept a head apart, O(seq_len), in double beyond a tile, and reduced at the end. A bias that is
// the same for all keys needs no scores: see row_sum().
#pragma once

#include "attention_backward.h"
#include "mask.h"
#include "parallel.h"
#include "scratch.h"
#include "stream.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// How rows and keys are cut into blocks and tiles.
struct Grid {
  int64_t rows, keys;     // of one block, of one tile
  int64_t blocks, tiles;  // how many
};

template <typename C>
class BiasGradient {
 public:
  BiasGradient(const AttentionBackwardArgs& args, const Grid& grid)
      : p_(args.problem), bias_(args.dbias), relative_(args.drelative), grid_(grid) {
    heads_ = p_.batch * p_.num_heads_q;
    diagonals_ = p_.seq_len_q + p_.seq_len_k - 1;
    const bool rows = bias_.stride[2] != 0, columns = bias_.stride[3] != 0;
    if (bias_.data != nullptr) kind_ = rows && columns ? Kind::kDense : columns ? Kind::kColumns : Kind::kRows;
    slices_ = (bias_.stride[0] != 0 ? p_.batch : 1) * (bias_.stride[1] != 0 ? p_.num_heads_q : 1);
  }

  // To be called once, before any tile is added.
  void prepare() {
    const int64_t row = p_.seq_len_k, slice = p_.seq_len_q * row;
    const int64_t entry = (bias_.stride[1] != 0 ? p_.num_heads_q : 1) * slice;
    const bool contiguous = bias_.stride[3] == 1 && bias_.stride[2] == row &&
                            (bias_.stride[1] == 0 || bias_.stride[1] == slice) &&
                            (bias_.stride[0] == 0 || bias_.stride[0] == entry);
    if (kind_ != Kind::kDense || is_shared() || !contiguous) return;
    visit(bias_.dtype, [&](auto type) {
      const int64_t row_bytes = row * static_cast<int64_t>(sizeof(typename decltype(type)::Type));
      past_caches_ = prepare_stream(bias_.data, slices_ * p_.seq_len_q * row_bytes, row_bytes);
    });
  }

  bool wanted() const { return kind_ != Kind::kNone || relative_.data != nullptr; }
  bool wants_invisible_tiles() const { return kind_ == Kind::kDense; }  // to write zeros there

  // Memory of the whole call, and of one thread for a task of `group` heads.
  int64_t shared_bytes() const {
    return round_up(turns() * sizeof(int32_t), 64) + round_up(sums() * sizeof(double), 64) +
           round_up(diagonal_turns() * sizeof(int32_t), 64) + round_up(diagonal_sums() * sizeof(double), 64);
  }
  int64_t task_bytes(int64_t group) const {
    return round_up(group * column_room() * sizeof(double), 64) +
           round_up(group * diagonal_room() * sizeof(double), 64) + round_up(band_room() * sizeof(C), 64);
  }
  void carve_shared(Carver& carver) {
    turns_ = carver.take<int32_t>(turns());
    sums_ = carver.take<double>(sums());
    diagonal_turns_ = carver.take<int32_t>(diagonal_turns());
    diagonal_sums_ = carver.take<double>(diagonal_sums());
    for (int64_t i = 0; i < turns(); ++i) turns_[i] = 0;
    for (int64_t i = 0; i < sums(); ++i) sums_[i] = 0;
    for (int64_t i = 0; i < diagonal_turns(); ++i) diagonal_turns_[i] = 0;
    for (int64_t i = 0; i < diagonal_sums(); ++i) diagonal_sums_[i] = 0;
  }

  // One thread's sums over the tiles of one task: all the query blocks of `group` heads against one tile of keys.
  struct Task {
    double* columns;    // [group, grid.keys]
    double* diagonals;  // [group, seq_len_q - 1 + grid.keys]
    C* band;            // [grid.rows - 1 + grid.keys]: the diagonals of one tile
  };
  Task carve_task(Carver& carver, int64_t group) const {
    Task task;
    task.columns = carver.take<double>(group * column_room());
    task.diagonals = carver.take<double>(group * diagonal_room());
    task.band = carver.take<C>(band_room());
    return task;
  }
  void begin_task(const Task& task, int64_t group) const {
    for (int64_t i = 0; i < group * column_room(); ++i) task.columns[i] = 0;
    for (int64_t i = 0; i < group * diagonal_room(); ++i) task.diagonals[i] = 0;
  }

  // Adds ds[rows, columns] of one tile, rows grid.keys apart; `columns` is empty where the tile is invisible. Where
  // heads share a bias, each waits here for the head before it.
  void add_tile(const Task& task, int64_t in_group, int64_t batch, int64_t head, Range rows, int64_t tile,
                Range columns, const C* ds) const {
    if (kind_ == Kind::kDense) add_dense(batch, head, rows, tile, columns, ds);
    const int64_t offset = columns.begin - tile * grid_.keys;
    const int64_t width = columns.end - columns.begin, height = rows.end - rows.begin;
    if (kind_ == Kind::kColumns) {
      double* to = task.columns + in_group * grid_.keys + offset;
      for_each_vec<C>(width, [&](int64_t j, auto n) {
        Vec<C> sum = Vec<C>::zero();
        for (int64_t i = 0; i < height; ++i) sum = sum + load_n(ds + i * grid_.keys + j, n);
        C lanes[Vec<C>::kWidth];
        store(lanes, sum);
        for (int k = 0; k < n; ++k) to[j + k] += static_cast<double>(lanes[k]);
      });
    }
    if (relative_.data != nullptr) {
      const int64_t diagonals = height - 1 + width;
      for (int64_t d = 0; d < diagonals; ++d) task.band[d] = 0;
      for (int64_t i = 0; i < height; ++i) {
        C* to = task.band + height - 1 - i;
        const C* from = ds + i * grid_.keys;
        for_each_vec<C>(width, [&](int64_t j, auto n) { store_n(to + j, load_n(to + j, n) + load_n(from + j, n), n); });
      }
      double* to = task.diagonals + in_group * diagonal_room() + p_.seq_len_q - rows.end + offset;
      for (int64_t d = 0; d < diagonals; ++d) to[d] += static_cast<double>(task.band[d]);
    }
  }

  // Takes the sum of a row's gradients, for a bias that is the same for all its keys. They need not be added up: with
  // D = sum(dout * out), sum_j P_j (dP_j - D + dlse) = D - (1 - P_sink) (D - dlse).
  void row_sum(int64_t slice, int64_t row, double sink_weight, double d, double dlse) const {
    if (kind_ == Kind::kRows) sums_[slice * p_.seq_len_q + row] = sink_weight * d + (1.0 - sink_weight) * dlse;
  }

  // Hands a task's sums over to those of its heads.
  void end_task(const Task& task, int64_t group, int64_t batch, int64_t first_head, int64_t tile) const {
    stream_end();
    const int64_t begin = tile * grid_.keys, width = min(grid_.keys, p_.seq_len_k - begin);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t slice = batch * p_.num_heads_q + first_head + g;
      if (kind_ == Kind::kColumns) {
        for (int64_t j = 0; j < width; ++j) sums_[slice * p_.seq_len_k + begin + j] = task.columns[g * grid_.keys + j];
      }
      if (relative_.data != nullptr) {
        const double* from = task.diagonals + g * diagonal_room();
        double* to = diagonal_sums_ + slice * diagonals_ + begin;
        wait_for_turn(diagonal_turns_ + slice, tile);
        for (int64_t d = 0; d < p_.seq_len_q - 1 + width; ++d) to[d] += from[d];
        pass_turn(diagonal_turns_ + slice);
      }
    }
  }

  // Reduces what is kept a head apart.
  void finish() const {
    if (kind_ == Kind::kColumns) reduce(bias_, sums_, p_.seq_len_k, p_.seq_len_k, bias_.stride[3]);
    if (kind_ == Kind::kRows) {
      reduce(bias_, sums_, p_.seq_len_q, bias_.stride[2] != 0 ? p_.seq_len_q : 1, bias_.stride[2]);
    }
    if (relative_.data != nullptr) reduce(relative_, diagonal_sums_, diagonals_, diagonals_, relative_.stride[3]);
  }

 private:
  enum class Kind { kNone, kDense, kColumns, kRows };

  bool is_shared() const { return slices_ != heads_; }
  int64_t turns() const { return kind_ == Kind::kDense && is_shared() ? slices_ * grid_.blocks * grid_.tiles : 0; }
  int64_t sums() const {
    return kind_ == Kind::kColumns ? heads_ * p_.seq_len_k : kind_ == Kind::kRows ? heads_ * p_.seq_len_q : 0;
  }
  int64_t diagonal_turns() const { return relative_.data != nullptr ? heads_ : 0; }
  int64_t diagonal_sums() const { return relative_.data != nullptr ? heads_ * diagonals_ : 0; }
  int64_t column_room() const { return kind_ == Kind::kColumns ? grid_.keys : 0; }
  int64_t diagonal_room() const { return relative_.data != nullptr ? p_.seq_len_q - 1 + grid_.keys : 0; }
  int64_t band_room() const { return relative_.data != nullptr ? grid_.rows - 1 + grid_.keys : 0; }

  void add_dense(int64_t batch, int64_t head, Range rows, int64_t tile, Range columns, const C* ds) const {
    if (is_shared()) return add_shared(batch, head, rows, tile, columns, ds);
    visit(bias_.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) write_dense<T>(batch, head, rows, tile, columns, ds, true);
    });
  }

  // The first head of those that share a place writes it, the others add to it.
  void add_shared(int64_t batch, int64_t head, Range rows, int64_t tile, Range columns, const C* ds) const {
    const bool per_batch = bias_.stride[0] != 0, per_head = bias_.stride[1] != 0;
    const int64_t slice = (per_batch ? batch : 0) * (per_head ? p_.num_heads_q : 1) + (per_head ? head : 0);
    const int64_t rank = (per_batch ? 0 : batch) * (per_head ? 1 : p_.num_heads_q) + (per_head ? 0 : head);
    int32_t* turn = turns_ + (slice * grid_.blocks + rows.begin / grid_.rows) * grid_.tiles + tile;
    wait_for_turn(turn, rank);
    write_dense<C>(batch, head, rows, tile, columns, ds, rank == 0);
    pass_turn(turn);
  }

  // Writes a tile, or adds it to what is there; nothing has been written where it is fresh.
  template <typename T>
  void write_dense(int64_t batch, int64_t head, Range rows, int64_t tile, Range columns, const C* ds,
                   bool fresh) const {
    const Range whole{tile * grid_.keys, min(tile * grid_.keys + grid_.keys, p_.seq_len_k)};
    for (int64_t i = rows.begin; i < rows.end; ++i, ds += grid_.keys) {
      T* to = row_of<T>(bias_, batch, head, i);
      if (fresh) {
        for (int64_t j = whole.begin; j < columns.begin; ++j) to[j] = T{};
        for (int64_t j = columns.end; j < whole.end; ++j) to[j] = T{};
      }
      to += columns.begin;
      const int64_t width = columns.end - columns.begin;
      if (past_caches_) {
        for_each_vec<C>(width, [&](int64_t j, auto n) { put_n<true>(to + j, load_n(ds + j, n), n); });
      } else {
        for_each_vec<C>(width, [&](int64_t j, auto n) {
          const Vec<C> x = load_n(ds + j, n);
          store_n(to + j, fresh ? x : load_n(to + j, n) + x, n);
        });
      }
    }
  }

  // to[b, h, x] = sum of from[b, h, x] over the dimensions that `to` is broadcast along; `count` of x is `length` or 1.
  void reduce(const View& to, const double* from, int64_t length, int64_t count, int64_t stride) const {
    const int64_t batches = to.stride[0] != 0 ? p_.batch : 1, heads = to.stride[1] != 0 ? p_.num_heads_q : 1;
    for (int64_t b = 0; b < batches; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t x = 0; x < count; ++x) {
          double sum = 0;
          for (int64_t batch = b; batch < (batches == 1 ? p_.batch : b + 1); ++batch) {
            for (int64_t head = h; head < (heads == 1 ? p_.num_heads_q : h + 1); ++head) {
              const double* row = from + (batch * p_.num_heads_q + head) * length;
              for (int64_t i = x; i < (count == 1 ? length : x + 1); ++i) sum += row[i];
            }
          }
          visit(to.dtype, [&](auto type) {
            using T = typename decltype(type)::Type;
            if constexpr (sizeof(Compute<T>) == sizeof(C)) {
              store_n(row_of<T>(to, b, h, 0) + x * stride, Vec<C>::set1(static_cast<C>(sum)), 1);
            }
          });
        }
      }
    }
  }

  const AttentionProblem& p_;
  const View &bias_, &relative_;
  Grid grid_;
  Kind kind_ = Kind::kNone;
  int64_t heads_, diagonals_, slices_;
  bool past_caches_ = false;  // whether a dense gradient, which no heads share, is streamed
  int32_t *turns_ = nullptr, *diagonal_turns_ = nullptr;
  double *sums_ = nullptr, *diagonal_sums_ = nullptr;
};

}  // namespace fastattn::FASTATTN_ISA
