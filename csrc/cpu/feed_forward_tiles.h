// The feed-forward's products on AMX tiles, for every dtype: the Engine of feed_forward_gradients.h.
//
// A float32 is the exact sum of three bfloat16, each what the ones before left, rounded: a = a0 + a1 + a2.
// Of the nine products of two such sums six are taken: the other three are below 2^-24 of the whole, float32's own
// rounding. Six bfloat16 products on tiles are still more than twice as fast as one float32 product on AVX-512, and
// more exact than it: a tile instruction sums 32 products by themselves before it adds them to its accumulator. A
// float16 is the sum of two bfloat16, of whose four products three are taken; what lies between two products, kept as
// two of them, loses 2^-16. bfloat16 takes one product, and rounds what lies between two of them as PyTorch does.
//
// Infinity has no such sum: Inf * 0 is NaN, and what overflows in one product may be Inf - Inf with another. And tiles
// take subnormal numbers for 0, which the last pieces of very small numbers are. Packing reports what is not finite or
// very large, and what is nothing but very small, and the caller starts again without tiles.
#pragma once

#include <type_traits>

#include "amx.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

// How many bfloat16 an element of a dtype is cut into.
template <typename T>
constexpr int kPiecesOf = std::is_same_v<T, BFloat16>  ? 1
                          : std::is_same_v<T, Float16> ? 2
                                                       : 3;

template <int kPieces>
class TileEngine {
 public:
  static constexpr int64_t kUnits = 64, kDepth = 128, kRows = kStep, kColumns = kStep, kBytes = 2 * kPieces;

  // Packed in blocks of 32 rows of the left operand or 32 columns of the right one: [block][step][piece][2 tiles].
  struct Operand {
    char* data;
    int64_t block;  // bytes
    Operand at(int64_t i, int64_t k) const { return {data + i / kStep * block + k / kStep * kStepBytes, block}; }
  };
  using Left = Operand;
  using Right = Operand;

  static Operand take_left(Carver& carver, int64_t rows, int64_t depth) {
    const int64_t block = ceil_div(depth, kStep) * kStepBytes;
    return {carver.take<char>(ceil_div(rows, kStep) * block), block};
  }
  static Operand transposed(const Operand& left, int64_t depth) {
    return {left.data, ceil_div(depth, kStep) * kStepBytes};
  }
  static Operand take_right(Carver& carver, int64_t depth, int64_t columns) {
    return take_left(carver, columns, depth);
  }

  // Each packs `rows` x `columns` of what lies at `from`, with zeros to the next multiple of 32, and returns whether
  // all is finite (always true with one piece, which needs no such thing). Depth runs along the rows of `from`, or
  // across them.
  template <typename S>
  static bool pack_left(const Operand& to, const S* from, int64_t stride, int64_t rows, int64_t columns) {
    return pack<false, false>(to, from, stride, rows, columns);
  }
  template <typename S>
  static bool pack_right_transposed(const Operand& to, const S* from, int64_t stride, int64_t columns, int64_t rows) {
    return pack<false, true>(to, from, stride, rows, columns);
  }
  template <typename S>
  static bool pack_right(const Operand& to, const S* from, int64_t stride, int64_t rows, int64_t columns) {
    return pack<true, false>(to, from, stride, rows, columns);
  }
  template <typename S>
  static bool pack_left_transposed(const Operand& to, const S* from, int64_t stride, int64_t columns, int64_t rows) {
    return pack<true, true>(to, from, stride, rows, columns);
  }

  // to (+)= left * right; `to` is written up to the next multiple of 32 rows and columns.
  template <typename Result>
  static void product(int64_t rows, int64_t columns, int64_t depth, const Operand& left, const Operand& right,
                      const Result& to, bool start) {
    TileScope tiles;
    Products products;
    const int64_t steps = ceil_div(depth, kStep), blocks = ceil_div(rows, kStep), lines = right.block / 64;
    for (int64_t j = 0; j < columns; j += kStep) {
      const char* b = right.data + j / kStep * right.block;
      float* c = to.at(0, j).data;
      for (int64_t i = 0; i < blocks; ++i, c += kStep * to.row) {
        // The next block of the result, and its share of the right operand's next one, may have to come from afar.
        if (!start && i + 1 < blocks) {
          for (int64_t row = kStep; row < 2 * kStep; ++row) prefetch(c + row * to.row, 2);
        }
        if (j + kStep < columns) {
          const int64_t begin = lines * i / blocks;
          prefetch(b + right.block + begin * 64, lines * (i + 1) / blocks - begin);
        }
        const char* a = left.data + i * left.block;
        const Product p{a, 64, kStepBytes, b, kTileBytes, kStepBytes, c, to.row * 4, steps, !start};
        if constexpr (kPieces == 1) {
          products.run(p);
        } else {
          run(p);
        }
      }
    }
    products.flush();
  }

