// Attention backward in the compute type: attention_backward_tasks.h's course, with the products of panel.h.
#include "attention_backward.h"

#include "attention_backward_tasks.h"
#include "panel.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxRows = 96;  // queries a block: a multiple of kTileRows
constexpr int64_t kKeys = 192;  // keys a tile: a multiple of 64 (a word of mask bits), kTileRows and every panel width
constexpr int64_t kDepth = 96;  // keys a step of dQ: that many rows of a panel of keys stay in the first-level cache

template <typename T>
class PanelTiles {
 public:
  using C = T;

  explicit PanelTiles(const AttentionBackwardArgs& args)
      : args_(args), p_(args.problem), scores_(p_), wants_ds_(wants_ds(args)) {
    const int64_t blocks = ceil_div(p_.seq_len_q, kMaxRows);
    rows_ = round_up(ceil_div(p_.seq_len_q, blocks), kTileRows);  // blocks of equal size
    q_stride_ = round_up(p_.head_dim, Vec<C>::kWidth);
    v_stride_ = round_up(p_.head_dim_v, Vec<C>::kWidth);
  }

  struct Task {
    C *k_t, *v_t;  // panels of the transposed keys and values
    C* k;          // panels of the keys
    C *dk, *dv;    // [kKeys, q_stride], [kKeys, v_stride], before the scale
    C *q, *dout;   // rows of one block of queries, the queries times their factor
    C *q_panels, *dout_panels;
    C *p, *ds;  // [rows, kKeys]: scores, then probabilities; gradients of the probabilities, then of the scores
    C* dx;      // [rows, kKeys]: gradients of the scores before the softcap; ds itself where there is none
    bool k_finite;
  };

  Grid grid() const { return {rows_, kKeys, ceil_div(p_.seq_len_q, rows_), ceil_div(p_.seq_len_k, kKeys)}; }
  int64_t dq_stride() const { return q_stride_; }
  static const C* ds(const Task& task) { return task.ds; }

  // Queries and dout are packed for each tile anew: widened once for all, they would be twice as much to read.
  static int64_t head_bytes() { return 0; }
  static void pack_queries(const BackwardHead<C>&, int64_t, int64_t, Range) {}

  int64_t task_bytes() const {
    const int64_t d = p_.head_dim, dv = p_.head_dim_v;
    const int64_t elements = 2 * panels_size<C>(d, kKeys) + panels_size<C>(dv, kKeys) + panels_size<C>(kKeys, d) +
                             kKeys * (q_stride_ + v_stride_) + rows_ * (q_stride_ + v_stride_) +
                             panels_size<C>(rows_, d) + panels_size<C>(rows_, dv) + 3 * rows_ * kKeys;
    return elements * sizeof(C) + 16 * 64;
  }
  Task carve_task(Carver& carver) const {
    Task task;
    task.k_t = carver.take<C>(panels_size<C>(p_.head_dim, kKeys));
    task.v_t = carver.take<C>(panels_size<C>(p_.head_dim_v, kKeys));
    task.k = carver.take<C>(panels_size<C>(kKeys, p_.head_dim));
    task.dk = carver.take<C>(kKeys * q_stride_);
    task.dv = carver.take<C>(kKeys * v_stride_);
    task.q = carver.take<C>(rows_ * p_.head_dim);
    task.dout = carver.take<C>(rows_ * v_stride_);
    task.q_panels = carver.take<C>(panels_size<C>(rows_, p_.head_dim));
    task.dout_panels = carver.take<C>(panels_size<C>(rows_, p_.head_dim_v));
    task.p = carver.take<C>(rows_ * kKeys);
    task.ds = carver.take<C>(rows_ * kKeys);
    task.dx = p_.softcap != 0 ? carver.take<C>(rows_ * kKeys) : task.ds;
    task.k_finite = true;
    return task;
  }

  void begin(Task& task, int64_t batch, int64_t head_kv, Range keys) const {
    clear(task.dk, kKeys * q_stride_);
    clear(task.dv, kKeys * v_stride_);
    task.k_finite = true;
    if (keys.begin >= keys.end) return;
    const int64_t count = keys.end - keys.begin;
    visit(p_.q.dtype, [&](auto type) {
      using From = typename decltype(type)::Type;
      const From* k = row_of<const From>(p_.k, batch, head_kv, keys.begin);
      const From* v = row_of<const From>(p_.v, batch, head_kv, keys.begin);
      pack_transposed(task.k_t, k, p_.k.stride[2], p_.head_dim, count);
      pack_transposed(task.v_t, v, p_.v.stride[2], p_.head_dim_v, count);
      task.k_finite = pack(task.k, k, p_.k.stride[2], count, p_.head_dim, panel_size<C>(kKeys));
    });
  }

