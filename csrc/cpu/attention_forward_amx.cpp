// Attention forward in bfloat16 on AMX: attention_forward.cpp's algorithm, with both products on tiles.
//
// Keys and values of a group are packed once as AMX wants its right-hand side. Probabilities are rounded to bfloat16
// for the product with the values, as eager PyTorch rounds them; everything else is float32: the scores, the row sums,
// the output. The running maximum moves only when it grows by more than kSlack: until then a probability may exceed 1,
// which costs nothing, and the output needs no rescaling.
#include <type_traits>

#include "amx.h"
#include "attention_forward.h"
#include "attention_schedule.h"
#include "attention_scores.h"
#include "mask.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRows = kStep;               // queries a block
constexpr int64_t kKeys = 64;                  // keys a tile: all that a tile touches stays in the first-level cache
constexpr int64_t kPStep = kRows * kStep * 2;  // bytes of the probabilities of a step
constexpr int64_t kMinRows = 2;  // a single query's time is that of reading the keys: packing them would double it
constexpr float kSlack = 8.0f;   // in powers of two
constexpr float kInfinity = __builtin_inff();

using Whole = std::integral_constant<int64_t, kKeys / kStep>;  // the steps of a whole tile, for the compiler to see

class ForwardAmx {
 public:
  explicit ForwardAmx(const AttentionForwardArgs& args)
      : args_(args), p_(args.problem), scores_(p_, ScoreUnit::kRaw), to_log2_(scores_.to_log2()) {
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    dim_steps_ = ceil_div(p_.head_dim, kStep);
    value_steps_ = ceil_div(p_.head_dim_v, kStep);
    out_stride_ = value_steps_ * kStep;
    tiles_ = ceil_div(p_.seq_len_k, kKeys);
  }

  void run() const {
    const GroupWork work{tiles_, round_up(tiles_ * (k_tile() + v_tile()) + tiles_ * kKeys / kStep, 64),
                         group_size_ * ceil_div(p_.seq_len_q, kRows), block_bytes()};
    for_each_block(
        p_, work, [&](char* packed, int64_t group, int64_t tile) { pack_tile(packed, group, tile); },
        [&](const char* packed, char* memory, int64_t group, int64_t block) {
          run_block(packed, carve_block(Carver(memory)), group, block);
        });
  }

 private:
  // The state of one block of queries.
  struct Block {
    BFloat16* q;    // [kRows, dim_steps * kStep], where the caller's rows will not do
    float* s;       // [kRows, kKeys]: scores
    char* p;        // [kKeys / kStep, kRows, kStep]: probabilities in bfloat16
    float* out;     // [kRows, out_stride]
    float* shift;   // [kRows]: what is subtracted from a row's scores, in powers of two
    float* factor;  // [kRows]
    float* sum;     // [kRows, 16]: running sum of the probabilities, lane by lane
    const void* a;  // queries: q or the caller's
    int64_t a_row;  // bytes from row to row
    Range rows;
    int64_t batch, head;
  };

  // Bytes of a packed tile of keys or values.
  int64_t k_tile() const { return kKeys / 16 * dim_steps_ * kTileBytes; }
  int64_t v_tile() const { return kKeys / 16 * value_steps_ * kTileBytes; }
  const char* packed_k(const char* packed, int64_t key) const { return packed + key / 16 * dim_steps_ * kTileBytes; }
  const char* packed_v(const char* packed, int64_t key) const {
    return packed + tiles_ * k_tile() + key / 16 * value_steps_ * kTileBytes;
  }
  // Whether all values of 32 keys are finite; elements that are not are packed as 0.
  const char* finite(const char* packed, int64_t key) const {
    return packed + tiles_ * (k_tile() + v_tile()) + key / kStep;
  }

