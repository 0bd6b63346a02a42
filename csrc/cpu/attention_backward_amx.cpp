// Attention backward in bfloat16 on AMX: attention_backward_tasks.h's course, with all five products on tiles.
//
// P and dS are rounded to bfloat16 as operands of products, as PyTorch rounds them; everything else is float32: the
// scores, dS itself, the sums. What multiplies from the right must stand in pairs of depths, and what multiplies from
// the left in rows. So that nothing of size seq x seq is ever transposed, dV and dK are summed up transposed:
//
//   S = Q K^T, dP = dO V^T, dQ = dS K: queries from the left, and all keys packed once a task;
//   dV^T = dO^T P, dK^T = Q^T dS: dO^T and Q^T packed once a head, P and dS paired as they leave the registers.
#include "amx.h"
#include "attention_backward.h"
#include "attention_backward_tasks.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxRows = 256;     // queries a block: depths of dV and dK for each load and store of their sums
constexpr int64_t kKeys = 256;        // keys a tile
constexpr int64_t kStepBytes = 2048;  // kStep rows of kStep bfloat16
constexpr int64_t kSteps = kKeys / kStep;
constexpr int64_t kMinRows = 2;

class AmxTiles {
 public:
  using C = float;

  explicit AmxTiles(const AttentionBackwardArgs& args)
      : args_(args), p_(args.problem), scores_(p_, ScoreUnit::kRaw), to_log2_(scores_.to_log2()) {
    const int64_t blocks = ceil_div(p_.seq_len_q, kMaxRows);
    rows_ = round_up(ceil_div(p_.seq_len_q, blocks), kStep);  // blocks of equal size
    grid_ = {rows_, kKeys, ceil_div(p_.seq_len_q, rows_), ceil_div(p_.seq_len_k, kKeys)};
    dim_steps_ = ceil_div(p_.head_dim, kStep);
    value_steps_ = ceil_div(p_.head_dim_v, kStep);
    wants_ds_ = wants_ds(args);
    rate_ = ceil_div(dim_steps_ + value_steps_, 4);
    keeps_ds_ = args.dbias.data != nullptr || args.drelative.data != nullptr;
  }

  struct Task {
    char *k_t, *v_t;       // K^T and V^T in pairs
    char* k;               // K in pairs
    char* k_finite;        // [kSteps]: of 32 keys; elements that are not are packed as 0
    bool* fresh;           // [kSteps]: nothing has been added yet to the sums of 32 keys
    float *dk, *dv;        // dK^T [dim_steps * kStep, kKeys] and dV^T, their columns in the order of key_of()
    float *s[2], *dp[2];   // of two cells, one being multiplied while the other becomes P and dS
    float* slope;          // of a cell: of the softcap
    float *shift, *delta;  // [kStep]
    uint64_t* keep;        // [kStep]: dropout's bits of 64 columns
    float* ds;             // [rows, kKeys], where dS is wanted itself
    char* p_pairs;         // [rows / kStep, kSteps]: P in pairs of queries
    char* ds_pairs;        // the same of dS
    char* ds_rows;         // the same in rows
  };

  const Grid& grid() const { return grid_; }
  int64_t dq_stride() const { return dim_steps_ * kStep; }
  static const C* ds(const Task& task) { return task.ds; }

  int64_t head_bytes() const {
    return grid_.blocks * rows_ / kStep * (2 * (dim_steps_ + value_steps_) * kStepBytes + 64);
  }

  // Packs queries and dout of a block: in rows, and transposed.
  void pack_queries(const BackwardHead<C>& head, int64_t batch, int64_t head_q, Range rows) const {
    for (int64_t i = rows.begin; i < rows.end; i += kStep) {
      const Packed packed = packed_queries(head, i);
      const int64_t height = rows.end - i;
      const BFloat16* q = row_of<const BFloat16>(p_.q, batch, head_q, i);
      const BFloat16* dout = row_of<const BFloat16>(args_.dout, batch, head_q, i);
      pack_rows(packed.q, q, p_.q.stride[2], height, p_.head_dim);
      pack_rows(packed.dout, dout, args_.dout.stride[2], height, p_.head_dim_v);
      packed.finite[0] = pack_tiles(packed.q_t, q, p_.q.stride[2], height, p_.head_dim);
      packed.finite[1] = pack_tiles(packed.dout_t, dout, args_.dout.stride[2], height, p_.head_dim_v);
      transpose_tiles(packed.q_t, 2 * dim_steps_);
      transpose_tiles(packed.dout_t, 2 * value_steps_);
    }
  }