 private:
  static constexpr int64_t kPieceBytes = 2 * kTileBytes, kStepBytes = kPieces * kPieceBytes;

  static void prefetch(const void* from, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(static_cast<const char*>(from) + i * 64, _MM_HINT_T1);
  }

  // The pieces of 32 elements as pairs of bfloat16.
  struct Pairs {
    __m512i piece[kPieces];
  };

  // One of two pairs of tiles, 4 and 5 or 6 and 7.
  static void load_left(const char* a) {
    tile_load<4>(a, 64);
    tile_load<5>(a + kTileBytes, 64);
  }
  static void load_right(const char* b) {
    tile_load<6>(b, 64);
    tile_load<7>(b + kTileBytes, 64);
  }
  static void multiply_all() {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }

  // Products::run for two and three pieces, the small products before the large.
  static void run(const Product& p) {
    const char *a = static_cast<const char*>(p.a), *b = static_cast<const char*>(p.b);
    char* c = reinterpret_cast<char*>(p.c);
    if (p.accumulate) {
      tile_load<0>(c, p.c_row);
      tile_load<1>(c + 64, p.c_row);
      tile_load<2>(c + 16 * p.c_row, p.c_row);
      tile_load<3>(c + 16 * p.c_row + 64, p.c_row);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t step = 0; step < p.steps; ++step, a += kStepBytes, b += kStepBytes) {
      // Each pair of pieces has one in common with the pair before.
      load_left(a);
      if constexpr (kPieces == 3) {
        load_right(b + 2 * kPieceBytes);
        multiply_all();
      }
      load_right(b + kPieceBytes);
      multiply_all();
      load_left(a + kPieceBytes);
      if constexpr (kPieces == 3) multiply_all();
      load_right(b);
      multiply_all();
      if constexpr (kPieces == 3) {
        load_left(a + 2 * kPieceBytes);
        multiply_all();
      }
      load_left(a);
      multiply_all();
    }
    tile_store<0>(c, p.c_row);
    tile_store<1>(c + 64, p.c_row);
    tile_store<2>(c + 16 * p.c_row, p.c_row);
    tile_store<3>(c + 16 * p.c_row + 64, p.c_row);
  }

  // What packing met: lanes with something that is not finite, and the largest elements.
  struct Seen {
    __mmask16 bad = 0;
    FloatVec largest = FloatVec::zero();
  };
  static constexpr float kVerySmall = 0x1p-90f;  // the least piece of such an element is above 2^-108
  static constexpr float kVeryLarge = 0x1p55f;   // 2^17 products of such elements are below float32's largest number

  // Cuts x into pieces, each with the bits of a bfloat16 alone, and notes what is not finite.
  struct Cut {
    __m512 piece[kPieces];
  };
  static Cut cut(FloatVec x, Seen* seen) {
    const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    Cut result;
    __m512 rest = x.v;
    for (int i = 0; i < kPieces; ++i) {
      const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
      result.piece[i] = _mm512_castsi512_ps(_mm512_and_si512(rounded, leading));
      rest = _mm512_sub_ps(rest, result.piece[i]);  // NaN where x or its rounding is not finite, and then it stays
    }
    seen->bad |= _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
    seen->largest = max(seen->largest, abs(x));
    return result;
  }

