// Attention forward on AMX: attention_forward.cpp's algorithm, with both products on tiles.
//
// Keys and values of a group are packed once as AMX wants its right-hand side: bfloat16 as it is, float32 and float16
// as sums of three and two bfloat16 (amx_pieces.h). Probabilities are cut like the values: in bfloat16 they are rounded
// for the product with the values, as eager PyTorch rounds them. Everything else is float32: the scores, the row sums,
// the output. The running maximum moves only when it grows by more than kSlack: until then a probability may exceed 1,
// which costs nothing, and the output needs no rescaling.
//
// Tiles and vectors have units of their own: while the softmax of a tile of keys runs, the probabilities of the tile
// before it meet their values, and the scores of the tile after it are summed up.
//
// Longer than 400 lines because the two products and the softmax that hides them share one working memory.
#include <type_traits>

#include "attention_amx.h"
#include "attention_forward.h"
#include "attention_mean.h"
#include "attention_schedule.h"
#include "attention_scores.h"
#include "mask.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRows = kStep;   // queries a block
constexpr int64_t kKeys = 64;      // keys a tile: all that a tile touches stays in the first-level cache
constexpr int64_t kMaxBlocks = 4;  // that meet a tile of keys one after the other, where ...
constexpr int64_t kCachedBytes = int64_t{3} << 19;  // ... keys and values do not stay in the second-level cache
// Of probabilities, for the mean weights, whose keys and values come from the third-level cache. At 2048 keys, in ms:
// bfloat16 with one block at a time, 8 heads added up together, 11.8, with 3 blocks and each head by itself 13.2;
// float32, whose keys and values are three times as large, 34.5 and 28.2.
constexpr int64_t kKeptBytes = int64_t{2} << 20;
constexpr float kSlack = 8.0f;  // in powers of two
constexpr float kInfinity = __builtin_inff();

using Whole = std::integral_constant<int64_t, kKeys / kStep>;  // the steps of a whole tile, for the compiler to see

// Probabilities of a tile as they are multiplied: [kKeys / kStep, pieces, kRows, kStep].
template <int kPieces>
struct KeptPieces {
  static constexpr int kVecs = 2;
  static void read(const char* tile, int64_t i, int64_t j, FloatVec (&x)[2]) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const char* from = tile + j / kStep * kPieces * kPieceBytes + i * 64;
#pragma GCC unroll 3
    for (int piece = 0; piece < kPieces; ++piece) {
      const __m512i pairs = _mm512_loadu_si512(from + piece * kPieceBytes);
      const FloatVec low{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
      const FloatVec high{_mm512_castsi512_ps(_mm512_and_si512(pairs, upper))};
      x[0] = piece == 0 ? low : x[0] + low;
      x[1] = piece == 0 ? high : x[1] + high;
    }
  }
};

template <typename T>
class ForwardAmx {
 public:
  explicit ForwardAmx(const AttentionForwardArgs& args)
      : args_(args),
        p_(args.problem),
        scores_(p_, kUnit),
        to_log2_(scores_.to_log2()),
        mean_(args, kRows, kKeys, kKeys / kStep * kStepBytes, kCut ? 0 : kKeptBytes / 2) {
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    dim_steps_ = ceil_div(p_.head_dim, kStep);
    value_steps_ = ceil_div(p_.head_dim_v, kStep);
    out_stride_ = value_steps_ * kStep;
    tiles_ = ceil_div(p_.seq_len_k, kKeys);
    const bool cached = !mean_.wanted() && packed_bytes() <= kCachedBytes;
    blocks_ = cached ? 1 : min(kMaxBlocks, ceil_div(p_.seq_len_q, kRows));
    if (mean_.wanted()) blocks_ = kCut ? max(1, min(blocks_, kKeptBytes / mean_.bytes())) : 1;
  }