  int64_t task_bytes() const {
    const int64_t steps = dim_steps_ + value_steps_;
    return kSteps * (dim_steps_ + steps) * kStepBytes + 2 * 64 + steps * kStep * kKeys * 4 +
           (5 * kStep + 4) * kStep * 4 + (keeps_ds_ ? rows_ * kKeys * 4 : 0) + 3 * rows_ * kKeys * 2;
  }
  Task carve_task(Carver& carver) const {
    Task task;
    task.k_t = carver.take<char>(kSteps * dim_steps_ * kStepBytes);
    task.v_t = carver.take<char>(kSteps * value_steps_ * kStepBytes);
    task.k = carver.take<char>(kSteps * dim_steps_ * kStepBytes);
    task.k_finite = carver.take<char>(kSteps);
    task.fresh = carver.take<bool>(kSteps);
    task.dk = carver.take<float>(dim_steps_ * kStep * kKeys);
    task.dv = carver.take<float>(value_steps_ * kStep * kKeys);
    for (float*& cell : task.s) cell = carver.take<float>(kStep * kStep);
    for (float*& cell : task.dp) cell = carver.take<float>(kStep * kStep);
    task.slope = carver.take<float>(kStep * kStep);
    task.shift = carver.take<float>(kStep);
    task.delta = carver.take<float>(kStep);
    task.keep = carver.take<uint64_t>(kStep);
    task.ds = carver.take<float>(keeps_ds_ ? rows_ * kKeys : 0);
    task.p_pairs = carver.take<char>(rows_ * kKeys * 2);
    task.ds_pairs = carver.take<char>(rows_ * kKeys * 2);
    task.ds_rows = carver.take<char>(rows_ * kKeys * 2);
    return task;
  }

  void begin(const Task& task, int64_t batch, int64_t head, Range keys) const {
    for (int64_t step = 0; step < kSteps; ++step) task.fresh[step] = true;
    for (int64_t key = keys.begin; key < keys.end; key += kStep) {
      const int64_t step = (key - keys.begin) / kStep, count = keys.end - key;
      const BFloat16* k = row_of<const BFloat16>(p_.k, batch, head, key);
      const BFloat16* v = row_of<const BFloat16>(p_.v, batch, head, key);
      for (int64_t half = 0; half < kStep; half += 16) {
        pack_transposed_tiles(task.k_t + step * dim_steps_ * kStepBytes + half / 16 * dim_steps_ * kTileBytes,
                              k + half * p_.k.stride[2], p_.k.stride[2], count - half, p_.head_dim);
        pack_transposed_tiles(task.v_t + step * value_steps_ * kStepBytes + half / 16 * value_steps_ * kTileBytes,
                              v + half * p_.v.stride[2], p_.v.stride[2], count - half, p_.head_dim_v);
      }
      task.k_finite[step] = pack_tiles(task.k + step * dim_steps_ * kStepBytes, k, p_.k.stride[2], count, p_.head_dim);
    }
  }

  void end(const Task& task, int64_t batch, int64_t head, Range keys) const {
    write_sum(args_.dk, batch, head, keys, task, task.dk, p_.head_dim, p_.softmax_scale);
    write_sum(args_.dv, batch, head, keys, task, task.dv, p_.head_dim_v, p_.dropout.rescale);
  }