  // Elements 2 k and 2 k + 1 of a row side by side.
  template <typename S>
  static Pairs along(const S* from, int64_t n, Seen* seen) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      static_assert(kPieces == 1);
      return {{_mm512_maskz_loadu_epi16(first_lanes32(n), from)}};
    } else {
      const FloatVec low = n >= 16 ? load(from) : load_n(from, static_cast<int>(max(n, 0)));
      const FloatVec high = n >= 32  ? load(from + 16)
                            : n > 16 ? load_n(from + 16, static_cast<int>(n - 16))
                                     : FloatVec::zero();
      if constexpr (kPieces == 1) {
        return {{(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}};
      } else {
        const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                             25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        const Cut a = cut(low, seen), b = cut(high, seen);
        Pairs pairs;
        for (int i = 0; i < kPieces; ++i) {
          pairs.piece[i] =
              _mm512_permutex2var_epi16(_mm512_castps_si512(a.piece[i]), odd, _mm512_castps_si512(b.piece[i]));
        }
        return pairs;
      }
    }
  }

  // Elements k of two rows side by side, for 16 columns; a row that does not exist is null.
  template <typename S>
  static Pairs across(const S* even, const S* odd, int64_t n, Seen* seen) {
    const auto row = [&](const S* from) {
      if (from == nullptr || n <= 0) return FloatVec::zero();
      return n >= 16 ? load(from) : load_n(from, static_cast<int>(n));
    };
    const FloatVec a = row(even), b = row(odd);
    const auto merge = [](__m512 low, __m512 high) {
      return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                     _mm512_castps_si512(high));
    };
    if constexpr (std::is_same_v<S, BFloat16>) {
      return {{merge(a.v, b.v)}};
    } else if constexpr (kPieces == 1) {
      const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      return {{_mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v))}};
    } else {
      const Cut low = cut(a, seen), high = cut(b, seen);
      Pairs pairs;
      for (int i = 0; i < kPieces; ++i) pairs.piece[i] = merge(low.piece[i], high.piece[i]);
      return pairs;
    }
  }

  template <bool kAcross, bool kTransposed, typename S>
  static bool pack(const Operand& to, const S* from, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int64_t kRows = kAcross ? 32 : 16, kColumns = kAcross ? 16 : 32;  // of `from` that fill a tile
    Seen seen;
    for (int64_t i = 0; i < round_up(rows, kStep); i += kRows) {
      for (int64_t k = 0; k < round_up(columns, kStep); k += kColumns) {
        // `n` counts along the result's rows or columns, `depth` along what is summed.
        const int64_t n = kAcross ? k : i, depth = kAcross ? i : k;
        char* tile = to.data + n / kStep * to.block + depth / kStep * kStepBytes + n % kStep / 16 * kTileBytes;
        FloatVec lines[kPieces][16];
#pragma GCC unroll 16
        for (int64_t l = 0; l < 16; ++l) {
          Pairs pairs;
          const int64_t row = kAcross ? i + 2 * l : i + l;
          const S* at = from + row * stride + k;
          // Rows may lie pages apart, where no hardware fetches ahead.
          _mm_prefetch(reinterpret_cast<const char*>(at + kRows * stride), _MM_HINT_T0);
          if constexpr (kAcross) _mm_prefetch(reinterpret_cast<const char*>(at + (kRows + 1) * stride), _MM_HINT_T0);
          if constexpr (!kAcross && sizeof(S) == 4) {
            _mm_prefetch(reinterpret_cast<const char*>(at + kRows * stride + 16), _MM_HINT_T0);
          }
          if constexpr (kAcross) {
            pairs = across(row < rows ? at : nullptr, row + 1 < rows ? at + stride : nullptr, columns - k, &seen);
          } else {
            pairs = along(at, row < rows ? columns - k : 0, &seen);
          }
          for (int piece = 0; piece < kPieces; ++piece) {
            if constexpr (kTransposed) {
              lines[piece][l] = {_mm512_castsi512_ps(pairs.piece[piece])};
            } else {
              _mm512_storeu_si512(tile + piece * kPieceBytes + l * 64, pairs.piece[piece]);
            }
          }
        }
        if constexpr (kTransposed) {
          for (int piece = 0; piece < kPieces; ++piece) {
            transpose<float>(lines[piece]);
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) {
              store(reinterpret_cast<float*>(tile + piece * kPieceBytes + l * 64), lines[piece][l]);
            }
          }
        }
      }
    }
    const float largest = reduce_max(seen.largest);
    return seen.bad == 0 && (largest == 0 || (largest >= kVerySmall && largest <= kVeryLarge));
  }
};

}  // namespace fastattn::FASTATTN_ISA
