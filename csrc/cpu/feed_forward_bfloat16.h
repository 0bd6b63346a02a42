// What the bfloat16 feed-forward on AMX shares between its directions: activations as exact as bfloat16 wants them, and
// the packing of operands by all threads.
#pragma once

#include <initializer_list>

#include "activation.h"
#include "amx_blocks.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {

// A packed operand: blocks of 32 rows, or of 32 columns, one behind the other.
struct Packed {
  char* data = nullptr;
  int64_t block = 0;  // bytes
  char* at(int64_t i) const { return data + i * block; }
};
inline int64_t steps_of(int64_t depth) { return ceil_div(depth, kStep); }
inline Packed take_packed(Carver& carver, int64_t rows, int64_t depth) {
  const int64_t block = steps_of(depth) * kBlockStep;
  return {carver.take<char>(steps_of(rows) * block), block};
}

// 2^x within 2^-17 of it.
inline FloatVec exp2_bfloat16(FloatVec x) {
  constexpr float kExp2[] = {0x1.62e0e2p-1f, 0x1.ec017ap-3f, 0x1.ca123ap-5f, 0x1.3a95f4p-7f};
  const FloatVec r = round_remainder(x);
  return ldexp(fma(polynomial(r, kExp2), r, FloatVec::set1(1.0f)), x - r);
}

// 1 / x for x >= 0, within 2^-22 of it; that of infinity is 0.
inline FloatVec reciprocal_bfloat16(FloatVec x) {
  const FloatVec r = {_mm512_rcp14_ps(x.v)};
  return r * fnma(min(FloatVec::set1(0x1p126f), x), r, FloatVec::set1(2.0f));
}

// What activate() of activation.h is to compute with: within 2^-16 of the activation's size where that is above 2^-10
// of its argument's, far below bfloat16's own rounding, at a third of the cost.
struct BFloat16Math {
  static FloatVec sigmoid(FloatVec x) {
    const FloatVec e = exp2_bfloat16(x * FloatVec::set1(static_cast<float>(-kLog2E)));
    return reciprocal_bfloat16(FloatVec::set1(1.0f) + e);
  }
  static Normal normal(FloatVec x) {
    // Abramowitz and Stegun, 7.1.26, as the integral of the normal distribution beyond |x|: within 8e-8.
    constexpr float kTail[] = {0.127414796f, -0.142248368f, 0.7107068705f, -0.7265760135f, 0.5307027145f};
    const FloatVec one = FloatVec::set1(1.0f), a = min(FloatVec::set1(64.0f), abs(x));
    const FloatVec e = exp2_bfloat16(a * a * FloatVec::set1(static_cast<float>(-0.5 * kLog2E)));
    const FloatVec t = reciprocal_bfloat16(fma(a, FloatVec::set1(0.3275911f * 0.70710678f), one));
    const FloatVec tail = polynomial(t, kTail) * t * e;
    return {select(lt(x, FloatVec::zero()), tail, one - tail), e * FloatVec::set1(0.39894228f)};
  }
};

// Rounds two vectors to bfloat16, side by side: the 32 elements of a row.
inline __m512i row_of_bfloat16(FloatVec low, FloatVec high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); }

// Rounds the elements of two rows in 16 columns and pairs them, as a right operand wants its depths.
inline __m512i pairs_of_bfloat16(FloatVec even, FloatVec odd) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, row_of_bfloat16(even, odd));
}

// A vector in float32, with zeros up to the next multiple of kStep; zeros alone for a null one.
inline void widen_vector(float* to, const void* from, int64_t count) {
  for (int64_t i = 0; i < round_up(count, kStep); i += FloatVec::kWidth) {
    const int n = static_cast<int>(max(min(FloatVec::kWidth, count - i), 0));
    const BFloat16* values = static_cast<const BFloat16*>(from) + i;
    store(to + i, from == nullptr || n == 0 ? FloatVec::zero() : load_n(values, n));
  }
}

// One operand to be packed, and how: which way its 32 rows lie in memory, and whether they are a left operand's rows.
struct PackJob {
  enum Kind { kLeft, kLeftTransposed, kRightTransposed, kRight } kind;
  const BFloat16* from;
  int64_t stride;
  int64_t rows, columns;  // of `from`
  Packed to;
  int64_t first_step = 0;  // of `to`, where the depth begins

  // Pieces for threads to share: whole rows, so that all is read from first to last.
  static constexpr int64_t kPiece = 64;
  int64_t pieces() const { return ceil_div(rows, kPiece); }
  void run(int64_t piece) const {
    using Engine = TileEngine<1>;
    const int64_t begin = piece * kPiece, n = min(kPiece, rows - begin);
    const BFloat16* source = from + begin * stride;
    const Engine::Operand across = {to.data + (first_step + begin / kStep) * kBlockStep, to.block};
    const Engine::Operand along = {to.at(begin / kStep) + first_step * kBlockStep, to.block};
    switch (kind) {
      case kLeft:
        Engine::pack_left(along, source, stride, n, columns);
        break;
      case kRightTransposed:
        Engine::pack_right_transposed(along, source, stride, columns, n);
        break;
      case kLeftTransposed:
        Engine::pack_left_transposed(across, source, stride, columns, n);
        break;
      case kRight:
        Engine::pack_right(across, source, stride, n, columns);
        break;
    }
  }
};

inline void pack_all(std::initializer_list<PackJob> jobs) {
  int64_t pieces = 0;
  double work = 0;
  for (const PackJob& job : jobs) {
    if (job.from == nullptr) continue;
    pieces += job.pieces();
    work += static_cast<double>(job.rows) * static_cast<double>(job.columns);
  }
  parallel_for(pieces, work, [&](int64_t piece) {
    for (const PackJob& job : jobs) {
      if (job.from == nullptr) continue;
      if (piece < job.pieces()) return job.run(piece);
      piece -= job.pieces();
    }
  });
}

// Where results wait to be copied to where they belong: lines that come from afar, one by one in the middle of
// products, would hold the buffers that the products' loads want.
struct Staged {
  BFloat16* data;
  int64_t row;  // elements, a multiple of kStep
  static Staged take(Carver& carver, int64_t rows, int64_t columns) {
    return {carver.take<BFloat16>(round_up(rows, kStep) * round_up(columns, kStep)), round_up(columns, kStep)};
  }
  // A row of a square, rounded.
  void keep(int64_t r, int64_t column, FloatVec low, FloatVec high) const {
    _mm512_store_si512(data + r * row + column, row_of_bfloat16(low, high));
  }
  void copy_to(const Matrix& to, int64_t first, int64_t column, int64_t rows, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      BFloat16* at = static_cast<BFloat16*>(to.data) + (first + r) * to.row_stride + column;
      for (int64_t i = 0; i < columns; i += kStep) {
        _mm512_mask_storeu_epi16(at + i, first_lanes32(columns - i), _mm512_load_si512(data + r * row + i));
      }
    }
  }
};

// Items [0, count) shared out evenly to `parts`.
struct Parts {
  int64_t count, parts;
  int64_t begin(int64_t part) const { return part * count / parts; }
};
// As few parts of at most `most` items as there can be, but a multiple of `threads` where there are items enough.
inline Parts share_out(int64_t count, int64_t most, int64_t threads) {
  const int64_t least = ceil_div(count, max(most, 1));
  return {count, min(round_up(least, threads), count)};
}

}  // namespace fastattn::FASTATTN_ISA