  void differentiate(const Task& task, const BackwardHead<C>& head, const BackwardTile& tile, const Mask& mask) const {
    const int64_t first = first_step(tile), steps = ceil_div(tile.width(), kStep);
    const int64_t depth = ceil_div(tile.height(), kStep);
    const Packed packed = packed_queries(head, tile.rows.begin);
    TileScope tiles;
    Products products;
    // S and dP of a cell of kStep x kStep are multiplied while the softmax of the one before it runs.
    const auto multiply = [&](int64_t cell) {
      return [&, cell](int64_t which) {
        const int64_t i = cell / steps, j = first + cell % steps;
        return which == 0 ? Product{packed.q + i * dim_steps_ * kStepBytes,
                                    64,
                                    kStepBytes,
                                    task.k_t + j * dim_steps_ * kStepBytes,
                                    dim_steps_ * kTileBytes,
                                    kTileBytes,
                                    task.s[cell % 2],
                                    kStep * 4,
                                    dim_steps_,
                                    false}
                          : Product{packed.dout + i * value_steps_ * kStepBytes,
                                    64,
                                    kStepBytes,
                                    task.v_t + j * value_steps_ * kStepBytes,
                                    value_steps_ * kTileBytes,
                                    kTileBytes,
                                    task.dp[cell % 2],
                                    kStep * 4,
                                    value_steps_,
                                    false};
      };
    };
    const auto make_first = multiply(0);
    Background(products, wants_ds_ ? 2 : 1, make_first).finish();
    for (int64_t cell = 0; cell < depth * steps; ++cell) {
      const auto make_next = multiply(cell + 1);
      Background next(products, cell + 1 == depth * steps ? 0 : wants_ds_ ? 2 : 1, make_next);
      softmax_backward(task, head, tile, cell / steps, cell % steps, mask, next);
      next.finish();
    }
    if (args_.dv.data != nullptr) {
      add_transposed(products, packed.dout_t, value_steps_, task.p_pairs, task.dv + first * kStep, steps, depth,
                     task.fresh + first);
    }
    if (args_.dk.data != nullptr) {
      add_transposed(products, packed.q_t, dim_steps_, task.ds_pairs, task.dk + first * kStep, steps, depth,
                     task.fresh + first);
    }
    products.flush();
    for (int64_t j = 0; j < steps; ++j) task.fresh[first + j] = false;
    for (int64_t i = 0; i < depth; ++i) {
      if (!packed.finite[i * 64] && args_.dk.data != nullptr) {
        add_not_finite_rows(task.ds_pairs, i, p_.q, p_.head_dim, tile, mask, task.dk + first * kStep);
      }
      if (!packed.finite[i * 64 + 1] && args_.dv.data != nullptr) {
        add_not_finite_rows(task.p_pairs, i, args_.dout, p_.head_dim_v, tile, mask, task.dv + first * kStep);
      }
    }
  }

  void add_dq(const Task& task, const BackwardTile& tile, const Mask& mask, C* dq, bool fresh) const {
    const int64_t first = first_step(tile), steps = ceil_div(tile.width(), kStep);
    TileScope tiles;
    Products products;
    for (int64_t i = 0; i < tile.height(); i += kStep) {
      for (int64_t n = 0; n < dim_steps_; ++n) {
        products.run({task.ds_rows + i / kStep * kSteps * kStepBytes, 64, kStepBytes,
                      task.k + (first * dim_steps_ + n) * kStepBytes, kTileBytes, dim_steps_ * kStepBytes,
                      dq + i * dq_stride() + n * kStep, dq_stride() * 4, steps, !fresh});
      }
    }
    products.flush();
    for (int64_t step = 0; step < steps; ++step) {
      if (!task.k_finite[first + step]) add_not_finite_keys(task, step, tile, mask, dq);
    }
  }

 private:
  // A block of kStep queries of a head, packed.
  struct Packed {
    char *q, *dout;      // [steps, kStep rows]
    char *q_t, *dout_t;  // [steps * kStep rows]: columns are queries, paired as pack_tiles pairs them
    char* finite;        // two bytes: of queries, of dout; elements that are not are packed as 0 in q_t and dout_t
  };
  // kStep queries against kStep keys: what of P and dS is worked on at a time, for all of it to stay in the first-level
  // cache. A tile store to anywhere else takes four times as long.
  struct Cell {
    float *s, *dp;  // [kStep, kStep]
    float* ds;      // where dS is wanted itself, kKeys from row to row
    int64_t at;     // in p_pairs, ds_pairs and ds_rows
    Range rows, columns;
  };
  Packed packed_queries(const BackwardHead<C>& head, int64_t row) const {
    const int64_t count = grid_.blocks * rows_ / kStep, index = row / kStep;
    const int64_t q_bytes = dim_steps_ * kStepBytes, dout_bytes = value_steps_ * kStepBytes;
    Packed packed;
    packed.q = head.packed + index * q_bytes;
    packed.q_t = head.packed + (count + index) * q_bytes;
    char* rest = head.packed + 2 * count * q_bytes;
    packed.dout = rest + index * dout_bytes;
    packed.dout_t = rest + (count + index) * dout_bytes;
    packed.finite = rest + 2 * count * dout_bytes + index * 64;
    return packed;
  }

