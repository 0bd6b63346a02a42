// Attention backward on AMX: attention_backward_tasks.h's course, with all five products on tiles.
//
// As operands of products P and dS are rounded to bfloat16 where that is the dtype, as PyTorch rounds them; float32 and
// float16 are sums of bfloat16 throughout (amx_pieces.h). Everything else is float32: the scores, dS itself, the sums.
// What multiplies from the right must stand in pairs of depths, and what multiplies from the left in rows. So that
// nothing of size seq x seq is ever transposed, dV and dK are summed up transposed:
//
//   S = Q K^T, dP = dO V^T, dQ = dS K: queries from the left, and all keys packed once a task;
//   dV^T = dO^T P, dK^T = Q^T dS: dO^T and Q^T packed once a head, P and dS paired as they leave the registers.
//
// Longer than 400 lines because a tile's five products, its softmax and what is not finite share one working memory.
#include "attention_amx.h"
#include "attention_backward.h"
#include "attention_backward_tasks.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <typename T>
class AmxTiles {
  static constexpr int kPieces = kPiecesOf<T>;
  static constexpr bool kCut = kPieces > 1;
  // Queries a block, which are the depths of dV and dK for each load and store of their sums, and keys a tile: what is
  // packed of either stays in the second-level cache.
  static constexpr int64_t kMaxRows = kCut ? 64 : 256, kKeys = kCut ? 64 : 256;
  static constexpr int64_t kStepBytes = kPieces * kPieceBytes;                  // of an operand: 32 x 32 elements
  static constexpr int64_t kSteps = kKeys / kStep, kBlocks = kMaxRows / kStep;  // cells of a tile, see Cell
  // Cells of a block of queries whose P and dS are made together. In float32 all of them, see weigh().
  static constexpr bool kWholeRows = kPieces == 3;
  static constexpr int64_t kGroup = kWholeRows ? kSteps : 1;
  // The forward's: the scores must be the very same.
  static constexpr ScoreUnit kUnit = kPieces == 3 ? ScoreUnit::kLog2 : ScoreUnit::kRaw;

 public:
  using C = float;

  explicit AmxTiles(const AttentionBackwardArgs& args)
      : args_(args), p_(args.problem), scores_(p_, kUnit), to_log2_(scores_.to_log2()) {
    const int64_t blocks = ceil_div(p_.seq_len_q, kMaxRows);
    rows_ = round_up(ceil_div(p_.seq_len_q, blocks), kStep);  // blocks of equal size
    grid_ = {rows_, kKeys, ceil_div(p_.seq_len_q, rows_), ceil_div(p_.seq_len_k, kKeys)};
    dim_steps_ = ceil_div(p_.head_dim, kStep);
    value_steps_ = ceil_div(p_.head_dim_v, kStep);
    wants_ds_ = wants_ds(args);
    keeps_ds_ = args.dbias.data != nullptr || args.drelative.data != nullptr;
  }