  int64_t block_bytes() const {
    return kRows * (dim_steps_ * kStep * 2 + kKeys * 2 + (kKeys + out_stride_ + 2 + 16) * 4) + 6 * 64;
  }
  Block carve_block(Carver carver) const {
    Block block;
    block.q = carver.take<BFloat16>(kRows * dim_steps_ * kStep);
    block.s = carver.take<float>(kRows * kKeys);
    block.p = carver.take<char>(kRows * kKeys * 2);
    block.out = carver.take<float>(kRows * out_stride_);
    block.shift = carver.take<float>(kRows);
    block.factor = carver.take<float>(kRows);
    block.sum = carver.take<float>(kRows * 16);
    return block;
  }

  // Packs what any query may see of a tile; what lies beyond (padding, another sequence) is never read.
  void pack_tile(char* packed, int64_t group, int64_t tile) const {
    const int64_t batch = group / p_.num_heads_kv, head = group % p_.num_heads_kv;
    const Range seen = Mask(p_, batch, head * group_size_).k_range(0, p_.seq_len_q);
    const int64_t begin = tile * kKeys, end = min(begin + kKeys, seen.end);
    if (begin + kKeys <= seen.begin) return;
    for (int64_t key = begin; key < end; key += kStep) {
      const BFloat16* k = row_of<const BFloat16>(p_.k, batch, head, key);
      char* to = const_cast<char*>(packed_k(packed, key));
      pack_transposed_tiles(to, k, p_.k.stride[2], end - key, p_.head_dim);
      pack_transposed_tiles(to + dim_steps_ * kTileBytes, k + 16 * p_.k.stride[2], p_.k.stride[2], end - key - 16,
                            p_.head_dim);
      *const_cast<char*>(finite(packed, key)) =
          pack_tiles(const_cast<char*>(packed_v(packed, key)), row_of<const BFloat16>(p_.v, batch, head, key),
                     p_.v.stride[2], end - key, p_.head_dim_v);
    }
  }

  void run_block(const char* packed, Block block, int64_t group, int64_t index) const {
    block.batch = group / p_.num_heads_kv;
    block.head = group % p_.num_heads_kv * group_size_ + index % group_size_;
    const int64_t begin = index / group_size_ * kRows;
    block.rows = {begin, min(begin + kRows, p_.seq_len_q)};
    const Mask mask(p_, block.batch, block.head);
    const Range seen = mask.k_range(block.rows.begin, block.rows.end);
    load_queries(block);
    for (int64_t i = 0; i < kRows; i += 16) store(block.shift + i, FloatVec::set1(-kInfinity));
    for (int64_t i = 0; i < kRows; ++i) store(block.sum + i * 16, FloatVec::zero());

    TileScope tiles;
    Products products;
    bool first = true;
    for (int64_t tile = seen.begin / kKeys; tile * kKeys < seen.end; ++tile) {
      // Whole words of mask bits, so the first columns of the first tile may be invisible.
      const Range columns{max(tile * kKeys, seen.begin / 64 * 64), min(tile * kKeys + kKeys, seen.end)};
      const Coverage coverage = mask.coverage(block.rows, columns);
      if (coverage == Coverage::kNone) continue;
      const int64_t width = columns.end - columns.begin, steps = ceil_div(width, kStep);
      const char* k = packed_k(packed, columns.begin);
      const char* v = packed_v(packed, columns.begin);
      for (int64_t j = 0; j < steps; ++j) {
        products.run({block.a, block.a_row, 64, k + j * 2 * dim_steps_ * kTileBytes, dim_steps_ * kTileBytes,
                      kTileBytes, block.s + j * kStep, kKeys * 4, dim_steps_, false});
      }
      products.flush();
      // A ragged tile's last columns do not exist: they are hidden too.
      const bool masked = coverage != Coverage::kAll || width % kStep != 0;
      scores_.finish(block.s, kKeys, block.batch, block.head, block.rows, columns, masked, mask);
      for (int64_t j = round_up(width, 16); j < steps * kStep; j += 16) hide(block.s + j);
      if (steps == kKeys / kStep) {
        softmax(block, Whole(), first);
      } else {
        softmax(block, steps, first);
      }
      if (p_.dropout.threshold != 0) drop(block, columns.begin, steps);
      for (int64_t n = 0; n < value_steps_; ++n) {
        products.run({block.p, 64, kPStep, v + n * 2 * kTileBytes, kTileBytes, value_steps_ * 2 * kTileBytes,
                      block.out + n * kStep, out_stride_ * 4, steps, !first});
      }
      first = false;
      for (int64_t j = 0; j < steps; ++j) {
        if (*finite(packed, columns.begin + j * kStep)) continue;
        products.flush();
        add_not_finite(block, columns.begin + j * kStep, j, mask);
      }
    }
    products.flush();
    write(block, first);
  }

