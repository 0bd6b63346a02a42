// Numbers of more than 8 bits as sums of bfloat16, and their packing for AMX tiles.
//
// A float32 is the exact sum of three bfloat16, each what the ones before left, rounded: a = a0 + a1 + a2.
// Of the nine products of two such sums six are taken: the other three are below 2^-24 of the whole, float32's own
// rounding. Six bfloat16 products on tiles are still more than twice as fast as one float32 product on AVX-512, and
// more exact than it: a tile instruction sums 32 products by themselves before it adds them to its accumulator. A
// float16 is the sum of two bfloat16, of whose four products three are taken; what lies between two products, kept as
// two of them, loses 2^-16. bfloat16 takes one product, and rounds what lies between two of them as PyTorch does.
//
// Infinity has no such sum: Inf * 0 is NaN. And tiles take subnormal numbers for 0, which the last pieces of very small
// numbers are. Packing reports what is not finite and how large the largest number is, and the caller starts again
// without tiles.
#pragma once

#include <type_traits>

#include "amx.h"

namespace fastattn::FASTATTN_ISA {

// How many bfloat16 an element of a dtype is cut into.
template <typename T>
constexpr int kPiecesOf = std::is_same_v<T, BFloat16>  ? 1
                          : std::is_same_v<T, Float16> ? 2
                                                       : 3;

// What packing met: the largest elements, as the bits of their magnitudes, by which NaN is the largest of all.
struct Seen {
  __m512i largest = _mm512_setzero_si512();
  void add(FloatVec x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, magnitude);
  }
  void add(const Seen& other) { largest = _mm512_max_epu32(largest, other.largest); }
  // NaN or what is not finite once rounded to 8 bits is infinite here.
  float magnitude() const {
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    return bits >= 0x7f7f8000 ? __builtin_inff() : bit_cast<float>(bits);
  }
};

// Raises *bits to those of the largest element, from any thread; a float above 0 is ordered like its bits.
inline void keep_largest(const Seen& seen, uint32_t* bits) {
  const uint32_t mine = bit_cast<uint32_t>(seen.magnitude());
  uint32_t before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (before < mine && !__atomic_compare_exchange_n(bits, &before, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Cuts x into pieces, each with the bits of a bfloat16 alone, by rounding or by leaving off what is behind them. Of the
// factors of a product one at least must be rounded: its smaller pieces have either sign, and what the products of
// pieces leave out is no bias. Two truncated pieces hold a float16, but lose bits of a float32.
enum class Cutting { kRounded, kTruncated };
template <int kPieces>
struct Cut {
  __m512 piece[kPieces];
};
template <int kPieces, Cutting kCutting>
inline Cut<kPieces> cut(FloatVec x) {
  const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  Cut<kPieces> result;
  __m512i rest = _mm512_castps_si512(x.v);
  const auto round = [&] {
    if (kCutting == Cutting::kRounded) rest = _mm512_add_epi32(rest, _mm512_set1_epi32(0x8000));
  };
#pragma GCC unroll 2
  for (int i = 0; i + 1 < kPieces; ++i) {
    const __m512 before = _mm512_castsi512_ps(rest);
    round();
    result.piece[i] = _mm512_castsi512_ps(_mm512_and_si512(rest, leading));
    rest = _mm512_castps_si512(_mm512_sub_ps(before, result.piece[i]));
  }
  if (kPieces == 2) round();  // the third of three is exact
  result.piece[kPieces - 1] = _mm512_castsi512_ps(rest);
  return result;
}

// The upper halves of the elements of two vectors: a[0] b[0] a[1] b[1] ...
inline __m512i merge_upper(__m512 a, __m512 b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
}

// Cuts two vectors and stores each piece interleaved.
template <int kPieces, Cutting kCutting>
inline void store_pieces(char* to, FloatVec a, FloatVec b) {
  const Cut<kPieces> low = cut<kPieces, kCutting>(a), high = cut<kPieces, kCutting>(b);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) {
    _mm512_storeu_si512(to + i * kPieceBytes, merge_upper(low.piece[i], high.piece[i]));
  }
}

// Packs `rows` x `columns` of what lies at `from`, with zeros to the next multiple of 32, in blocks of 32 rows of a
// left operand or 32 columns of a right one, `block` bytes apart: [block][step of 32 depths][piece][2 tiles]. What is
// summed runs along the rows of `from`, or (kAcross) across them. kTransposed puts a right operand whose depth runs
// along `from`, or a left one whose depth runs across. The depths of a pair lie 16 apart.
template <int kPieces, Cutting kCutting, bool kAcross, bool kTransposed, typename S>
inline Seen pack_pieces(char* to, int64_t block, const S* from, int64_t stride, int64_t rows, int64_t columns) {
  static_assert(kPieces > 1);
  constexpr int64_t kRows = kAcross ? 32 : 16, kColumns = kAcross ? 16 : 32;  // of `from` that fill a tile
  constexpr int64_t kLowRows = 16, kNextRow = kAcross ? 16 : 0, kNextColumn = kAcross ? 0 : 16;
  Seen seen;
  for (int64_t i = 0; i < round_up(rows, kStep); i += kRows) {
    for (int64_t k = 0; k < round_up(columns, kStep); k += kColumns) {
      // `n` counts along the result's rows or columns, `depth` along what is summed.
      const int64_t n = kAcross ? k : i, depth = kAcross ? i : k;
      char* tile = to + n / kStep * block + depth / kStep * kPieces * kPieceBytes + n % kStep / 16 * kTileBytes;
      FloatVec low[16], high[16];
      const S* at = from + i * stride + k;
      if (i + kRows <= rows && k + kColumns <= columns) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < 16; ++l) {
          const S *left = at + l * stride, *right = left + kNextRow * stride + kNextColumn;
          // Rows may lie pages apart, where no hardware fetches ahead.
          _mm_prefetch(reinterpret_cast<const char*>(left + kRows * stride), _MM_HINT_T0);
          if (kAcross || sizeof(S) == 4) {
            _mm_prefetch(reinterpret_cast<const char*>(right + kRows * stride), _MM_HINT_T0);
          }
          low[l] = load(left);
          high[l] = load(right);
        }
      } else {
        for (int64_t l = 0; l < kLowRows; ++l) {
          const auto part = [&](int64_t row, int64_t column) {
            const int64_t count = i + row < rows ? max(0, min(16, columns - k - column)) : 0;
            return load_n(at + row * stride + column, static_cast<int>(count));
          };
          low[l] = part(l, 0);
          high[l] = part(l + kNextRow, kNextColumn);
        }
      }
      if constexpr (kTransposed) {
        transpose<float>(low);
        transpose<float>(high);
      }
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) {
        seen.add(low[l]);
        seen.add(high[l]);
        store_pieces<kPieces, kCutting>(tile + l * 64, low[l], high[l]);
      }
    }
  }
  return seen;
}

}  // namespace fastattn::FASTATTN_ISA
