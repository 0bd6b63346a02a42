// Attention backward in bfloat16 on AMX: attention_backward_tasks.h's course, with all five products on tiles.
//
// P and dS are rounded to bfloat16 as operands of products, as PyTorch rounds them; everything else is float32: the
// scores, dS itself, the sums. What multiplies from the right must stand in pairs of depths, and what multiplies from
// the left in rows. So that nothing of size seq x seq is ever transposed, dV and dK are summed up transposed:
//
//   S = Q K^T, dP = dO V^T, dQ = dS K: queries from the left, and all keys packed once a task;
//   dV^T = dO^T P, dK^T = Q^T dS: dO^T and Q^T packed once a head, P and dS paired as they leave the registers.
//
// Longer than 400 lines because a tile's five products, its softmax and what is not finite share one working memory.
#include "amx.h"
#include "attention_backward.h"
#include "attention_backward_tasks.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxRows = 256;     // queries a block: depths of dV and dK for each load and store of their sums
constexpr int64_t kKeys = 256;        // keys a tile
constexpr int64_t kStepBytes = 2048;  // kStep rows of kStep bfloat16
constexpr int64_t kSteps = kKeys / kStep, kBlocks = kMaxRows / kStep;  // cells of a tile, see AmxTiles::Cell
constexpr int64_t kMinRows = 2;  // measured: level with AVX-512 at 2 to 4 queries, ahead from 8 on
// With one key dP - delta is 0, but for the rounding of out that delta comes from; AVX-512's kernel mends it.
constexpr int64_t kMinKeys = 2;

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
    float *dk, *dv;        // dK^T [dim_steps, kSteps, kStep, kStep] and dV^T, their columns in the order of key_of()
    float *s[2], *dp[2];   // of two cells, one being multiplied while the other becomes P and dS
    float* slope;          // of a cell: of the softcap
    float *shift, *delta;  // [kStep]
    uint64_t* keep;        // [kStep]: dropout's bits of 64 columns
    int64_t* drawn;        // of which cells of a tile
    Range* blocks_of;      // [kSteps]: between these blocks of 32 queries lie all that see any of 32 keys
    Range* steps_of;       // [kBlocks]: between these steps of 32 keys lie all that any of 32 queries sees
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
           (5 * kStep + 4) * kStep * 4 + 64 + (kSteps + kBlocks) * sizeof(Range) + (keeps_ds_ ? rows_ * kKeys * 4 : 0) +
           3 * rows_ * kKeys * 2;
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
    task.drawn = carver.take<int64_t>(1);
    task.blocks_of = carver.take<Range>(kSteps);
    task.steps_of = carver.take<Range>(kBlocks);
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
    const int64_t first = first_step(tile);
    const Packed packed = packed_queries(head, tile.rows.begin);
    Cell cells[kBlocks * kSteps];
    const int64_t count = find_cells(task, tile, mask, cells);
    *task.drawn = -1;
    TileScope tiles;
    Products products;
    // S and dP of a cell are multiplied while the softmax of the one before it runs.
    const auto multiply = [&](int64_t index) {
      return [&, index](int64_t which) {
        const Cell& cell = cells[index];
        const int64_t steps = which == 0 ? dim_steps_ : value_steps_, key = first + cell.step;
        Product product{};
        product.a = (which == 0 ? packed.q : packed.dout) + cell.block * steps * kStepBytes;
        product.a_row = 64;
        product.a_step = kStepBytes;
        product.b = (which == 0 ? task.k_t : task.v_t) + key * steps * kStepBytes;
        product.b_right = steps * kTileBytes;
        product.b_step = kTileBytes;
        // Not (which == 0 ? task.s : task.dp)[index % 2]: there GCC 12's UndefinedBehaviorSanitizer loses the index.
        float* const* to = which == 0 ? task.s : task.dp;
        product.c = to[index % 2];
        product.c_row = kStep * 4;
        product.steps = steps;
        return product;
      };
    };
    const int64_t products_a_cell = wants_ds_ ? 2 : 1;
    const auto make_first = multiply(0);
    Background(products, count > 0 ? products_a_cell : 0, make_first).finish();
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || cells[i].block != cells[i - 1].block) load_statistics(task, head, rows_of(tile, cells[i].block));
      const auto make_next = multiply(i + 1);
      Background next(products, i + 1 < count ? products_a_cell : 0, make_next);
      softmax_backward(task, tile, cells[i], task.s[i % 2], task.dp[i % 2], mask, next);
      next.finish();
    }
    if (args_.dv.data != nullptr)
      add_transposed(task, products, packed.dout_t, value_steps_, task.p_pairs, first, task.dv);
    if (args_.dk.data != nullptr) add_transposed(task, products, packed.q_t, dim_steps_, task.ds_pairs, first, task.dk);
    products.flush();
    for (int64_t j = 0; j < kSteps - first; ++j) {
      if (task.blocks_of[j].begin < task.blocks_of[j].end) task.fresh[first + j] = false;
    }
    for (int64_t i = 0; i < ceil_div(tile.height(), kStep); ++i) {
      if (!packed.finite[i * 64] && args_.dk.data != nullptr) {
        add_not_finite_rows(task.ds_pairs, i, p_.q, p_.head_dim, tile, mask, task.dk);
      }
      if (!packed.finite[i * 64 + 1] && args_.dv.data != nullptr) {
        add_not_finite_rows(task.p_pairs, i, args_.dout, p_.head_dim_v, tile, mask, task.dv);
      }
    }
  }

  void add_dq(const Task& task, const BackwardTile& tile, const Mask& mask, C* dq, bool fresh) const {
    const int64_t first = first_step(tile);
    TileScope tiles;
    Products products;
    for (int64_t i = 0; i < ceil_div(tile.height(), kStep); ++i) {
      const Range steps = task.steps_of[i];
      float* rows = dq + i * kStep * dq_stride();
      if (steps.begin >= steps.end && fresh) clear(rows, kStep * dq_stride());
      for (int64_t n = 0; n < dim_steps_ && steps.begin < steps.end; ++n) {
        products.run({task.ds_rows + (i * kSteps + steps.begin) * kStepBytes, 64, kStepBytes,
                      task.k + ((first + steps.begin) * dim_steps_ + n) * kStepBytes, kTileBytes,
                      dim_steps_ * kStepBytes, rows + n * kStep, dq_stride() * 4, steps.end - steps.begin, !fresh});
      }
    }
    products.flush();
    for (int64_t step = 0; step < ceil_div(tile.width(), kStep); ++step) {
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
    int64_t block, step;  // of the tile's queries, of its visible keys
    bool masked;
    int64_t at() const { return (block * kSteps + step) * kStepBytes; }     // in p_pairs, ds_pairs and ds_rows
    int64_t ds_at() const { return block * kStep * kKeys + step * kStep; }  // in ds
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

  static Range rows_of(const BackwardTile& tile, int64_t block) {
    const int64_t begin = tile.rows.begin + block * kStep;
    return {begin, min(begin + kStep, tile.rows.end)};
  }
  static Range columns_of(const BackwardTile& tile, int64_t step) {
    const int64_t begin = tile.columns.begin + step * kStep;
    return {begin, min(begin + kStep, tile.columns.end)};
  }

  // Lists the cells of a tile that are not invisible; P and dS of the others become 0.
  int64_t find_cells(const Task& task, const BackwardTile& tile, const Mask& mask, Cell* cells) const {
    for (Range* range = task.blocks_of; range < task.blocks_of + kSteps; ++range) *range = {kBlocks, 0};
    for (Range* range = task.steps_of; range < task.steps_of + kBlocks; ++range) *range = {kSteps, 0};
    int64_t count = 0;
    for (int64_t i = 0; i < ceil_div(tile.height(), kStep); ++i) {
      for (int64_t j = 0; j < ceil_div(tile.width(), kStep); ++j) {
        const Range rows = rows_of(tile, i), columns = columns_of(tile, j);
        const Coverage coverage = tile.masked ? mask.coverage(rows, columns) : Coverage::kAll;
        // Rows and columns that do not exist are hidden like those that are masked.
        const bool ragged = rows.end - rows.begin < kStep || columns.end - columns.begin < kStep;
        const Cell cell{i, j, coverage != Coverage::kAll || ragged};
        if (coverage == Coverage::kNone) {
          for (char* to : {task.p_pairs, task.ds_pairs, task.ds_rows}) {
            clear(reinterpret_cast<float*>(to + cell.at()), kStepBytes / 4);
          }
          for (int64_t row = 0; keeps_ds_ && row < kStep; ++row) clear(task.ds + cell.ds_at() + row * kKeys, kStep);
          continue;
        }
        Range &blocks = task.blocks_of[j], &steps = task.steps_of[i];
        blocks = {min(blocks.begin, i), i + 1};
        steps = {min(steps.begin, j), j + 1};
        cells[count++] = cell;
      }
    }
    return count;
  }

  // Makes P and dS of a cell out of its scores and dP, in step with the products in the background.
  template <typename Make>
  void softmax_backward(const Task& task, const BackwardTile& tile, const Cell& cell, float* s, const float* dp,
                        const Mask& mask, Background<Make>& next) const {
    const Range rows = rows_of(tile, cell.block), columns = columns_of(tile, cell.step);
    const int64_t height = rows.end - rows.begin, width = columns.end - columns.begin;
    scores_.finish(s, kStep, tile.batch, tile.head, rows, columns, cell.masked, mask,
                   p_.softcap != 0 ? task.slope : nullptr);
    if (height < kStep || width < kStep) {
      const FloatVec hidden = FloatVec::set1(-kInfinity);
      for (int64_t i = 0; i < kStep; ++i) {
        const __mmask32 exists = i < height ? first_lanes32(width) : 0;
        float* row = s + i * kStep;
        store(row, select(static_cast<__mmask16>(exists), load(row), hidden));
        store(row + 16, select(static_cast<__mmask16>(exists >> 16), load(row + 16), hidden));
      }
    }
    if (p_.dropout.threshold != 0) draw_dropout(task, tile, cell, rows);
    if (p_.dropout.threshold != 0 || p_.softcap != 0 || keeps_ds_ || has_huge_shift(task)) {
      make_pairs<true, true>(task, cell, s, dp, next);
    } else if (cell.masked) {
      make_pairs<true, false>(task, cell, s, dp, next);
    } else {
      make_pairs<false, false>(task, cell, s, dp, next);
    }
  }

  static bool has_huge_shift(const Task& task) {
    const FloatVec limit = FloatVec::set1(kHugeShift);
    return (lt(limit, abs(load(task.shift))) | lt(limit, abs(load(task.shift + 16)))) != 0;
  }

  // What the softmax of a cell needs of its rows: lse, negated, and deltas. A float32 lse is exact enough where P is
  // rounded to bfloat16.
  void load_statistics(const Task& task, const BackwardHead<C>& head, Range rows) const {
    for (int64_t i = 0; i < kStep; i += 16) {
      const int n = static_cast<int>(max(0, min(16, rows.end - rows.begin - i)));
      store(task.shift + i, FloatVec::zero() - load_n(head.log2_lse + rows.begin + i, n));
      store(task.delta + i, load_n(head.delta + rows.begin + i, n));
    }
  }

  // Draws which elements of a cell are kept. 64 columns are drawn at a time: those of two cells, unless the first one
  // is invisible.
  void draw_dropout(const Task& task, const BackwardTile& tile, const Cell& cell, Range rows) const {
    const int64_t drawn = cell.block * kSteps + cell.step / 2;
    if (*task.drawn == drawn && cell.step % 2 == 1) return;
    *task.drawn = drawn;
    const uint64_t slice = static_cast<uint64_t>(tile.batch * p_.num_heads_q + tile.head);
    const uint64_t column = static_cast<uint64_t>(tile.columns.begin + cell.step / 2 * 64);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      task.keep[i - rows.begin] = dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(i), column);
    }
  }

  // The rows of a pair lie 16 apart, as pack_tiles pairs them. With kRare: dropout, softcap, or dS is to be kept.
  template <bool kMasked, bool kRare, typename Make>
  void make_pairs(const Task& task, const Cell& cell, float* s, const float* dp, Background<Make>& next) const {
    for (int64_t i = 0; i < 16; ++i) {
      __m512i p[2], x[2];
      softmax_row<kMasked, kRare>(task, cell, s, dp, i, &p[0], &x[0]);
      softmax_row<kMasked, kRare>(task, cell, s, dp, i + 16, &p[1], &x[1]);
      const int64_t to = cell.at() + i * 64;
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
  void softmax_row(const Task& task, const Cell& cell, const float* s, const float* dp, int64_t row, __m512i* p,
                   __m512i* x) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_), zero = FloatVec::zero();
    const FloatVec shift = FloatVec::set1(task.shift[row]), delta = FloatVec::set1(task.delta[row]);
    FloatVec weights[2], dscores[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row * kStep + half * 16;
      const FloatVec score = load(s + at);
      // Beside a huge shift the score must be rounded as the shift was.
      const FloatVec power = kRare ? multiply_rounded(score, to_log2) + shift : fma(score, to_log2, shift);
      FloatVec weight = exp2(power), dweight = load(dp + at);
      FloatVec dropped = weight;
      if (kRare && p_.dropout.threshold != 0) {
        const __mmask16 kept = static_cast<__mmask16>(task.keep[row] >> (cell.step % 2 * 32 + half * 16));
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
        if (keeps_ds_) store(task.ds + cell.ds_at() + row * kKeys + half * 16, dscore);
        // The slope of an invisible score may be NaN.
        if (p_.softcap != 0) dscore = select(eq(dscore, zero), zero, dscore * load(task.slope + at));
      }
      weights[half] = dropped;
      dscores[half] = dscore;
    }
    *p = merge_bfloat16(weights[0], weights[1]);
    *x = merge_bfloat16(dscores[0], dscores[1]);
  }

  // sum [m_steps, kSteps, kStep, kStep] += left * pairs, from step `first` of its keys on; = where the sum is fresh.
  static void add_transposed(const Task& task, Products& products, const char* left, int64_t m_steps, const char* pairs,
                             int64_t first, float* sum) {
    for (int64_t m = 0; m < m_steps; ++m) {
      for (int64_t j = 0; j < kSteps - first; ++j) {
        const Range blocks = task.blocks_of[j];
        if (blocks.begin >= blocks.end) continue;
        products.run({left + (blocks.begin * m_steps + m) * kStepBytes, 64, m_steps * kStepBytes,
                      pairs + (blocks.begin * kSteps + j) * kStepBytes, kTileBytes, kSteps * kStepBytes,
                      sum + (m * kSteps + first + j) * kStep * kStep, kStep * 4, blocks.end - blocks.begin,
                      !task.fresh[first + j]});
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
        float* at_sum = sum + (first_step(tile) + column / kStep) * kStep * kStep + column % kStep;
        for (int64_t d = 0; d < dim; ++d) {
          if (!is_finite(row[d]))
            at_sum[d / kStep * kKeys * kStep + d % kStep * kStep] += to_float(factor) * to_float(row[d]);
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

  // Transposes a finished sum and rounds it to its dtype.
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
          write_transposed(row, dim - d, sum + d * kKeys + step * kStep * kStep + column % kStep, kStep, scale);
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
  return args.problem.q.dtype == DType::kBFloat16 && args.problem.seq_len_q >= kMinRows &&
         args.problem.seq_len_k >= kMinKeys;
}

void attention_backward(const AttentionBackwardArgs& args) { Backward<AmxTiles>(args).run(); }

}  // namespace fastattn::FASTATTN_ISA