  void end(const Task& task, int64_t batch, int64_t head_kv, Range keys) const {
    if (args_.dk.data != nullptr) {
      write_rows(args_.dk, batch, head_kv, keys, task.dk, q_stride_, p_.head_dim, p_.softmax_scale);
    }
    if (args_.dv.data != nullptr) {
      write_rows(args_.dv, batch, head_kv, keys, task.dv, v_stride_, p_.head_dim_v, p_.dropout.rescale);
    }
  }

  void differentiate(const Task& task, const BackwardHead<C>& shared, const BackwardTile& tile,
                     const Mask& mask) const {
    const int64_t height = tile.height(), width = tile.width(), offset = offset_of(tile);
    const int64_t q_panel = panel_size<C>(rows_);
    const bool finite = load_rows(task, tile);
    const C* k_t = task.k_t + offset / kPanelWidth<C> * panel_size<C>(p_.head_dim);
    multiply_along_dim(height, width, p_.head_dim, task.q, p_.head_dim, k_t, task.p, kKeys);
    scores_.finish(task.p, kKeys, tile.batch, tile.head, tile.rows, tile.columns, tile.masked, mask,
                   p_.softcap != 0 ? task.dx : nullptr);
    if (wants_ds_) {
      const C* v_t = task.v_t + offset / kPanelWidth<C> * panel_size<C>(p_.head_dim_v);
      multiply_along_dim(height, width, p_.head_dim_v, task.dout, v_stride_, v_t, task.ds, kKeys);
    }
    const bool drops = p_.dropout.threshold != 0;
    if (tile.masked) {
      drops ? softmax_backward<true, true>(task, shared, tile, mask)
            : softmax_backward<true, false>(task, shared, tile, mask);
    } else {
      drops ? softmax_backward<false, true>(task, shared, tile, mask)
            : softmax_backward<false, false>(task, shared, tile, mask);
    }
    if (p_.softcap != 0 && wants_ds_) apply_slope(task, height, width);

    if (args_.dv.data != nullptr) {
      add_product(width, p_.head_dim_v, height, task.p, 1, kKeys, task.dout_panels, q_panel,
                  task.dv + offset * v_stride_, v_stride_, finite || !tile.masked,
                  [&](int64_t j, int64_t i) { return mask.visible(tile.rows.begin + i, tile.columns.begin + j); });
    }
    if (args_.dk.data != nullptr) {
      add_product(width, p_.head_dim, height, task.dx, 1, kKeys, task.q_panels, q_panel, task.dk + offset * q_stride_,
                  q_stride_, finite || !tile.masked,
                  [&](int64_t j, int64_t i) { return mask.visible(tile.rows.begin + i, tile.columns.begin + j); });
    }
  }

  void add_dq(const Task& task, const BackwardTile& tile, const Mask& mask, C* dq, bool fresh) const {
    if (fresh) clear(dq, rows_ * q_stride_);
    for (int64_t j = 0; j < tile.width(); j += kDepth) {
      add_product(tile.height(), p_.head_dim, min(kDepth, tile.width() - j), task.dx + j, kKeys, 1,
                  task.k + (offset_of(tile) + j) * kPanelWidth<C>, panel_size<C>(kKeys), dq, q_stride_,
                  task.k_finite || !tile.masked, [&](int64_t row, int64_t column) {
                    return mask.visible(tile.rows.begin + row, tile.columns.begin + j + column);
                  });
    }
  }