  // Returns whether all could be cut into pieces; if not, the output is void.
  bool run() const {
    // For the mean weights a panel goes through all heads of its batch entry.
    const int64_t heads_kv = mean_.wanted() ? p_.num_heads_kv : 1, heads = mean_.wanted() ? 1 : group_size_;
    const GroupWork work{p_.batch * p_.num_heads_kv / heads_kv, heads_kv * tiles_, heads_kv * packed_bytes(),
                         heads * ceil_div(p_.seq_len_q, blocks_ * kRows), panel_bytes()};
    for_each_block(
        p_, work,
        [&](char* packed, int64_t group, int64_t task) {
          const int64_t head = task / tiles_;
          pack_tile(packed + head * packed_bytes(), group * heads_kv + head, task % tiles_);
        },
        [&](const char* packed, char* memory, int64_t group, int64_t index) {
          Panel panel = carve_panel(Carver(memory));
          const int64_t begin = index / heads * blocks_ * kRows;
          panel.count = min(blocks_, ceil_div(p_.seq_len_q - begin, kRows));
          if (mean_.wanted()) {
            run_all_heads(packed, panel, group, begin);
          } else {
            const int64_t head = group % p_.num_heads_kv * group_size_ + index % group_size_;
            run_panel(packed, panel, group / p_.num_heads_kv, head, begin);
          }
        });
    return !kCut || (fits_ && scores_fit(p_, largest_q_, largest_k_, kUnit == ScoreUnit::kRaw));
  }

  // Whether the mean weights, if they are wanted, are there too.
  bool has_mean() const { return mean_.regular(); }

 private:
  static constexpr int kPieces = kPiecesOf<T>;
  using Mean = MeanWeights<float, KeptPieces<kPieces>>;
  static constexpr bool kCut = kPieces > 1;
  // A bfloat16 or float16 query times the scale would have more bits than its pieces hold; a float32 has as many.
  static constexpr ScoreUnit kUnit = kPieces == 3 ? ScoreUnit::kLog2 : ScoreUnit::kRaw;
  static constexpr int64_t kStepBytes = kPieces * kPieceBytes;  // of an operand: 32 x 32 elements

  // The state of one block of queries.
  struct Block {
    char* q;        // [dim_steps, pieces, kRows, kStep]; with one piece only where the caller's rows will not do
    float* out;     // [kRows, out_stride]
    float* shift;   // [kRows]: what is subtracted from a row's scores, in powers of two
    float* factor;  // [kRows]
    float* sum;     // [kRows, 16]: running sum of the probabilities, lane by lane
    typename Mean::Block mean;
    const void* a;  // queries: q or the caller's
    int64_t a_row, a_step;
    Range rows, seen;
    int64_t batch, head;
    bool fresh;  // nothing has been added to the output yet
  };
  // Blocks that meet a tile of keys one after the other, while it is in the caches.
  struct Panel {
    Block blocks[kMaxBlocks];
    int64_t count;
    float* rows_q;  // [kRows, head_dim]: scaled queries on their way to pieces
    float* s[2];    // [kRows, kKeys]: scores of this tile, and of the next
    char* p[2];     // [kKeys / kStep, pieces, kRows, kStep]: probabilities of this tile, and of the one before
  };
  // A tile of keys that a block sees.
  struct Tile {
    Block* block;
    Range columns;
    bool masked;
    char* p;  // its probabilities
    int64_t steps() const { return ceil_div(columns.end - columns.begin, kStep); }
  };

  // Bytes of a packed tile of keys or values.
  int64_t packed_bytes() const { return round_up(tiles_ * (k_tile() + v_tile()) + tiles_ * kKeys / kStep, 64); }
  int64_t k_tile() const { return kKeys / kStep * dim_steps_ * kStepBytes; }
  int64_t v_tile() const { return kKeys / kStep * value_steps_ * kStepBytes; }
  const char* packed_k(const char* packed, int64_t key) const { return packed + key / kStep * dim_steps_ * kStepBytes; }
  const char* packed_v(const char* packed, int64_t key) const {
    return packed + tiles_ * k_tile() + key / kStep * value_steps_ * kStepBytes;
  }
  // Whether all values of 32 keys are finite; elements that are not are packed as 0. With one piece alone.
  const char* finite(const char* packed, int64_t key) const {
    return packed + tiles_ * (k_tile() + v_tile()) + key / kStep;
  }