  // Where, among the steps of its tile of keys, the visible ones begin.
  static int64_t first_step(const BackwardTile& tile) { return (tile.columns.begin - tile.index * kKeys) / kStep; }

  // The key, of 32, whose column of dK^T and dV^T this is: what pairing two rows by 16-bit unpacking leads to.
  static int64_t key_of(int64_t column) {
    return (column & 12) + column / 16 * 2 + (column >> 1 & 1) + (column & 1) * 16;
  }

  // Makes P and dS of a cell out of its scores and dP, in step with the products in the background.
  template <typename Make>
  void softmax_backward(const Task& task, const BackwardHead<C>& head, const BackwardTile& tile, int64_t block,
                        int64_t step, const Mask& mask, Background<Make>& next) const {
    Cell cell;
    cell.s = task.s[(block * ceil_div(tile.width(), kStep) + step) % 2];
    cell.dp = task.dp[(block * ceil_div(tile.width(), kStep) + step) % 2];
    cell.rows.begin = tile.rows.begin + block * kStep;
    cell.rows.end = min(cell.rows.begin + kStep, tile.rows.end);
    cell.columns.begin = tile.columns.begin + step * kStep;
    cell.columns.end = min(cell.columns.begin + kStep, tile.columns.end);
    cell.at = (block * kSteps + step) * kStepBytes;
    cell.ds = task.ds + block * kStep * kKeys + step * kStep;
    const int64_t height = cell.rows.end - cell.rows.begin, width = cell.columns.end - cell.columns.begin;
    if (step == 0) load_statistics(task, head, cell.rows);
    const bool drops = p_.dropout.threshold != 0;
    if (drops && step % 2 == 0) draw_dropout(task, tile, cell);

    scores_.finish(cell.s, kStep, tile.batch, tile.head, cell.rows, cell.columns, tile.masked, mask,
                   p_.softcap != 0 ? task.slope : nullptr);
    // Rows and columns that do not exist are hidden like those that are masked.
    const FloatVec hidden = FloatVec::set1(-kInfinity);
    if (height < kStep || width < kStep) {
      for (int64_t i = 0; i < kStep; ++i) {
        const __mmask32 exists = i < height ? first_lanes32(width) : 0;
        float* row = cell.s + i * kStep;
        store(row, select(static_cast<__mmask16>(exists), load(row), hidden));
        store(row + 16, select(static_cast<__mmask16>(exists >> 16), load(row + 16), hidden));
      }
    }
    const bool masked = tile.masked || height < kStep || width < kStep;
    if (drops || p_.softcap != 0 || keeps_ds_) {
      make_pairs<true, true>(task, cell, step, next);
    } else if (masked) {
      make_pairs<true, false>(task, cell, step, next);
    } else {
      make_pairs<false, false>(task, cell, step, next);
    }
  }

  // What the softmax of a cell needs of its rows: shifts, negated, and deltas. The rows' factors stay out: what they
  // mend is float32's, and P is rounded to bfloat16.
  void load_statistics(const Task& task, const BackwardHead<C>& head, Range rows) const {
    for (int64_t i = 0; i < kStep; i += 16) {
      const int n = static_cast<int>(max(0, min(16, rows.end - rows.begin - i)));
      store(task.shift + i, FloatVec::zero() - load_n(head.shift + rows.begin + i, n));
      store(task.delta + i, load_n(head.delta + rows.begin + i, n));
    }
  }

