// Attention backward: five products a tile (Dao, "FlashAttention-2", 2023, algorithm 2).
//
//   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta);  dV += P^T dO, dK += dS^T Q, dQ += dS K
//
// A task is one tile of keys of one key-value head against all query blocks of all query heads of its group. It packs
// its keys and values once and keeps dK and dV to itself; into dQ the tasks of a head add in turn, in the order of
// their keys. So every sum has one order whatever the threads, nothing is computed twice, and a head may occupy as many
// threads as it has tiles. Memory is O(seq_len): dQ in the compute type, two numbers a query, and each thread's tile.
#include "attention_backward.h"

#include "attention_bias_gradient.h"
#include "attention_scores.h"
#include "mask.h"
#include "panel.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxRows = 96;  // queries a block: a multiple of kTileRows
constexpr int64_t kKeys = 192;  // keys a tile: a multiple of 64 (a word of mask bits), kTileRows and every panel width
constexpr int64_t kDepth = 96;  // keys a step of dQ: that many rows of a panel of keys stay in the first-level cache

template <typename C>
class Backward {
 public:
  explicit Backward(const AttentionBackwardArgs& args)
      : args_(args), p_(args.problem), scores_(p_), grid_(make_grid(p_)), bias_(args, grid_) {
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    q_stride_ = round_up(p_.head_dim, Vec<C>::kWidth);
    v_stride_ = round_up(p_.head_dim_v, Vec<C>::kWidth);
    wants_ds_ = args.dq.data != nullptr || args.dk.data != nullptr || bias_.wanted();
  }