  int64_t panel_bytes() const {
    const int64_t of_block = dim_steps_ * kStepBytes + kRows * (out_stride_ + 2 + 16) * 4 + 5 * 64;
    return 2 * kRows * kKeys * (2 * kPieces + 4) + kRows * p_.head_dim * 4 + 5 * 64 +
           blocks_ * (of_block + mean_.bytes());
  }
  Panel carve_panel(Carver carver) const {
    Panel panel;
    panel.rows_q = carver.take<float>(kRows * p_.head_dim);
    for (float*& s : panel.s) s = carver.take<float>(kRows * kKeys);
    for (char*& p : panel.p) p = carver.take<char>(kKeys / kStep * kStepBytes);
    for (int64_t i = 0; i < blocks_; ++i) {
      Block& block = panel.blocks[i];
      block.q = carver.take<char>(dim_steps_ * kStepBytes);
      block.out = carver.take<float>(kRows * out_stride_);
      block.shift = carver.take<float>(kRows);
      block.factor = carver.take<float>(kRows);
      block.sum = carver.take<float>(kRows * 16);
      block.mean = mean_.carve(&carver);
    }
    return panel;
  }

  // Packs what any query may see of a tile; what lies beyond (padding, another sequence) is never read.
  void pack_tile(char* packed, int64_t group, int64_t tile) const {
    const int64_t batch = group / p_.num_heads_kv, head = group % p_.num_heads_kv;
    const Range seen = Mask(p_, batch, head * group_size_).k_range(0, p_.seq_len_q);
    const int64_t begin = tile * kKeys, end = min(begin + kKeys, seen.end);
    if (begin + kKeys <= seen.begin) return;
    Seen of_k;
    bool fits = true;
    for (int64_t key = begin; key < end; key += kStep) {
      const T *k = row_of<const T>(p_.k, batch, head, key), *v = row_of<const T>(p_.v, batch, head, key);
      char *to_k = const_cast<char*>(packed_k(packed, key)), *to_v = const_cast<char*>(packed_v(packed, key));
      if constexpr (kCut) {
        const int64_t count = min(kStep, end - key);
        of_k.add(
            pack_pieces<kPieces, Cutting::kTruncated, false, true>(to_k, 0, k, p_.k.stride[2], count, p_.head_dim));
        constexpr Cutting kCutting = kPieces == 2 ? Cutting::kTruncated : Cutting::kRounded;
        const float largest =
            pack_pieces<kPieces, kCutting, true, false>(to_v, kStepBytes, v, p_.v.stride[2], count, p_.head_dim_v)
                .magnitude();
        fits &= largest <= kVeryLarge && !is_very_small(largest);
      } else {
        pack_transposed_tiles(to_k, k, p_.k.stride[2], end - key, p_.head_dim);
        pack_transposed_tiles(to_k + dim_steps_ * kTileBytes, k + 16 * p_.k.stride[2], p_.k.stride[2], end - key - 16,
                              p_.head_dim);
        *const_cast<char*>(finite(packed, key)) = pack_tiles(to_v, v, p_.v.stride[2], end - key, p_.head_dim_v);
      }
    }
    if (!fits) __atomic_store_n(&fits_, false, __ATOMIC_RELAXED);
    if (kCut) keep_largest(of_k, &largest_k_);
  }

  // Also writes the mean weights.
  void run_all_heads(const char* packed, const Panel& panel, int64_t batch, int64_t begin) const {
    for (int64_t head = 0; head < p_.num_heads_q; ++head) {
      run_panel(packed + head / group_size_ * packed_bytes(), panel, batch, head, begin);
    }
  }

  // The rows of a panel's block.
  Range rows_of(int64_t begin, int64_t block) const {
    return {begin + block * kRows, min(begin + (block + 1) * kRows, p_.seq_len_q)};
  }