  struct Task {
    char *k_t, *v_t;       // K^T and V^T in pairs
    char* k;               // K in pairs
    char* k_finite;        // [kSteps]: of 32 keys; elements that are not are packed as 0
    bool* fresh;           // [kSteps]: nothing has been added yet to the sums of 32 keys
    float *dk, *dv;        // dK^T [dim_steps, kSteps, kStep, kStep] and dV^T, their columns in the order of key_of()
    float *s[2], *dp[2];   // of two groups of cells, one being multiplied while the other becomes P and dS
    float* slope;          // of a group: of the softcap
    float *shift, *delta;  // [kStep]
    float *factor, *dlse;  // [kStep]
    float* rest;           // [kStep, 16]: see weigh()
    uint64_t* keep;        // [kSteps / 2, kStep]: dropout's bits of 64 columns
    int64_t* drawn;        // [kSteps / 2]: of which block of queries
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
      const int64_t height = min(kStep, rows.end - i);
      const T* q = row_of<const T>(p_.q, batch, head_q, i);
      const T* dout = row_of<const T>(args_.dout, batch, head_q, i);
      if constexpr (kCut) {
        constexpr Cutting kCutting = kPieces == 3 ? Cutting::kRounded : Cutting::kTruncated;
        if constexpr (kPieces == 3) {
          float* scaled = reinterpret_cast<float*>(packed.q_t);  // on their way to pieces
          scores_.load_queries(scaled, batch, head_q, {i, i + height});
          note(pack_pieces<3, kCutting, false, false>(packed.q, 0, scaled, p_.head_dim, height, p_.head_dim), kScaledQ);
        } else {
          note(pack_pieces<2, kCutting, false, false>(packed.q, 0, q, p_.q.stride[2], height, p_.head_dim), kScaledQ);
        }
        note(pack_pieces<kPieces, kCutting, true, true>(packed.q_t, kStepBytes, q, p_.q.stride[2], height, p_.head_dim),
             kQ);
        pack_pieces<kPieces, kCutting, false, false>(packed.dout, 0, dout, args_.dout.stride[2], height, p_.head_dim_v);
        note(pack_pieces<kPieces, kCutting, true, true>(packed.dout_t, kStepBytes, dout, args_.dout.stride[2], height,
                                                        p_.head_dim_v),
             kDout);
      } else {
        pack_rows(packed.q, q, p_.q.stride[2], height, p_.head_dim);
        pack_rows(packed.dout, dout, args_.dout.stride[2], height, p_.head_dim_v);
        packed.finite[0] = pack_tiles(packed.q_t, q, p_.q.stride[2], height, p_.head_dim);
        packed.finite[1] = pack_tiles(packed.dout_t, dout, args_.dout.stride[2], height, p_.head_dim_v);
        transpose_tiles(packed.q_t, 2 * dim_steps_);
        transpose_tiles(packed.dout_t, 2 * value_steps_);
      }
    }
  }

  int64_t task_bytes() const {
    const int64_t steps = dim_steps_ + value_steps_;
    return kSteps * (dim_steps_ + steps) * kStepBytes + 2 * 64 + steps * kStep * kKeys * 4 +
           (5 * kGroup * kStep + 4 + 16) * kStep * 4 + kSteps / 2 * (kStep + 1) * 8 + 5 * 64 +
           (kSteps + kBlocks) * sizeof(Range) + (keeps_ds_ ? rows_ * kKeys * 4 : 0) + 3 * rows_ * kKeys * 2 * kPieces;
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
    for (float*& cells : task.s) cells = carver.take<float>(kGroup * kCell);
    for (float*& cells : task.dp) cells = carver.take<float>(kGroup * kCell);
    task.slope = carver.take<float>(kGroup * kCell);
    task.shift = carver.take<float>(kStep);
    task.delta = carver.take<float>(kStep);
    task.factor = carver.take<float>(kStep);
    task.dlse = carver.take<float>(kStep);
    task.rest = carver.take<float>(kStep * 16);
    task.keep = carver.take<uint64_t>(kSteps / 2 * kStep);
    task.drawn = carver.take<int64_t>(kSteps / 2);
    task.blocks_of = carver.take<Range>(kSteps);
    task.steps_of = carver.take<Range>(kBlocks);
    task.ds = carver.take<float>(keeps_ds_ ? rows_ * kKeys : 0);
    task.p_pairs = carver.take<char>(rows_ * kKeys * 2 * kPieces);
    task.ds_pairs = carver.take<char>(rows_ * kKeys * 2 * kPieces);
    task.ds_rows = carver.take<char>(rows_ * kKeys * 2 * kPieces);
    return task;
  }

  void begin(const Task& task, int64_t batch, int64_t head, Range keys) const {
    for (int64_t step = 0; step < kSteps; ++step) task.fresh[step] = true;
    for (int64_t key = keys.begin; key < keys.end; key += kStep) {
      const int64_t step = (key - keys.begin) / kStep, count = keys.end - key;
      const T* k = row_of<const T>(p_.k, batch, head, key);
      const T* v = row_of<const T>(p_.v, batch, head, key);
      char* k_t = task.k_t + step * dim_steps_ * kStepBytes;
      char* v_t = task.v_t + step * value_steps_ * kStepBytes;
      char* k_rows = task.k + step * dim_steps_ * kStepBytes;
      if constexpr (kCut) {
        constexpr Cutting kCutting = kPieces == 3 ? Cutting::kRounded : Cutting::kTruncated;
        const int64_t n = min(kStep, count);
        pack_pieces<kPieces, Cutting::kTruncated, false, true>(k_t, 0, k, p_.k.stride[2], n, p_.head_dim);
        const Seen of_v =
            pack_pieces<kPieces, Cutting::kTruncated, false, true>(v_t, 0, v, p_.v.stride[2], n, p_.head_dim_v);
        const float largest = of_v.magnitude();
        if (!(largest <= kVeryLarge) || is_very_small(largest)) give_up();
        note(of_v, kV);
        note(pack_pieces<kPieces, kCutting, true, false>(k_rows, kStepBytes, k, p_.k.stride[2], n, p_.head_dim), kK);
      } else {
        for (int64_t half = 0; half < kStep; half += 16) {
          pack_transposed_tiles(k_t + half / 16 * dim_steps_ * kTileBytes, k + half * p_.k.stride[2], p_.k.stride[2],
                                count - half, p_.head_dim);
          pack_transposed_tiles(v_t + half / 16 * value_steps_ * kTileBytes, v + half * p_.v.stride[2], p_.v.stride[2],
                                count - half, p_.head_dim_v);
        }
        task.k_finite[step] = pack_tiles(k_rows, k, p_.k.stride[2], count, p_.head_dim);
      }
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
    for (int64_t i = 0; i < kSteps / 2; ++i) task.drawn[i] = -1;
    TileScope tiles;
    TileProducts<kPieces> products;
    // S and dP of a group are multiplied while the softmax of the one before it runs.
    const int64_t products_a_cell = wants_ds_ ? 2 : 1;
    const auto multiply = [&](int64_t begin, int turn) {
      return [&, begin, turn](int64_t index) {
        const Cell& cell = cells[begin + index / products_a_cell];
        const int64_t which = index % products_a_cell;
        const int64_t steps = which == 0 ? dim_steps_ : value_steps_, key = first + cell.step;
        Product product{};
        product.a = (which == 0 ? packed.q : packed.dout) + cell.block * steps * kStepBytes;
        product.a_row = 64;
        product.a_step = kStepBytes;
        product.b = (which == 0 ? task.k_t : task.v_t) + key * steps * kStepBytes;
        product.b_right = kCut ? kTileBytes : steps * kTileBytes;
        product.b_step = kCut ? kStepBytes : kTileBytes;
        // Not (which == 0 ? task.s : task.dp)[turn]: there GCC 12's UndefinedBehaviorSanitizer loses the index.
        float* const* to = which == 0 ? task.s : task.dp;
        product.c = to[turn] + index / products_a_cell * kCell;
        product.c_row = kStep * 4;
        product.steps = steps;
        product.whole = which == 0;  // as in the forward
        return product;
      };
    };
    const auto group_end = [&](int64_t begin) {
      int64_t end = min(begin + 1, count);
      while (end < min(begin + kGroup, count) && cells[end].block == cells[begin].block) ++end;
      return end;
    };
    int64_t begin = 0, end = group_end(0);
    const auto make_first = multiply(0, 0);
    Background<kPieces, decltype(make_first)>(products, end * products_a_cell, make_first).finish();
    for (int turn = 0; begin < count; turn ^= 1) {
      const int64_t next_end = group_end(end), rows_of_work = (end - begin) * (kWholeRows ? 2 : 1) * 16;
      if (begin == 0 || cells[begin].block != cells[begin - 1].block) {
        load_statistics(task, head, tile, mask, rows_of(tile, cells[begin].block));
      }
      const auto make_next = multiply(end, turn ^ 1);
      Background<kPieces, decltype(make_next)> background(products, (next_end - end) * products_a_cell, make_next);
      const int64_t units = products.units(true) * dim_steps_ + (wants_ds_ ? products.units(false) * value_steps_ : 0);
      const int64_t rate = ceil_div((next_end - end) * units, rows_of_work);
      for (int64_t i = begin; i < end; ++i) {
        const Place place = place_of(task, turn, i - begin);
        prepare_scores(task, tile, cells[i], place, mask);
        if constexpr (kWholeRows) weigh(task, cells[i], place, background, rate);
      }
      if (kWholeRows) reduce_rest(task);
      for (int64_t i = begin; i < end; ++i) {
        softmax_backward(task, cells[i], place_of(task, turn, i - begin), background, rate);
      }
      background.finish();
      begin = end;
      end = next_end;
    }
    if (args_.dv.data != nullptr)
      add_transposed(task, products, packed.dout_t, value_steps_, task.p_pairs, first, task.dv);
    if (args_.dk.data != nullptr) add_transposed(task, products, packed.q_t, dim_steps_, task.ds_pairs, first, task.dk);
    products.flush();
    for (int64_t j = 0; j < kSteps - first; ++j) {
      if (task.blocks_of[j].begin < task.blocks_of[j].end) task.fresh[first + j] = false;
    }
    if constexpr (!kCut) {
      for (int64_t i = 0; i < ceil_div(tile.height(), kStep); ++i) {
        if (!packed.finite[i * 64] && args_.dk.data != nullptr) {
          add_not_finite_rows(task.ds_pairs, i, p_.q, p_.head_dim, tile, mask, task.dk);
        }
        if (!packed.finite[i * 64 + 1] && args_.dv.data != nullptr) {
          add_not_finite_rows(task.p_pairs, i, args_.dout, p_.head_dim_v, tile, mask, task.dv);
        }
      }
    }
  }

  void add_dq(const Task& task, const BackwardTile& tile, const Mask& mask, C* dq, bool fresh) const {
    const int64_t first = first_step(tile);
    TileScope tiles;
    TileProducts<kPieces> products;
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
    if constexpr (!kCut) {
      for (int64_t step = 0; step < ceil_div(tile.width(), kStep); ++step) {
        if (!task.k_finite[first + step]) add_not_finite_keys(task, step, tile, mask, dq);
      }
    }
  }

  // Whether all could be cut into pieces; if not, the results are void.
  bool fits() const {
    if (!kCut) return true;
    const auto largest = [&](What what) { return static_cast<double>(bit_cast<float>(largest_[what])); };
    const double dout = largest(kDout), dp = dout * largest(kV);
    return fits_ && largest(kQ) <= kVeryLarge && largest(kK) <= kVeryLarge && dout <= kVeryLarge &&
           scores_fit(p_, largest_[kScaledQ], largest_[kK], kUnit == ScoreUnit::kRaw) &&
           (dout == 0 || dout >= kVerySmallOutput) && (dp == 0 || dp >= kVerySmallOutput);
  }

 private:
  // What the largest elements of are kept.
  enum What { kScaledQ, kQ, kK, kV, kDout };
  void give_up() const { __atomic_store_n(&fits_, false, __ATOMIC_RELAXED); }
  void note(const Seen& seen, What what) const { keep_largest(seen, &largest_[what]); }

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

  static constexpr int64_t kCell = kStep * kStep;  // elements

  // Where a cell of a group is worked on.
  struct Place {
    float *s, *dp, *slope;  // slope: null without softcap
  };
  Place place_of(const Task& task, int turn, int64_t index) const {
    const int64_t at = index * kCell;
    return {task.s[turn] + at, task.dp[turn] + at, p_.softcap != 0 ? task.slope + at : nullptr};
  }

  // Turns raw products into scores; what does not exist is hidden.
  void prepare_scores(const Task& task, const BackwardTile& tile, const Cell& cell, const Place& place,
                      const Mask& mask) const {
    const Range rows = rows_of(tile, cell.block), columns = columns_of(tile, cell.step);
    const int64_t height = rows.end - rows.begin, width = columns.end - columns.begin;
    // Of the block whose turn is next: a cell's rows of bias lie a whole row of keys apart, where no processor guesses.
    if (rows.begin >= rows_) {
      scores_.fetch_bias(tile.batch, tile.head, {rows.begin - rows_, rows.end - rows_}, columns);
    }
    scores_.finish(place.s, kStep, tile.batch, tile.head, rows, columns, cell.masked, mask, place.slope);
    if (height < kStep || width < kStep) {
      const FloatVec hidden = FloatVec::set1(-kInfinity);
      for (int64_t i = 0; i < kStep; ++i) {
        const __mmask32 exists = i < height ? first_lanes32(width) : 0;
        float* row = place.s + i * kStep;
        store(row, select(static_cast<__mmask16>(exists), load(row), hidden));
        store(row + 16, select(static_cast<__mmask16>(exists >> 16), load(row + 16), hidden));
      }
    }
    if (p_.dropout.threshold != 0) draw_dropout(task, tile, cell, rows);
  }

  // Makes P and dS of a cell out of its scores and dP, in step with the products in the background.
  template <typename Background>
  void softmax_backward(const Task& task, const Cell& cell, const Place& place, Background& next, int64_t rate) const {
    if (p_.dropout.threshold != 0 || p_.softcap != 0 || keeps_ds_ || (!kWholeRows && has_huge_shift(task))) {
      make_pairs<true, true>(task, cell, place, next, rate);
    } else if (cell.masked) {
      make_pairs<true, false>(task, cell, place, next, rate);
    } else {
      make_pairs<false, false>(task, cell, place, next, rate);
    }
  }

  static bool has_huge_shift(const Task& task) {
    const FloatVec limit = FloatVec::set1(kHugeShift);
    return (lt(limit, abs(load(task.shift))) | lt(limit, abs(load(task.shift + 16)))) != 0;
  }

  // What the softmax of a cell needs of its rows: lse, negated, and deltas. A float32 lse is exact enough where P is
  // rounded to bfloat16 or float16; where it is not, shift, factor and what a row's delta is to be mended by.
  void load_statistics(const Task& task, const BackwardHead<C>& head, const BackwardTile& tile, const Mask& mask,
                       Range rows) const {
    for (int64_t i = 0; i < kStep; i += 16) {
      const int n = static_cast<int>(max(0, min(16, rows.end - rows.begin - i)));
      const FloatVec delta = load_n(head.delta + rows.begin + i, n), dlse = load_n(head.dlse + rows.begin + i, n);
      if (kWholeRows) {
        store(task.shift + i, load_n(head.shift + rows.begin + i, n));
        store(task.factor + i, load_n(head.factor + rows.begin + i, n));
        store(task.delta + i, delta + dlse);
        store(task.dlse + i, dlse);
      } else {
        store(task.shift + i, FloatVec::zero() - load_n(head.log2_lse + rows.begin + i, n));
        store(task.delta + i, delta);
      }
    }
    for (int64_t i = 0; kWholeRows && i < kStep; ++i) {
      // A sum that begins with NaN is not wanted.
      const Range seen = mask.k_range(min(rows.begin + i, rows.end - 1), min(rows.begin + i, rows.end - 1) + 1);
      const bool alone = p_.sinks.data == nullptr && tile.columns.begin <= seen.begin && seen.end <= tile.columns.end;
      store(task.rest + i * 16, FloatVec::set1(alone ? 0.0f : __builtin_nanf("")));
    }
  }

  // Draws which elements of a cell are kept. 64 columns are drawn at a time: those of two cells, unless the first one
  // is invisible.
  void draw_dropout(const Task& task, const BackwardTile& tile, const Cell& cell, Range rows) const {
    const int64_t pair = cell.step / 2;
    if (task.drawn[pair] == cell.block) return;
    task.drawn[pair] = cell.block;
    const uint64_t slice = static_cast<uint64_t>(tile.batch * p_.num_heads_q + tile.head);
    const uint64_t column = static_cast<uint64_t>(tile.columns.begin + pair * 64);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      task.keep[pair * kStep + i - rows.begin] = dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(i), column);
    }
  }
  static __mmask16 kept(const Task& task, const Cell& cell, int64_t row, int half) {
    return static_cast<__mmask16>(task.keep[cell.step / 2 * kStep + row] >> (cell.step % 2 * 32 + half * 16));
  }

  // Turns scores and dP of a cell into P and dP - delta, in place, and adds P (dP - delta) to the rows' sums. A row all
  // of whose keys are in the tile mends its delta by that sum: where few keys share the weight, dP - delta cancels, and
  // it must be the rounded dP that do. An invisible P becomes -1, to be known again.
  template <typename Background>
  void weigh(const Task& task, const Cell& cell, const Place& place, Background& next, int64_t rate) const {
    const FloatVec hidden = FloatVec::set1(-kInfinity), zero = FloatVec::zero();
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale));
    for (int64_t row = 0; row < kStep; ++row) {
      const FloatVec shift = FloatVec::set1(task.shift[row]), factor = FloatVec::set1(task.factor[row]);
      const FloatVec delta = FloatVec::set1(task.delta[row]);
      FloatVec sum = load(task.rest + row * 16);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float *s = place.s + row * kStep + half * 16, *dp = place.dp + row * kStep + half * 16;
        const FloatVec score = load(s);
        FloatVec weight = probability(score, shift, factor), dweight = load(dp);
        if (p_.dropout.threshold != 0) dweight = select(kept(task, cell, row, half), dweight * rescale, zero);
        dweight = dweight - delta;
        if (cell.masked) {
          const __mmask16 invisible = eq(score, hidden);
          weight = select(invisible, FloatVec::set1(-1.0f), weight);
          dweight = select(invisible, zero, dweight);
        }
        sum = fma(weight, dweight, sum);
        store(s, weight);
        store(dp, dweight);
      }
      store(task.rest + row * 16, sum);
      if (row % 2 == 1) {
        for (int64_t n = 0; n < rate; ++n) next.advance();
      }
    }
  }

  // Leaves in task.rest [kStep] what a row's dP - delta is mended by.
  static void reduce_rest(const Task& task) {
    for (int64_t half = 0; half < kStep; half += 16) {
      FloatVec lanes[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) lanes[i] = load(task.rest + (half + i) * 16);
      const FloatVec sum = reduce_each(lanes, [](FloatVec a, FloatVec b) { return a + b; });
      const FloatVec mended = load(task.dlse + half) - select(eq(sum, sum), sum, FloatVec::zero());
      store(task.dlse + half, mended);
    }
  }

  // The rows of a pair lie 16 apart, as pack_tiles pairs them. With kRare: dropout, softcap, or dS is to be kept.
  template <bool kMasked, bool kRare, typename Background>
  void make_pairs(const Task& task, const Cell& cell, const Place& place, Background& next, int64_t rate) const {
    for (int64_t i = 0; i < 16; ++i) {
      Row rows[2];
      softmax_row<kMasked, kRare>(task, cell, place, i, &rows[0]);
      softmax_row<kMasked, kRare>(task, cell, place, i + 16, &rows[1]);
#pragma GCC unroll 3
      for (int piece = 0; piece < kPieces; ++piece) {
        const __m512i *p0 = &rows[0].p[piece], *p1 = &rows[1].p[piece];
        const __m512i *x0 = &rows[0].x[piece], *x1 = &rows[1].x[piece];
        const int64_t to = cell.at() + piece * kPieceBytes + i * 64;
        _mm512_storeu_si512(task.ds_rows + to, *x0);
        _mm512_storeu_si512(task.ds_rows + to + kTileBytes, *x1);
        _mm512_storeu_si512(task.ds_pairs + to, _mm512_unpacklo_epi16(*x0, *x1));
        _mm512_storeu_si512(task.ds_pairs + to + kTileBytes, _mm512_unpackhi_epi16(*x0, *x1));
        _mm512_storeu_si512(task.p_pairs + to, _mm512_unpacklo_epi16(*p0, *p1));
        _mm512_storeu_si512(task.p_pairs + to + kTileBytes, _mm512_unpackhi_epi16(*p0, *p1));
      }
      for (int64_t n = 0; n < rate; ++n) next.advance();
    }
  }

  // A row of a cell of P (dropped) and dS, in pieces.
  struct Row {
    __m512i p[kPieces], x[kPieces];
  };
  [[gnu::always_inline]] static void cut_row(const FloatVec (&halves)[2], __m512i* to) {
    if constexpr (kPieces == 1) {
      to[0] = merge_bfloat16(halves[0], halves[1]);
    } else {
      constexpr Cutting kCutting = kPieces == 2 ? Cutting::kRounded : Cutting::kTruncated;
      const Cut<kPieces> low = cut<kPieces, kCutting>(halves[0]), high = cut<kPieces, kCutting>(halves[1]);
#pragma GCC unroll 3
      for (int piece = 0; piece < kPieces; ++piece) to[piece] = merge_upper(low.piece[piece], high.piece[piece]);
    }
  }

  // Makes a row; the survivors' rescaling is left to the end in dV.
  template <bool kMasked, bool kRare>
  [[gnu::always_inline]] void softmax_row(const Task& task, const Cell& cell, const Place& place, int64_t row,
                                          Row* to) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_), zero = FloatVec::zero();
    const FloatVec shift = FloatVec::set1(task.shift[row]), delta = FloatVec::set1(task.delta[row]);
    FloatVec weights[2], dscores[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row * kStep + half * 16;
      const FloatVec score = load(place.s + at);
      FloatVec weight, dweight = load(place.dp + at), dscore;
      __mmask16 invisible;
      if constexpr (kWholeRows) {
        weight = score;
        dscore = weight * (dweight + FloatVec::set1(task.dlse[row]));
        invisible = lt(weight, zero);
      } else {
        // Beside a huge shift the score must be rounded as the shift was.
        const FloatVec power = kRare ? multiply_rounded(score, to_log2) + shift : fma(score, to_log2, shift);
        weight = exp2(power);
        if (kRare && p_.dropout.threshold != 0) {
          dweight = select(kept(task, cell, row, half),
                           dweight * FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero);
        }
        dscore = weight * (dweight - delta);
        invisible = eq(score, FloatVec::set1(-kInfinity));
      }
      FloatVec dropped = weight;
      if (kRare && p_.dropout.threshold != 0) dropped = select(kept(task, cell, row, half), weight, zero);
      if (kMasked) {
        // An invisible value may be NaN, and so may lse, by a key that this one shares its query with.
        dropped = select(invisible, zero, dropped);
        dscore = select(invisible, zero, dscore);
      }
      if (kRare) {
        if (keeps_ds_) store(task.ds + cell.ds_at() + row * kKeys + half * 16, dscore);
        // The slope of an invisible score may be NaN.
        if (p_.softcap != 0) dscore = select(eq(dscore, zero), zero, dscore * load(place.slope + at));
      }
      weights[half] = dropped;
      dscores[half] = dscore;
    }
    cut_row(weights, to->p);
    cut_row(dscores, to->x);
  }

  // sum [m_steps, kSteps, kStep, kStep] += left * pairs, from step `first` of its keys on; = where the sum is fresh.
  static void add_transposed(const Task& task, TileProducts<kPieces>& products, const char* left, int64_t m_steps,
                             const char* pairs, int64_t first, float* sum) {
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

  // With one piece alone: adds to dK^T or dV^T what was packed as 0 of kStep queries or rows of dout: 0 * NaN is NaN,
  // so only those who see such an element may be touched by it.
  static void add_not_finite_rows(const char* pairs, int64_t block, const View& view, int64_t dim,
                                  const BackwardTile& tile, const Mask& mask, float* sum) {
    const int64_t begin = tile.rows.begin + block * kStep;
    for (int64_t i = begin; i < min(begin + kStep, tile.rows.end); ++i) {
      const T* row = row_of<const T>(view, tile.batch, tile.head, i);
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
      const T* k =
          row_of<const T>(p_.k, tile.batch, tile.head / (p_.num_heads_q / p_.num_heads_kv), tile.columns.begin + j);
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
      const auto row = [&](int64_t i) {
        const int64_t key = begin + key_of(column % kStep + i);
        return key < keys.end ? row_of<T>(view, batch, head, key) : nullptr;
      };
      if (task.fresh[step]) {
        for (int64_t i = 0; i < 16; ++i) {
          T* to = row(i);
          for (int64_t d = 0; to != nullptr && d < dim; d += 16) {
            store_n(to + d, FloatVec::zero(), static_cast<int>(min(16, dim - d)));
          }
        }
        continue;
      }
      for (int64_t d = 0; d < dim; d += kStep) {
        const float* from = sum + d * kKeys + step * kCell + column % kStep;
        if constexpr (kPieces == 1) {
          write_transposed([&](int64_t i) { return row(i) == nullptr ? nullptr : row(i) + d; }, dim - d, from, kStep,
                           scale);
        } else {
          for (int64_t part = 0; part < min(kStep, dim - d); part += 16) {
            FloatVec block[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) block[i] = load(from + (part + i) * kStep) * scale;
            transpose<float>(block);
            const int n = static_cast<int>(min(16, dim - d - part));
            for (int i = 0; i < 16; ++i) {
              T* to = row(i);
              if (to != nullptr) store_n(to + d + part, block[i], n);
            }
          }
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
  int64_t rows_, dim_steps_, value_steps_;
  bool wants_ds_, keeps_ds_;
  mutable bool fits_ = true;
  mutable uint32_t largest_[5] = {};  // bits of floats
};

}  // namespace

bool attention_backward_takes(const AttentionBackwardArgs& args) {
  return amx_takes(args.problem) && args.problem.seq_len_k >= kMinKeys;
}

void attention_backward(const AttentionBackwardArgs& args) {
  bool done = true;
  visit(args.problem.q.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      Backward<AmxTiles<T>> backward(args);
      backward.run();
      done = backward.tiles().fits();
    }
  });
  if (!done) avx512::attention_backward(args);
}

}  // namespace fastattn::FASTATTN_ISA