  static void hide(float* s) {
    for (int64_t i = 0; i < kRows; ++i) store(s + i * kKeys, FloatVec::set1(-kInfinity));
  }

  void load_queries(Block& block) const {
    const BFloat16* from = row_of<const BFloat16>(p_.q, block.batch, block.head, block.rows.begin);
    const int64_t height = block.rows.end - block.rows.begin;
    block.a = from;
    block.a_row = p_.q.stride[2] * 2;
    if (height == kRows && p_.head_dim % kStep == 0) return;
    block.a = block.q;
    block.a_row = dim_steps_ * 64;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t d = 0; d < p_.head_dim; d += kStep) {
        const __mmask32 lanes = i < height ? first_lanes32(p_.head_dim - d) : 0;
        _mm512_storeu_si512(block.q + i * dim_steps_ * kStep + d,
                            _mm512_maskz_loadu_epi16(lanes, from + i * p_.q.stride[2] + d));
      }
    }
  }

  // Turns scores into probabilities relative to the rows' shifts, and adds them up.
  template <typename Steps>
  void softmax(const Block& block, Steps steps, bool first) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_);
    bool moved = false, huge = false;
    for (int64_t half = 0; half < kRows; half += 16) {
      float* s = block.s + half * kKeys;
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
      const FloatVec shift = select(grown, now, before);
      store(block.shift + half, shift);
      moved |= grown != 0;
      huge |= lt(FloatVec::set1(kHugeShift), abs(shift)) != 0;
    }
    if (moved && !first) rescale(block);
    huge ? exponentiate<true>(block, steps) : exponentiate<false>(block, steps);
  }

  // Scores to probabilities and their sums. One rounding from score to power of two, and not two, leaves the rounding
  // of the shift in each power: a common factor that the normalisation takes out again, unless shifts are huge.
  template <bool kHugeShifts, typename Steps>
  void exponentiate(const Block& block, Steps steps) const {
    const FloatVec to_log2 = FloatVec::set1(to_log2_);
    const auto weigh = [&](const float* s, FloatVec shift) {
      if constexpr (kHugeShifts) return exp2(multiply_rounded(load(s), to_log2) + shift);
      return exp2(fma(load(s), to_log2, shift));
    };
    for (int64_t i = 0; i < kRows; ++i) {
      float* s = block.s + i * kKeys;
      char* p = block.p + i * 64;
      // -inf minus -inf is NaN, so a row that has seen nothing subtracts 0 instead.
      const FloatVec shift = FloatVec::set1(block.shift[i] == -kInfinity ? 0.0f : -block.shift[i]);
      FloatVec sum_a = load(block.sum + i * 16), sum_b = FloatVec::zero();
      for (int64_t j = 0; j < steps; ++j) {
        const FloatVec a = weigh(s + j * kStep, shift), b = weigh(s + j * kStep + 16, shift);
        sum_a = sum_a + a;
        sum_b = sum_b + b;
        _mm512_storeu_si512(p + j * kPStep, merge_bfloat16(a, b));
      }
      store(block.sum + i * 16, sum_a + sum_b);
    }
  }

  void rescale(const Block& block) const {
    for (int64_t i = 0; i < kRows; ++i) {
      const FloatVec factor = FloatVec::set1(block.factor[i]);
      store(block.sum + i * 16, load(block.sum + i * 16) * factor);
      for (int64_t d = 0; d < out_stride_; d += 16) {
        float* out = block.out + i * out_stride_ + d;
        store(out, load(out) * factor);
      }
    }
  }

  // Sets dropped probabilities to 0; the survivors are rescaled once, at the end.
  void drop(const Block& block, int64_t column, int64_t steps) const {
    const uint64_t slice = static_cast<uint64_t>(block.batch * p_.num_heads_q + block.head);
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      char* p = block.p + (i - block.rows.begin) * 64;
      for (int64_t j = 0; j < steps; j += 2) {
        uint64_t keep =
            dropout_keep_bits(p_.dropout, slice, static_cast<uint64_t>(i), static_cast<uint64_t>(column + j * kStep));
        for (int64_t k = j; k < min(j + 2, steps); ++k, keep >>= 32) {
          const __mmask32 lanes = _pdep_u32(static_cast<uint32_t>(keep), 0x55555555) |
                                  _pdep_u32(static_cast<uint32_t>(keep >> 16), 0xaaaaaaaa);
          _mm512_storeu_si512(p + k * kPStep, _mm512_maskz_loadu_epi16(lanes, p + k * kPStep));
        }
      }
    }
  }

  // Adds what was packed as 0: 0 * NaN is NaN, so only those who see such a value may be touched by it.
  void add_not_finite(const Block& block, int64_t column, int64_t step, const Mask& mask) const {
    const Range seen = mask.k_range(block.rows.begin, block.rows.end);
    for (int64_t j = 0; j < min(kStep, seen.end - column); ++j) {
      const BFloat16* v = row_of<const BFloat16>(p_.v, block.batch, block.head / group_size_, column + j);
      for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
        if (!mask.visible(i, column + j)) continue;
        const int64_t at = i - block.rows.begin;
        const BFloat16* p = reinterpret_cast<const BFloat16*>(block.p + step * kPStep + at * 64);
        for (int64_t d = 0; d < p_.head_dim_v; ++d) {
          if (!is_finite(v[d])) block.out[at * out_stride_ + d] += to_float(p[j % 16 * 2 + j / 16]) * to_float(v[d]);
        }
      }
    }
  }

  // Divides by the sums and rounds once. `empty`: no key was visible to any row.
  void write(const Block& block, bool empty) const {
    double sink = -kInfinity;
    if (p_.sinks.data != nullptr) {
      visit(p_.sinks.dtype, [&](auto type) {
        using T = typename decltype(type)::Type;
        sink = to_double(*row_of<const T>(p_.sinks, 0, block.head, 0));
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
      for (int64_t i = 0; i < n; ++i) lse[block.rows.begin + half + i] = result[i];
    }
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      const int64_t at = i - block.rows.begin;
      const FloatVec factor = FloatVec::set1(block.factor[at]);
      const float* from = block.out + at * out_stride_;
      BFloat16* to = row_of<BFloat16>(args_.out, block.batch, block.head, i);
      for (int64_t d = 0; d < p_.head_dim_v; d += kStep) {
        const FloatVec low = load(from + d) * factor, high = load(from + d + 16) * factor;
        const __m512i y = empty ? _mm512_setzero_si512() : (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
        _mm512_mask_storeu_epi16(to + d, first_lanes32(p_.head_dim_v - d), y);
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
  int64_t group_size_, dim_steps_, value_steps_, out_stride_, tiles_;
};

}  // namespace

bool attention_forward_takes(const AttentionForwardArgs& args) {
  return args.problem.q.dtype == DType::kBFloat16 && args.problem.seq_len_q >= kMinRows;
}

void attention_forward(const AttentionForwardArgs& args) { ForwardAmx(args).run(); }

}  // namespace fastattn::FASTATTN_ISA
