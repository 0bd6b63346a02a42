// The feed-forward's products on AMX tiles, for every dtype: the Engine of feed_forward_gradients.h.
//
// An element is a sum of bfloat16 (amx_pieces.h), of which what overflows in one product may be Inf - Inf with another.
// Packing reports what has no such sum or is very large, and what is nothing but very small, and the caller starts
// again without tiles.
#pragma once

#include "amx_pieces.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

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
    TileProducts<kPieces> products;
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
        products.run({a, 64, kStepBytes, b, kTileBytes, kStepBytes, c, to.row * 4, steps, !start});
      }
    }
    products.flush();
  }

 private:
  static constexpr int64_t kStepBytes = kPieces * kPieceBytes;
  static constexpr float kVerySmall = 0x1p-90f;  // the least piece of such an element is above 2^-108
  static constexpr float kVeryLarge = 0x1p55f;   // 2^17 products of such elements are below float32's largest number

  static void prefetch(const void* from, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(static_cast<const char*>(from) + i * 64, _MM_HINT_T1);
  }

  // Elements 2 k and 2 k + 1 of a row side by side.
  template <typename S>
  static __m512i along(const S* from, int64_t n) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      return _mm512_maskz_loadu_epi16(first_lanes32(n), from);
    } else {
      const FloatVec low = n >= 16 ? load(from) : load_n(from, static_cast<int>(max(n, 0)));
      const FloatVec high = n >= 32  ? load(from + 16)
                            : n > 16 ? load_n(from + 16, static_cast<int>(n - 16))
                                     : FloatVec::zero();
      return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    }
  }

  // Elements k of two rows side by side, for 16 columns; a row that does not exist is null.
  template <typename S>
  static __m512i across(const S* even, const S* odd, int64_t n) {
    const auto row = [&](const S* from) {
      if (from == nullptr || n <= 0) return FloatVec::zero();
      return n >= 16 ? load(from) : load_n(from, static_cast<int>(n));
    };
    const FloatVec a = row(even), b = row(odd);
    if constexpr (std::is_same_v<S, BFloat16>) {
      return merge_upper(a.v, b.v);
    } else {
      const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      return _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
    }
  }

  // pack_pieces for what is rounded to bfloat16; the depths of a pair are neighbours.
  template <bool kAcross, bool kTransposed, typename S>
  static void pack_rounded(const Operand& to, const S* from, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int64_t kRows = kAcross ? 32 : 16, kColumns = kAcross ? 16 : 32;  // of `from` that fill a tile
    for (int64_t i = 0; i < round_up(rows, kStep); i += kRows) {
      for (int64_t k = 0; k < round_up(columns, kStep); k += kColumns) {
        // `n` counts along the result's rows or columns, `depth` along what is summed.
        const int64_t n = kAcross ? k : i, depth = kAcross ? i : k;
        char* tile = to.data + n / kStep * to.block + depth / kStep * kStepBytes + n % kStep / 16 * kTileBytes;
        FloatVec lines[16];
#pragma GCC unroll 16
        for (int64_t l = 0; l < 16; ++l) {
          __m512i pairs;
          const int64_t row = kAcross ? i + 2 * l : i + l;
          const S* at = from + row * stride + k;
          // Rows may lie pages apart, where no hardware fetches ahead.
          _mm_prefetch(reinterpret_cast<const char*>(at + kRows * stride), _MM_HINT_T0);
          if constexpr (kAcross) _mm_prefetch(reinterpret_cast<const char*>(at + (kRows + 1) * stride), _MM_HINT_T0);
          if constexpr (kAcross) {
            pairs = across(row < rows ? at : nullptr, row + 1 < rows ? at + stride : nullptr, columns - k);
          } else {
            pairs = along(at, row < rows ? columns - k : 0);
          }
          if constexpr (kTransposed) {
            lines[l] = {_mm512_castsi512_ps(pairs)};
          } else {
            _mm512_storeu_si512(tile + l * 64, pairs);
          }
        }
        if constexpr (kTransposed) {
          transpose<float>(lines);
#pragma GCC unroll 16
          for (int l = 0; l < 16; ++l) store(reinterpret_cast<float*>(tile + l * 64), lines[l]);
        }
      }
    }
  }

  template <bool kAcross, bool kTransposed, typename S>
  static bool pack(const Operand& to, const S* from, int64_t stride, int64_t rows, int64_t columns) {
    if constexpr (kPieces == 1) {
      pack_rounded<kAcross, kTransposed>(to, from, stride, rows, columns);
      return true;
    } else {
      const Seen seen =
          pack_pieces<kPieces, Cutting::kRounded, kAcross, kTransposed>(to.data, to.block, from, stride, rows, columns);
      const float largest = seen.magnitude();
      return largest == 0 || (largest >= kVerySmall && largest <= kVeryLarge);
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