 private:
  // Loads a block of queries and of dout, as rows and as panels; returns whether they are finite.
  bool load_rows(const Task& task, const BackwardTile& tile) const {
    const int64_t height = tile.height(), panel = panel_size<C>(rows_);
    bool finite = true;
    scores_.load_queries(task.q, tile.batch, tile.head, tile.rows);
    visit(p_.q.dtype, [&](auto type) {
      using From = typename decltype(type)::Type;
      const From* q = row_of<const From>(p_.q, tile.batch, tile.head, tile.rows.begin);
      const From* dout = row_of<const From>(args_.dout, tile.batch, tile.head, tile.rows.begin);
      finite = pack(task.q_panels, q, p_.q.stride[2], height, p_.head_dim, panel);
      finite &= pack(task.dout_panels, dout, args_.dout.stride[2], height, p_.head_dim_v, panel);
      for (int64_t i = 0; i < height; ++i) {
        for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
          store(task.dout + i * v_stride_ + d, load_as_n<C>(dout + i * args_.dout.stride[2] + d, n));
        });
      }
    });
    return finite;
  }

  // From scores and gradients of the (dropped) probabilities to (dropped) probabilities and gradients of the scores.
  // The survivors' rescaling is left to the end in dV.
  //
  // A row all of whose keys are in the tile mends its delta by what its dP say, sum(P (dP - delta)): where few keys
  // share the weight, dP - delta cancels, and it must be the rounded dP that do.
  template <bool kMasked, bool kDrops>
  void softmax_backward(const Task& task, const BackwardHead<C>& shared, const BackwardTile& tile,
                        const Mask& mask) const {
    constexpr int W = Vec<C>::kWidth;
    const Vec<C> hidden = Vec<C>::set1(-static_cast<C>(__builtin_inff()));
    const Vec<C> rescale = Vec<C>::set1(static_cast<C>(p_.dropout.rescale));
    const uint64_t slice = static_cast<uint64_t>(tile.batch * p_.num_heads_q + tile.head);
    for (int64_t i = 0; i < tile.height(); ++i) {
      C *p = task.p + i * kKeys, *ds = task.ds + i * kKeys;
      const int64_t row = tile.rows.begin + i;
      const Vec<C> shift = Vec<C>::set1(shared.shift[row]), factor = Vec<C>::set1(shared.factor[row]);
      const Vec<C> delta = Vec<C>::set1(shared.delta[row] + shared.dlse[row]);
      uint64_t keep[kKeys / 64];
      Vec<C> sum = Vec<C>::zero();
      for (int64_t j = 0; j < tile.width(); j += W) {
        if (kDrops && j % 64 == 0) {
          keep[j / 64] = dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(row),
                                           static_cast<uint64_t>(tile.columns.begin + j));
        }
        const Vec<C> score = load(p + j);
        Vec<C> weight = probability(score, shift, factor), dweight = load(ds + j);
        if (kDrops) {
          const auto kept = mask_from_bits<C>(keep[j / 64] >> (j % 64));
          dweight = select(kept, dweight * rescale, Vec<C>::zero());
        }
        dweight = dweight - delta;
        if (kMasked) {
          // An invisible value may be NaN, and so may lse, by a key that this one shares its query with.
          const auto invisible = eq(score, hidden);
          weight = select(invisible, Vec<C>::set1(C(-1)), weight);  // to be known again
          dweight = select(invisible, Vec<C>::zero(), dweight);
        }
        if (tile.width() - j < W) {  // a ragged tile's last vector holds columns that do not exist
          const auto exists = mask_from_bits<C>(bit_range(0, tile.width() - j));
          weight = select(exists, weight, Vec<C>::zero());  // of a score of 0 beside a low lse it would be Inf
          dweight = select(exists, dweight, Vec<C>::zero());
        }
        sum = fma(weight, dweight, sum);
        store(p + j, weight);
        store(ds + j, dweight);
      }
      const Range seen = mask.k_range(row, row + 1);
      const bool alone = p_.sinks.data == nullptr && tile.columns.begin <= seen.begin && seen.end <= tile.columns.end;
      const Vec<C> rest = Vec<C>::set1(alone ? reduce_add(sum) : C(0)), dlse = Vec<C>::set1(shared.dlse[row]);
      for (int64_t j = 0; j < tile.width(); j += W) {
        const Vec<C> weight = load(p + j);
        Vec<C> dropped = weight, dscore = weight * (load(ds + j) - rest + dlse);
        if (kDrops) dropped = select(mask_from_bits<C>(keep[j / 64] >> (j % 64)), weight, Vec<C>::zero());
        if (kMasked) {
          const auto invisible = lt(weight, Vec<C>::zero());
          dropped = select(invisible, Vec<C>::zero(), dropped);
          dscore = select(invisible, Vec<C>::zero(), dscore);
        }
        if (kDrops || kMasked) store(p + j, dropped);
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

  static int64_t offset_of(const BackwardTile& tile) { return tile.columns.begin - tile.index * kKeys; }

  const AttentionBackwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<C> scores_;
  const bool wants_ds_;
  int64_t rows_, q_stride_, v_stride_;
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Backward<PanelTiles<double>>(args).run();
  } else {
    Backward<PanelTiles<float>>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