  void run() {
    const int64_t groups = p_.batch * p_.num_heads_kv, sink_bytes = sink_sums() * sizeof(double);
    const double work = static_cast<double>(p_.batch * p_.num_heads_q) * static_cast<double>(p_.seq_len_q) *
                        static_cast<double>(p_.seq_len_k) * static_cast<double>(p_.head_dim + p_.head_dim_v);
    // As many groups at once as fit: threads on different heads never wait for each other.
    const int64_t together = max(1, min(groups, kSharedBytes / (group_size_ * head_bytes())));
    Carver carver(scratch(Scratch::kShared,
                          bias_.shared_bytes() + round_up(sink_bytes, 64) + together * group_size_ * head_bytes()));
    bias_.carve_shared(carver);
    sink_sums_ = carver.take<double>(sink_sums());
    heads_ = carver.take<char>(together * group_size_ * head_bytes());

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

 private:
  static constexpr int64_t kSharedBytes = int64_t{64} << 20;

  // What the tasks of one query head share.
  struct Head {
    C* dq;     // [seq_len_q, q_stride], before the scale
    C* shift;  // [seq_len_q]: lse in units of the held scores, inf for an empty row, whose probabilities are then 0
    C* delta;  // [seq_len_q]: sum(dout * out) - dlse
    int32_t* turn;  // [blocks]: which tile's turn it is to add to dq
  };
  // What one thread needs for a task.
  struct Task {
    C *k_t, *v_t;  // panels of the transposed keys and values
    C* k;          // panels of the keys
    C *dk, *dv;    // [kKeys, q_stride], [kKeys, v_stride], before the scale
    C *q, *dout;   // rows of one block of queries, the queries times their factor
    C *q_panels, *dout_panels;
    C *p, *ds;  // [rows, kKeys]: scores, then probabilities; gradients of the probabilities, then of the scores
    C* dx;      // [rows, kKeys]: gradients of the scores before the softcap; ds itself where there is none
    typename BiasGradient<C>::Task bias;
    bool k_finite;
  };
  // One block of queries of one head against the tile of keys of a task.
  struct Tile {
    int64_t batch, head, index;
    Range rows, columns;
    bool masked, finite;  // finite: neither the queries nor dout hold NaN or Inf
    int64_t height() const { return rows.end - rows.begin; }
    int64_t width() const { return columns.end - columns.begin; }
    int64_t offset() const { return columns.begin - index * kKeys; }
  };

  static Grid make_grid(const AttentionProblem& p) {
    Grid grid;
    const int64_t blocks = ceil_div(p.seq_len_q, kMaxRows);
    grid.rows = round_up(ceil_div(p.seq_len_q, blocks), kTileRows);  // blocks of equal size
    grid.blocks = ceil_div(p.seq_len_q, grid.rows);
    grid.keys = kKeys;
    grid.tiles = ceil_div(p.seq_len_k, kKeys);
    return grid;
  }

  int64_t sink_sums() const { return args_.dsinks != nullptr ? p_.batch * p_.num_heads_q * grid_.blocks : 0; }
  int64_t head_bytes() const {
    return round_up(p_.seq_len_q * q_stride_ * sizeof(C), 64) + 2 * round_up(p_.seq_len_q * sizeof(C), 64) +
           round_up(grid_.blocks * sizeof(int32_t), 64);
  }
  Head carve_head(int64_t slot) const {
    Carver carver(heads_ + slot * head_bytes());
    Head head;
    head.dq = carver.take<C>(p_.seq_len_q * q_stride_);
    head.shift = carver.take<C>(p_.seq_len_q);
    head.delta = carver.take<C>(p_.seq_len_q);
    head.turn = carver.take<int32_t>(grid_.blocks);
    return head;
  }
  int64_t task_bytes() const {
    const int64_t d = p_.head_dim, dv = p_.head_dim_v, rows = grid_.rows;
    const int64_t elements = 2 * panels_size<C>(d, kKeys) + panels_size<C>(dv, kKeys) + panels_size<C>(kKeys, d) +
                             kKeys * (q_stride_ + v_stride_) + rows * (q_stride_ + v_stride_) +
                             panels_size<C>(rows, d) + panels_size<C>(rows, dv) + 3 * rows * kKeys;
    return elements * sizeof(C) + bias_.task_bytes(group_size_) + 16 * 64;
  }
  Task carve_task(void* memory) const {
    Carver carver(memory);
    Task task;
    task.k_t = carver.take<C>(panels_size<C>(p_.head_dim, kKeys));
    task.v_t = carver.take<C>(panels_size<C>(p_.head_dim_v, kKeys));
    task.k = carver.take<C>(panels_size<C>(kKeys, p_.head_dim));
    task.dk = carver.take<C>(kKeys * q_stride_);
    task.dv = carver.take<C>(kKeys * v_stride_);
    task.q = carver.take<C>(grid_.rows * p_.head_dim);
    task.dout = carver.take<C>(grid_.rows * v_stride_);
    task.q_panels = carver.take<C>(panels_size<C>(grid_.rows, p_.head_dim));
    task.dout_panels = carver.take<C>(panels_size<C>(grid_.rows, p_.head_dim_v));
    task.p = carver.take<C>(grid_.rows * kKeys);
    task.ds = carver.take<C>(grid_.rows * kKeys);
    task.dx = p_.softcap != 0 ? carver.take<C>(grid_.rows * kKeys) : task.ds;
    task.bias = bias_.carve_task(carver, group_size_);
    return task;
  }

  Range rows_of(int64_t block) const {
    return {block * grid_.rows, min(block * grid_.rows + grid_.rows, p_.seq_len_q)};
  }
  // The tiles that a block may see: a task outside of them does not take its turn.
  static Range tiles_of(Range keys) {
    return keys.begin < keys.end ? Range{keys.begin / kKeys, ceil_div(keys.end, kKeys)} : Range{0, 0};
  }

  // Fills what the tasks of a head share of one block of queries.
  void prepare(int64_t slice, int64_t slot, int64_t block) const {
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q;
    const Head shared = carve_head(slot);
    const Range rows = rows_of(block);
    const C* lse = static_cast<const C*>(args_.lse) + slice * p_.seq_len_q;
    const C* dlse = static_cast<const C*>(args_.dlse) + slice * p_.seq_len_q;
    shared.turn[block] = 0;
    double sink = 0, sink_sum = 0;
    if (args_.dsinks != nullptr) sink = read_sink(head);
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* out = row_of<const T>(args_.out, batch, head, i);
        const T* dout = row_of<const T>(args_.dout, batch, head, i);
        Vec<C> sum = Vec<C>::zero();
        for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
          sum = fma(load_as_n<C>(out + d, n), load_as_n<C>(dout + d, n), sum);
        });
        const bool empty = lse[i] == -infinity();
        shared.shift[i] = empty ? infinity() : static_cast<C>(static_cast<double>(lse[i]) / scores_.to_natural());
        shared.delta[i] = empty ? C(0) : reduce_add(sum) - (args_.dlse != nullptr ? dlse[i] : C(0));
        if (args_.dsinks != nullptr && !empty) {
          sink_sum -= __builtin_exp(sink - static_cast<double>(lse[i])) * static_cast<double>(shared.delta[i]);
        }
      }
    });
    if (args_.dsinks != nullptr) sink_sums_[slice * grid_.blocks + block] = sink_sum;
    const Range tiles = tiles_of(Mask(p_, batch, head).k_range(rows.begin, rows.end));
    if (args_.dq.data != nullptr && tiles.begin == tiles.end) {
      clear(shared.dq + rows.begin * q_stride_, (rows.end - rows.begin) * q_stride_);
      write(args_.dq, batch, head, rows, shared.dq + rows.begin * q_stride_, q_stride_, p_.head_dim, 1);
    }
  }

  void run_task(Task task, int64_t group, int64_t slot, int64_t index) const {
    const int64_t batch = group / p_.num_heads_kv, head_kv = group % p_.num_heads_kv;
    const int64_t first_head = head_kv * group_size_;
    const Range whole{index * kKeys, min(index * kKeys + kKeys, p_.seq_len_k)};
    pack_keys(task, batch, head_kv, first_head, whole);
    clear(task.dk, kKeys * q_stride_);
    clear(task.dv, kKeys * v_stride_);
    bias_.begin_task(task.bias, group_size_);
    // Late queries first: there the tasks of a causal head all have work, and follow each other without waiting.
    for (int64_t block = grid_.blocks - 1; block >= 0; --block) {
      for (int64_t g = 0; g < group_size_; ++g) {
        run_tile(task, carve_head(slot * group_size_ + g), batch, first_head, g, index, block);
      }
    }
    bias_.end_task(task.bias, group_size_, batch, first_head, index);
    if (args_.dk.data != nullptr) {
      write(args_.dk, batch, head_kv, whole, task.dk, q_stride_, p_.head_dim, p_.softmax_scale);
    }
    if (args_.dv.data != nullptr) {
      write(args_.dv, batch, head_kv, whole, task.dv, v_stride_, p_.head_dim_v, p_.dropout.rescale);
    }
  }

  // Packs what any query may see of a tile; what lies beyond (padding, another sequence) is never read.
  void pack_keys(Task& task, int64_t batch, int64_t head_kv, int64_t head, Range whole) const {
    const Range seen = Mask(p_, batch, head).k_range(0, p_.seq_len_q);
    const int64_t count = min(whole.end, seen.end) - whole.begin;
    task.k_finite = true;
    if (count <= 0 || whole.end <= seen.begin) return;
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const T* k = row_of<const T>(p_.k, batch, head_kv, whole.begin);
      const T* v = row_of<const T>(p_.v, batch, head_kv, whole.begin);
      pack_transposed(task.k_t, k, p_.k.stride[2], p_.head_dim, count);
      pack_transposed(task.v_t, v, p_.v.stride[2], p_.head_dim_v, count);
      task.k_finite = pack(task.k, k, p_.k.stride[2], count, p_.head_dim, panel_size<C>(kKeys));
    });
  }

  void run_tile(const Task& task, const Head& shared, int64_t batch, int64_t first_head, int64_t in_group,
                int64_t index, int64_t block) const {
    const int64_t head = first_head + in_group;
    const Mask mask(p_, batch, head);
    Tile tile{batch, head, index, rows_of(block), {index * kKeys, index * kKeys}, false, true};
    const Range seen = mask.k_range(tile.rows.begin, tile.rows.end);
    const Range tiles = tiles_of(seen);
    const bool in_turn = tiles.begin <= index && index < tiles.end;
    if (in_turn) {
      // Whole words of mask bits, so the first columns of the first tile may be invisible.
      const Range columns{max(index * kKeys, seen.begin / 64 * 64), min(index * kKeys + kKeys, seen.end)};
      const Coverage coverage = mask.coverage(tile.rows, columns);
      if (coverage != Coverage::kNone) {
        tile.columns = columns;
        tile.masked = coverage != Coverage::kAll;
        differentiate(task, shared, &tile, mask);
      }
    }
    const bool visible = tile.width() > 0;
    if (bias_.wanted() && (visible || bias_.wants_invisible_tiles())) {
      bias_.add_tile(task.bias, in_group, batch, head, tile.rows, index, tile.columns, task.ds);
    }
    if (in_turn) {
      // The products before this one need no order: threads meet here alone.
      wait_for_turn(shared.turn + block, index - tiles.begin);
      if (visible) bias_.add_rows(batch, head, tile.rows, tile.columns, task.ds);
      if (args_.dq.data != nullptr) {
        C* dq = shared.dq + tile.rows.begin * q_stride_;
        if (index == tiles.begin) clear(dq, tile.height() * q_stride_);
        if (visible) add_dq(task, tile, mask, dq);
        if (index == tiles.end - 1) {
          write(args_.dq, batch, head, tile.rows, dq, q_stride_, p_.head_dim, p_.softmax_scale);
        }
      }
      pass_turn(shared.turn + block);
    }
  }

  // Computes P and dS of a tile and adds its share of dV and dK.
  void differentiate(const Task& task, const Head& shared, Tile* tile, const Mask& mask) const {
    const int64_t height = tile->height(), width = tile->width(), offset = tile->offset();
    const int64_t q_panel = panel_size<C>(grid_.rows);
    load_rows(task, tile);
    const C* k_t = task.k_t + offset / kPanelWidth<C> * panel_size<C>(p_.head_dim);
    multiply(height, width, p_.head_dim, task.q, p_.head_dim, 1, k_t, panel_size<C>(p_.head_dim),
             [&](int64_t i, int64_t j, Vec<C> value) { store(task.p + i * kKeys + j, value); });
    scores_.finish(task.p, kKeys, tile->batch, tile->head, tile->rows, tile->columns, tile->masked, mask,
                   p_.softcap != 0 ? task.dx : nullptr);
    if (wants_ds_) {
      const C* v_t = task.v_t + offset / kPanelWidth<C> * panel_size<C>(p_.head_dim_v);
      multiply(height, width, p_.head_dim_v, task.dout, v_stride_, 1, v_t, panel_size<C>(p_.head_dim_v),
               [&](int64_t i, int64_t j, Vec<C> value) { store(task.ds + i * kKeys + j, value); });
    }
    const bool drops = p_.dropout.threshold != 0;
    if (tile->masked) {
      drops ? softmax_backward<true, true>(task, shared, *tile) : softmax_backward<true, false>(task, shared, *tile);
    } else {
      drops ? softmax_backward<false, true>(task, shared, *tile) : softmax_backward<false, false>(task, shared, *tile);
    }
    if (p_.softcap != 0 && wants_ds_) apply_slope(task, height, width);

    if (args_.dv.data != nullptr) {
      add_product(width, p_.head_dim_v, height, task.p, 1, kKeys, task.dout_panels, q_panel,
                  task.dv + offset * v_stride_, v_stride_, tile->finite || !tile->masked,
                  [&](int64_t j, int64_t i) { return mask.visible(tile->rows.begin + i, tile->columns.begin + j); });
    }
    if (args_.dk.data != nullptr) {
      add_product(width, p_.head_dim, height, task.dx, 1, kKeys, task.q_panels, q_panel, task.dk + offset * q_stride_,
                  q_stride_, tile->finite || !tile->masked,
                  [&](int64_t j, int64_t i) { return mask.visible(tile->rows.begin + i, tile->columns.begin + j); });
    }
  }

  void add_dq(const Task& task, const Tile& tile, const Mask& mask, C* dq) const {
    for (int64_t j = 0; j < tile.width(); j += kDepth) {
      add_product(tile.height(), p_.head_dim, min(kDepth, tile.width() - j), task.dx + j, kKeys, 1,
                  task.k + (tile.offset() + j) * kPanelWidth<C>, panel_size<C>(kKeys), dq, q_stride_,
                  task.k_finite || !tile.masked, [&](int64_t row, int64_t column) {
                    return mask.visible(tile.rows.begin + row, tile.columns.begin + j + column);
                  });
    }
  }

  // Loads a block of queries and of dout, as rows and as panels.
  void load_rows(const Task& task, Tile* tile) const {
    const int64_t height = tile->height(), panel = panel_size<C>(grid_.rows);
    scores_.load_queries(task.q, tile->batch, tile->head, tile->rows);
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const T* q = row_of<const T>(p_.q, tile->batch, tile->head, tile->rows.begin);
      const T* dout = row_of<const T>(args_.dout, tile->batch, tile->head, tile->rows.begin);
      tile->finite = pack(task.q_panels, q, p_.q.stride[2], height, p_.head_dim, panel);
      tile->finite &= pack(task.dout_panels, dout, args_.dout.stride[2], height, p_.head_dim_v, panel);
      for (int64_t i = 0; i < height; ++i) {
        for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
          store(task.dout + i * v_stride_ + d, load_as_n<C>(dout + i * args_.dout.stride[2] + d, n));
        });
      }
    });
  }

  // From scores and gradients of the (dropped) probabilities to (dropped) probabilities and gradients of the scores.
  // The survivors' rescaling is left to the end in dV.
  template <bool kMasked, bool kDrops>
  void softmax_backward(const Task& task, const Head& shared, const Tile& tile) const {
    constexpr int W = Vec<C>::kWidth;
    const Vec<C> to_log2 = Vec<C>::set1(scores_.to_log2()), hidden = Vec<C>::set1(-infinity());
    const Vec<C> rescale = Vec<C>::set1(static_cast<C>(p_.dropout.rescale));
    const uint64_t slice = static_cast<uint64_t>(tile.batch * p_.num_heads_q + tile.head);
    for (int64_t i = 0; i < tile.height(); ++i) {
      C *p = task.p + i * kKeys, *ds = task.ds + i * kKeys;
      const int64_t row = tile.rows.begin + i;
      const Vec<C> shift = Vec<C>::set1(shared.shift[row]), delta = Vec<C>::set1(shared.delta[row]);
      uint64_t keep = 0;
      for (int64_t j = 0; j < tile.width(); j += W) {
        if (kDrops && j % 64 == 0) {
          keep = dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(row),
                                   static_cast<uint64_t>(tile.columns.begin + j));
        }
        const Vec<C> score = load(p + j);
        Vec<C> weight = exp2((score - shift) * to_log2), dweight = load(ds + j);
        Vec<C> dropped = weight;
        if (kDrops) {
          const auto kept = mask_from_bits<C>(keep >> (j % 64));
          dropped = select(kept, weight, Vec<C>::zero());
          dweight = select(kept, dweight * rescale, Vec<C>::zero());
        }
        Vec<C> dscore = weight * (dweight - delta);
        if (kMasked) {
          // An invisible value may be NaN, and so may lse, by a key that this one shares its query with.
          const auto invisible = eq(score, hidden);
          dropped = select(invisible, Vec<C>::zero(), dropped);
          dscore = select(invisible, Vec<C>::zero(), dscore);
        }
        store(p + j, dropped);
        store(ds + j, dscore);
      }
    }
  }

  // Takes the gradients of the scores back through the softcap, whose slope stands where they go.
  void apply_slope(const Task& task, int64_t height, int64_t width) const {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
        const int64_t at = i * kKeys + j;
        const Vec<C> ds = load(task.ds + at);
        // The slope of an invisible score may be NaN.
        store(task.dx + at, select(eq(ds, Vec<C>::zero()), Vec<C>::zero(), ds * load(task.dx + at)));
      }
    }
  }

  // to += A * B. Where B holds NaN or Inf that not everyone may see, 0 * NaN must not happen: only the pairs (row of A,
  // row of B) for which visible(row, k) are multiplied.
  template <typename Visible>
  static void add_product(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row, int64_t a_column,
                          const C* panels, int64_t panel_stride, C* to, int64_t to_stride, bool all,
                          const Visible& visible) {
    if (all) {
      multiply(rows, columns, depth, a, a_row, a_column, panels, panel_stride, [&](int64_t i, int64_t n, Vec<C> value) {
        C* at = to + i * to_stride + n;
        store(at, load(at) + value);
      });
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        if (!visible(i, k)) continue;
        const Vec<C> factor = Vec<C>::set1(a[i * a_row + k * a_column]);
        for (int64_t n = 0; n < columns; n += Vec<C>::kWidth) {
          const C* b = panels + n / kPanelWidth<C> * panel_stride + k * kPanelWidth<C> + n % kPanelWidth<C>;
          C* at = to + i * to_stride + n;
          store(at, fma(factor, load(b), load(at)));
        }
      }
    }
  }

  // Rounds a finished gradient, once, to its dtype.
  static void write(const View& view, int64_t batch, int64_t head, Range rows, const C* from, int64_t stride,
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

  static void clear(C* to, int64_t count) {
    for (int64_t i = 0; i < count; i += Vec<C>::kWidth) store(to + i, Vec<C>::zero());
  }
  static C infinity() { return static_cast<C>(__builtin_inff()); }

  const AttentionBackwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<C> scores_;
  const Grid grid_;
  BiasGradient<C> bias_;
  int64_t group_size_, q_stride_, v_stride_;
  bool wants_ds_;
  char* heads_ = nullptr;
  double* sink_sums_ = nullptr;
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Backward<double>(args).run();
  } else {
    Backward<float>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