  void run_panel(const char* packed, Panel panel, int64_t batch, int64_t head, int64_t begin) const {
    if (!__atomic_load_n(&fits_, __ATOMIC_RELAXED)) return;
    const Mask mask(p_, batch, head);
    Range seen{p_.seq_len_k, 0};
    for (Block* block = panel.blocks; block < panel.blocks + panel.count; ++block) {
      start(panel, block, batch, head, rows_of(begin, block - panel.blocks), mask);
      seen = {min(seen.begin, block->seen.begin), max(seen.end, block->seen.end)};
    }

    TileScope scope;
    TileProducts<kPieces> products;
    const auto multiply_k = [&](const Tile& t, float* s, int64_t j) {
      const int64_t right = kCut ? kTileBytes : dim_steps_ * kTileBytes, step = kCut ? kStepBytes : kTileBytes;
      const char* k = packed_k(packed, t.columns.begin) + j * dim_steps_ * kStepBytes;
      return Product{t.block->a,    t.block->a_row, t.block->a_step, k,     right, step,
                     s + j * kStep, kKeys * 4,      dim_steps_,      false, true};
    };
    const auto multiply_v = [&](const Tile& t, int64_t n) {
      const char* v = packed_v(packed, t.columns.begin) + n * kStepBytes;
      return Product{t.p,
                     64,
                     kStepBytes,
                     v,
                     kTileBytes,
                     value_steps_ * kStepBytes,
                     t.block->out + n * kStep,
                     out_stride_ * 4,
                     t.steps(),
                     !t.block->fresh};
    };
    Tile before{}, tile{}, next{};
    int64_t at = seen.begin / kKeys * panel.count;
    bool more = find_tile(&panel, mask, seen, &at, &tile);
    bool pending = false;  // the tile before has not met its values yet
    for (int64_t j = 0; more && j < tile.steps(); ++j) products.run(multiply_k(tile, panel.s[0], j));
    products.flush();
    for (int turn = 0; more; turn ^= 1) {
      Block& block = *tile.block;
      float* const s = panel.s[turn];
      char* const p = tile.p = mean_.wanted() ? mean_.kept(block.mean, head, tile.columns.begin) : panel.p[turn];
      more = find_tile(&panel, mask, seen, &at, &next);
      const int64_t of_v = pending ? value_steps_ : 0;
      const auto make = [&](int64_t i) {
        return i < of_v ? multiply_v(before, i) : multiply_k(next, panel.s[turn ^ 1], i - of_v);
      };
      Background<kPieces, decltype(make)> background(products, of_v + (more ? next.steps() : 0), make);
      const int64_t units = products.units(false) * (pending ? value_steps_ * before.steps() : 0) +
                            products.units(true) * (more ? next.steps() * dim_steps_ : 0);
      const int64_t width = tile.columns.end - tile.columns.begin, steps = tile.steps();
      scores_.finish(s, kKeys, batch, head, block.rows, tile.columns, tile.masked, mask);
      for (int64_t j = round_up(width, 16); j < steps * kStep; j += 16) hide(s + j);
      if (shift_rows(block, s, steps)) {
        if (pending && before.block == &block) {
          background.finish(of_v);
          block.fresh = false;
        }
        rescale(block);
      }
      if (mean_.wanted()) mean_.note(block.mean, head, tile.columns, block.shift);
      if (steps == kKeys / kStep) {
        exponentiate(block, s, p, Whole(), background, units);
      } else {
        exponentiate(block, s, p, steps, background, units);
      }
      background.finish();
      if (pending) before.block->fresh = false;
      if (p_.dropout.threshold != 0) drop(block, p, tile.columns.begin, steps);
      const bool alone = !kCut && !all_finite(packed, tile);
      if (alone || !more) {
        for (int64_t n = 0; n < value_steps_; ++n) products.run(multiply_v(tile, n));
        products.flush();
        block.fresh = false;
      }
      if constexpr (!kCut) {
        if (alone) add_not_finite(packed, tile, p, mask);
      }
      pending = !alone;
      before = tile;
      tile = next;
    }
    for (int64_t i = 0; i < panel.count; ++i) {
      const Block& block = panel.blocks[i];
      write(block);
      if (mean_.wanted()) mean_.end_head(block.mean, batch, head, block.rows, block.shift, block.factor);
    }
  }

  void start(const Panel& panel, Block* block, int64_t batch, int64_t head, Range rows, const Mask& mask) const {
    block->batch = batch;
    block->head = head;
    block->rows = rows;
    block->seen = mask.k_range(rows.begin, rows.end);
    block->fresh = true;
    mean_.start_head(block->mean, head);
    load_queries(panel, block);
    for (int64_t i = 0; i < kRows; i += 16) store(block->shift + i, FloatVec::set1(-kInfinity));
    for (int64_t i = 0; i < kRows; ++i) store(block->sum + i * 16, FloatVec::zero());
  }