  // Draws which elements of a cell and the next one in its rows are kept.
  void draw_dropout(const Task& task, const BackwardTile& tile, const Cell& cell) const {
    const uint64_t slice = static_cast<uint64_t>(tile.batch * p_.num_heads_q + tile.head);
    for (int64_t i = cell.rows.begin; i < cell.rows.end; ++i) {
      task.keep[i - cell.rows.begin] =
          dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(i), static_cast<uint64_t>(cell.columns.begin));
    }
  }

  // The rows of a pair lie 16 apart, as pack_tiles pairs them. With kRare: dropout, softcap, or dS is to be kept.
  template <bool kMasked, bool kRare, typename Make>
  void make_pairs(const Task& task, const Cell& cell, int64_t step, Background<Make>& next) const {
    for (int64_t i = 0; i < 16; ++i) {
      __m512i p[2], x[2];
      softmax_row<kMasked, kRare>(task, cell, i, step, &p[0], &x[0]);
      softmax_row<kMasked, kRare>(task, cell, i + 16, step, &p[1], &x[1]);
      const int64_t to = cell.at + i * 64;
      _mm512_storeu_si512(task.ds_rows + to, x[0]);
      _mm512_storeu_si512(task.ds_rows + to + kTileBytes, x[1]);
      _mm512_storeu_si512(task.ds_pairs + to, _mm512_unpacklo_epi16(x[0], x[1]));
      _mm512_storeu_si512(task.ds_pairs + to + kTileBytes, _mm512_unpackhi_epi16(x[0], x[1]));
      _mm512_storeu_si512(task.p_pairs + to, _mm512_unpacklo_epi16(p[0], p[1]));
      _mm512_storeu_si512(task.p_pairs + to + kTileBytes, _mm512_unpackhi_epi16(p[0], p[1]));
      for (int64_t n = 0; n < rate_; ++n) next.advance();
    }
  }

  // P (dropped) and dS of a row of a cell, in bfloat16; the survivors' rescaling is left to the end in dV.
  template <bool kMasked, bool kRare>
  void softmax_row(const Task& task, const Cell& cell, int64_t row, int64_t step, __m512i* p, __m512i* x) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_), zero = FloatVec::zero();
    const FloatVec shift = FloatVec::set1(task.shift[row]), delta = FloatVec::set1(task.delta[row]);
    FloatVec weights[2], dscores[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row * kStep + half * 16;
      const FloatVec score = load(cell.s + at);
      FloatVec weight = exp2(fma(score, to_log2, shift)), dweight = load(cell.dp + at);
      FloatVec dropped = weight;
      if (kRare && p_.dropout.threshold != 0) {
        const __mmask16 kept = static_cast<__mmask16>(task.keep[row] >> (step % 2 * 32 + half * 16));
        dropped = select(kept, weight, zero);
        dweight = select(kept, dweight * FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero);
      }
      FloatVec dscore = weight * (dweight - delta);
      if (kMasked) {
        // An invisible value may be NaN, and so may lse, by a key that this one shares its query with.
        const __mmask16 invisible = eq(score, FloatVec::set1(-kInfinity));
        dropped = select(invisible, zero, dropped);
        dscore = select(invisible, zero, dscore);
      }
      if (kRare) {
        if (keeps_ds_) store(cell.ds + row * kKeys + half * 16, dscore);
        // The slope of an invisible score may be NaN.
        if (p_.softcap != 0) dscore = select(eq(dscore, zero), zero, dscore * load(task.slope + at));
      }
      weights[half] = dropped;
      dscores[half] = dscore;
    }
    *p = merge_bfloat16(weights[0], weights[1]);
    *x = merge_bfloat16(dscores[0], dscores[1]);
  }

  // sum [m_steps * kStep, kKeys] += left * pairs, over `depth` steps of queries; = where the sum is fresh.
  static void add_transposed(Products& products, const char* left, int64_t m_steps, const char* pairs, float* sum,
                             int64_t steps, int64_t depth, const bool* fresh) {
    for (int64_t m = 0; m < m_steps; ++m) {
      for (int64_t j = 0; j < steps; ++j) {
        products.run({left + m * kStepBytes, 64, m_steps * kStepBytes, pairs + j * kStepBytes, kTileBytes,
                      kSteps * kStepBytes, sum + m * kStep * kKeys + j * kStep, kKeys * 4, depth, !fresh[j]});
      }
    }
  }

  // Adds to dK^T or dV^T what was packed as 0 of kStep queries or rows of dout: 0 * NaN is NaN, so only those who see
  // such an element may be touched by it.
  static void add_not_finite_rows(const char* pairs, int64_t block, const View& view, int64_t dim,
                                  const BackwardTile& tile, const Mask& mask, float* sum) {
    const int64_t begin = tile.rows.begin + block * kStep;
    for (int64_t i = begin; i < min(begin + kStep, tile.rows.end); ++i) {
      const BFloat16* row = row_of<const BFloat16>(view, tile.batch, tile.head, i);
      const int64_t at = i - begin;
      for (int64_t column = 0; column < kKeys; ++column) {
        const int64_t key = column / kStep * kStep + key_of(column % kStep);
        if (key >= tile.width() || !mask.visible(i, tile.columns.begin + key)) continue;
        const char* tiles = pairs + (block * kSteps + column / kStep) * kStepBytes + column % kStep / 16 * kTileBytes;
        const BFloat16 factor = reinterpret_cast<const BFloat16*>(tiles)[at % 16 * 32 + column % 16 * 2 + at / 16];
        for (int64_t d = 0; d < dim; ++d) {
          if (!is_finite(row[d])) sum[d * kKeys + column] += to_float(factor) * to_float(row[d]);
        }
      }
    }
  }

  // The same in dQ of kStep keys.
  void add_not_finite_keys(const Task& task, int64_t step, const BackwardTile& tile, const Mask& mask, C* dq) const {
    for (int64_t j = step * kStep; j < min(step * kStep + kStep, tile.width()); ++j) {
      const BFloat16* k = row_of<const BFloat16>(p_.k, tile.batch, tile.head / (p_.num_heads_q / p_.num_heads_kv),
                                                 tile.columns.begin + j);
      for (int64_t i = 0; i < tile.height(); ++i) {
        if (!mask.visible(tile.rows.begin + i, tile.columns.begin + j)) continue;
        const char* rows = task.ds_rows + (i / kStep * kSteps + step) * kStepBytes + i % kStep * 64;
        const BFloat16 factor = reinterpret_cast<const BFloat16*>(rows)[j % 16 * 2 + j % kStep / 16];
        for (int64_t d = 0; d < p_.head_dim; ++d) {
          if (!is_finite(k[d])) dq[i * dq_stride() + d] += to_float(factor) * to_float(k[d]);
        }
      }
    }
  }

  // Transposes a finished sum [dim, kKeys] and rounds it to its dtype.
  static void write_sum(const View& view, int64_t batch, int64_t head, Range keys, const Task& task, const float* sum,
                        int64_t dim, double factor) {
    if (view.data == nullptr) return;
    const FloatVec scale = FloatVec::set1(static_cast<float>(factor));
    for (int64_t column = 0; column < round_up(keys.end - keys.begin, kStep); column += 16) {
      const int64_t step = column / kStep, begin = keys.begin + step * kStep;
      for (int64_t d = 0; d < dim; d += kStep) {
        const auto row = [&](int64_t i) {
          const int64_t key = begin + key_of(column % kStep + i);
          return key < keys.end ? row_of<BFloat16>(view, batch, head, key) + d : nullptr;
        };
        if (task.fresh[step]) {
          for (int64_t i = 0; i < 16; ++i) {
            if (row(i) != nullptr) {
              _mm512_mask_storeu_epi16(row(i), first_lanes32(dim - d), _mm512_setzero_si512());
            }
          }
        } else {
          write_transposed(row, dim - d, sum + d * kKeys + column, kKeys, scale);
        }
      }
    }
  }

  static constexpr float kInfinity = __builtin_inff();

  const AttentionBackwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<float> scores_;
  const float to_log2_;
  Grid grid_;
  int64_t rows_, dim_steps_, value_steps_, rate_;
  bool wants_ds_, keeps_ds_;
};

}  // namespace

bool attention_backward_takes(const AttentionBackwardArgs& args) {
  return args.problem.q.dtype == DType::kBFloat16 && args.problem.seq_len_q >= kMinRows;
}

void attention_backward(const AttentionBackwardArgs& args) { Backward<AmxTiles>(args).run(); }

}  // namespace fastattn::FASTATTN_ISA