  // Finds the first tile from *at on, counted in blocks of tiles of keys, that is not invisible, and moves on behind
  // it.
  static bool find_tile(Panel* panel, const Mask& mask, Range seen, int64_t* at, Tile* tile) {
    for (; *at / panel->count * kKeys < seen.end; ++*at) {
      const int64_t key = *at / panel->count * kKeys;
      Block& block = panel->blocks[*at % panel->count];
      // Whole words of mask bits, so the first columns of the first tile may be invisible.
      const Range columns{max(key, block.seen.begin / 64 * 64), min(key + kKeys, block.seen.end)};
      if (columns.begin >= columns.end) continue;
      const Coverage coverage = mask.coverage(block.rows, columns);
      if (coverage == Coverage::kNone) continue;
      // A ragged tile's last columns do not exist: they are hidden too.
      *tile = {&block, columns, coverage != Coverage::kAll || (columns.end - columns.begin) % kStep != 0, nullptr};
      ++*at;
      return true;
    }
    return false;
  }

  bool all_finite(const char* packed, const Tile& tile) const {
    for (int64_t j = 0; j < tile.steps(); ++j) {
      if (!*finite(packed, tile.columns.begin + j * kStep)) return false;
    }
    return true;
  }

  static void hide(float* s) {
    for (int64_t i = 0; i < kRows; ++i) store(s + i * kKeys, FloatVec::set1(-kInfinity));
  }

  void load_queries(const Panel& panel, Block* block) const {
    const Range rows = block->rows;
    const int64_t height = rows.end - rows.begin;
    const T* from = row_of<const T>(p_.q, block->batch, block->head, rows.begin);
    block->a = block->q;
    block->a_row = 64;
    block->a_step = kStepBytes;
    if constexpr (kPieces == 3) {
      scores_.load_queries(panel.rows_q, block->batch, block->head, rows);
      const Seen of_q =
          pack_pieces<3, Cutting::kRounded, false, false>(block->q, 0, panel.rows_q, p_.head_dim, height, p_.head_dim);
      if (block->seen.begin < block->seen.end) keep_largest(of_q, &largest_q_);
    } else if constexpr (kPieces == 2) {
      const Seen of_q =
          pack_pieces<2, Cutting::kTruncated, false, false>(block->q, 0, from, p_.q.stride[2], height, p_.head_dim);
      if (block->seen.begin < block->seen.end) keep_largest(of_q, &largest_q_);
    } else if (height == kRows && p_.head_dim % kStep == 0) {
      block->a = from;
      block->a_row = p_.q.stride[2] * 2;
      block->a_step = 64;
    } else {
      pack_rows(block->q, from, p_.q.stride[2], height, p_.head_dim);
    }
  }

  // Moves the rows' shifts where a tile's scores have grown; returns whether any did.
  bool shift_rows(const Block& block, const float* scores, int64_t steps) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_);
    bool moved = false;
    for (int64_t half = 0; half < kRows; half += 16) {
      const float* s = scores + half * kKeys;
      FloatVec top[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        top[i] = load(s + i * kKeys);
        for (int64_t j = 16; j < steps * kStep; j += 16) top[i] = max(top[i], load(s + i * kKeys + j));
      }
      const FloatVec now = reduce_each(top, [](FloatVec a, FloatVec b) { return max(a, b); }) * to_log2;
      const FloatVec before = load(block.shift + half);
      const __mmask16 grown = lt(before + FloatVec::set1(kSlack), now);
      store(block.factor + half, select(grown, exp2(before - now), FloatVec::set1(1.0f)));
      store(block.shift + half, select(grown, now, before));
      moved |= grown != 0;
    }
    return moved;
  }

  static bool has_huge_shift(const Block& block) {
    const FloatVec limit = FloatVec::set1(kHugeShift);
    return (lt(limit, abs(load(block.shift))) | lt(limit, abs(load(block.shift + 16)))) != 0;
  }

  template <typename Steps, typename Background>
  void exponentiate(const Block& block, const float* s, char* p, Steps steps, Background& background,
                    int64_t units) const {
    if (kUnit == ScoreUnit::kRaw && has_huge_shift(block)) {
      exponentiate<true>(block, s, p, steps, background, units);
    } else {
      exponentiate<false>(block, s, p, steps, background, units);
    }
  }

  // Scores to probabilities and their sums. One rounding from score to power of two, and not two, leaves the rounding
  // of the shift in each power: a common factor that the normalisation takes out again, unless shifts are huge.
  template <bool kHugeShifts, typename Steps, typename Background>
  void exponentiate(const Block& block, const float* s, char* p, Steps steps, Background& background,
                    int64_t units) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_);
    const auto weigh = [&](const float* s, FloatVec shift) {
      if constexpr (kUnit == ScoreUnit::kLog2) return exp2(load(s) + shift);
      if constexpr (kHugeShifts) return exp2(multiply_rounded(load(s), to_log2) + shift);
      return exp2(fma(load(s), to_log2, shift));
    };
    int64_t credit = 0;  // units of the background that are due, times kRows
    for (int64_t i = 0; i < kRows; ++i, s += kKeys, p += 64) {
      // -inf minus -inf is NaN, so a row that has seen nothing subtracts 0 instead.
      const FloatVec shift = FloatVec::set1(block.shift[i] == -kInfinity ? 0.0f : -block.shift[i]);
      FloatVec sum_a = load(block.sum + i * 16), sum_b = FloatVec::zero();
      for (int64_t j = 0; j < steps; ++j) {
        const FloatVec a = weigh(s + j * kStep, shift), b = weigh(s + j * kStep + 16, shift);
        sum_a = sum_a + a;
        sum_b = sum_b + b;
        if constexpr (kPieces == 1) {
          _mm512_storeu_si512(p + j * kStepBytes, merge_bfloat16(a, b));
        } else {
          // The values have been rounded. Two pieces of a probability are not all of it: the last is rounded.
          store_pieces<kPieces, kPieces == 2 ? Cutting::kRounded : Cutting::kTruncated>(p + j * kStepBytes, a, b);
        }
      }
      store(block.sum + i * 16, sum_a + sum_b);
      for (credit += units; credit >= kRows; credit -= kRows) background.advance();
    }
  }

  void rescale(const Block& block) const {
    for (int64_t i = 0; i < kRows; ++i) {
      const FloatVec factor = FloatVec::set1(block.factor[i]);
      store(block.sum + i * 16, load(block.sum + i * 16) * factor);
      for (int64_t d = 0; !block.fresh && d < out_stride_; d += 16) {
        float* out = block.out + i * out_stride_ + d;
        store(out, load(out) * factor);
      }
    }
  }

  // Sets dropped probabilities to 0; the survivors are rescaled once, at the end.
  void drop(const Block& block, char* probabilities, int64_t column, int64_t steps) const {
    const uint64_t slice = static_cast<uint64_t>(block.batch * p_.num_heads_q + block.head);
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      char* p = probabilities + (i - block.rows.begin) * 64;
      for (int64_t j = 0; j < steps; j += 2) {
        uint64_t keep =
            dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(i), static_cast<uint64_t>(column + j * kStep));
        for (int64_t k = j; k < min(j + 2, steps); ++k, keep >>= 32) {
          const __mmask32 lanes = _pdep_u32(static_cast<uint32_t>(keep), 0x55555555) |
                                  _pdep_u32(static_cast<uint32_t>(keep >> 16), 0xaaaaaaaa);
          for (int64_t piece = 0; piece < kPieces; ++piece) {
            char* at = p + k * kStepBytes + piece * kPieceBytes;
            _mm512_storeu_si512(at, _mm512_maskz_loadu_epi16(lanes, at));
          }
        }
      }
    }
  }

  // Adds what was packed as 0: 0 * NaN is NaN, so only those who see such a value may be touched by it.
  void add_not_finite(const char* packed, const Tile& tile, const char* probabilities, const Mask& mask) const {
    const Block& block = *tile.block;
    for (int64_t key = tile.columns.begin; key < tile.columns.end; ++key) {
      if (*finite(packed, key)) continue;
      const int64_t j = (key - tile.columns.begin) % kStep;
      const T* v = row_of<const T>(p_.v, block.batch, block.head / group_size_, key);
      for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
        if (!mask.visible(i, key)) continue;
        const int64_t at = i - block.rows.begin;
        const char* p = probabilities + (key - tile.columns.begin) / kStep * kStepBytes + at * 64;
        const float weight = to_float(reinterpret_cast<const BFloat16*>(p)[j % 16 * 2 + j / 16]);
        for (int64_t d = 0; d < p_.head_dim_v; ++d) {
          if (!is_finite(v[d])) block.out[at * out_stride_ + d] += weight * to_float(v[d]);
        }
      }
    }
  }

  // Divides by the sums and rounds once.
  void write(const Block& block) const {
    const bool empty = block.fresh;  // no key was visible to any row
    double sink = -kInfinity;
    if (p_.sinks.data != nullptr) {
      visit(p_.sinks.dtype, [&](auto type) {
        using S = typename decltype(type)::Type;
        sink = to_double(*row_of<const S>(p_.sinks, 0, block.head, 0));
      });
    }
    double* lse = args_.lse + (block.batch * p_.num_heads_q + block.head) * p_.seq_len_q;
    for (int64_t half = 0; half < kRows; half += 16) {
      const int64_t n = min(16, block.rows.end - block.rows.begin - half);
      if (n <= 0) break;
      FloatVec lanes[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) lanes[i] = load(block.sum + (half + i) * 16);
      const FloatVec sum = reduce_each(lanes, [](FloatVec a, FloatVec b) { return a + b; });
      double result[16];
      store(block.factor + half, normalise(sink, sum, load(block.shift + half), result));
      for (int64_t i = 0; i < n; ++i) {
        lse[block.rows.begin + half + i] = result[i];
        mean_.note_lse(result[i]);
      }
    }
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      const int64_t at = i - block.rows.begin;
      const FloatVec factor = FloatVec::set1(block.factor[at]);
      const float* from = block.out + at * out_stride_;
      T* to = row_of<T>(args_.out, block.batch, block.head, i);
      if constexpr (kCut) {
        for_each_vec<float>(p_.head_dim_v, [&](int64_t d, auto n) {
          store_n(to + d, empty ? FloatVec::zero() : load(from + d) * factor, n);
        });
      } else {
        for (int64_t d = 0; d < p_.head_dim_v; d += kStep) {
          const FloatVec low = load(from + d) * factor, high = load(from + d + 16) * factor;
          const __m512i y = empty ? _mm512_setzero_si512() : (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
          _mm512_mask_storeu_epi16(to + d, first_lanes32(p_.head_dim_v - d), y);
        }
      }
    }
  }

  // Writes lse of 16 rows and returns what their outputs are scaled by. A sink is one more logit in the denominator.
  FloatVec normalise(double sink, FloatVec sum, FloatVec shift, double* lse) const {
    const FloatVec extra = FloatVec::set1(static_cast<float>(sink * kLog2E)), zero = FloatVec::zero();
    const FloatVec top = max(extra, shift);
    const FloatVec kept = exp2(shift - top);
    const FloatVec total = fma(sum, kept, exp2(extra - top));
    log_of_scaled(total, top, lse);
    const __mmask16 only_sink = sink == __builtin_inf() ? 0xffff : eq(sum, zero);
    // A score of +inf makes the row NaN, but its lse is +inf.
    const __mmask16 endless = eq(shift, FloatVec::set1(kInfinity));
    for (int i = 0; i < 16; ++i) {
      if (endless >> i & 1) lse[i] = __builtin_inf();
      if (only_sink >> i & 1) lse[i] = sink;
    }
    return select(only_sink, zero, kept * FloatVec::set1(static_cast<float>(p_.dropout.rescale)) / total);
  }

  const AttentionForwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<float> scores_;
  const float to_log2_;
  const Mean mean_;
  int64_t group_size_, dim_steps_, value_steps_, out_stride_, tiles_, blocks_;
  mutable bool fits_ = true;                        // all could be cut into pieces
  mutable uint32_t largest_q_ = 0, largest_k_ = 0;  // bits of a float: the largest query, as packed, and key
};

// Once more, from the lse.
void add_mean(const AttentionForwardArgs& forward) {
  const AttentionWeightsArgs args = mean_weights(forward);
  attention_weights_takes(args) ? attention_weights(args) : avx512::attention_weights(args);
}

}  // namespace

bool attention_forward_takes(const AttentionForwardArgs& args) { return amx_takes(args.problem); }

void attention_forward(const AttentionForwardArgs& args) {
  bool done = true;
  visit(args.problem.q.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      const ForwardAmx<T> forward(args);
      done = forward.run();
      if (done && !forward.has_mean()) add_mean(args);
    }
  });
  if (!done) avx512::attention_forward(args);
}

}  // namespace fastattn::FASTATTN_ISA
