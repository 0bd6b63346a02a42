// Products of bfloat16 matrices on AMX tiles, and the packing they want.
//
// A tile holds 16 rows of 64 bytes. One instruction multiplies 16 rows of A, 32 deep, by 16 columns of B and adds to 16
// x 16 floats. B stands in pairs of depths: row l of its tile is B[l'][0], B[l''][0], B[l'][1], B[l''][1], ... for any
// pairing of depths that A's columns follow too.
//
// Measured on a Sapphire Rapids core: a product takes 16 cycles whatever its operands; a tile load 8, a tile store 16.
// While products run, the second FMA unit of AVX-512 is off and the clock is a quarter lower.
#pragma once

#include "panel.h"
#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStep = 32;  // rows and columns of a product, and the depth of its steps

// Configures the calling thread's tiles while it lives: eight of 16 rows x 64 bytes.
class TileScope {
 public:
  TileScope() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The tile instructions. GCC's own intrinsics want literal numbers and do not say what memory a load reads.
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(kTile) : "memory");
}
// The same for what will not be wanted again soon: it leaves the first-level cache to others.
template <int kTile>
inline void tile_stream(const void* from, int64_t row) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// C[32][32] = A B or += A B, over `steps` depths of 32. All strides are in bytes.
struct Product {
  const void* a;
  int64_t a_row, a_step;  // from a row, from a step to the next
  const void* b;
  int64_t b_right, b_step;  // from the left tile to the right one, from a step to the next
  float* c;
  int64_t c_row;
  int64_t steps;
  bool accumulate;
  bool whole = false;  // of two pieces, the smallest product too
};

// Bytes of a step of an operand of 32 rows or columns: its pieces (amx_pieces.h), two tiles each.
constexpr int64_t kPieceBytes = 2 * kTileBytes;

// Multiplies 2 x 2 tiles at a time: each tile loaded serves two products, and four accumulators are in flight. Where
// operands are sums of two or three pieces, three (or all four) or six products of pieces are summed; a_row is then 64.
template <int kPieces>
class TileProducts {
 public:
  // Parts of a step: what runs uninterrupted.
  static int units(bool whole) { return kPieces == 1 ? 4 : kPieces == 2 ? 3 + whole : 6; }

  // The last product's C is in memory only after flush().
  void run(const Product& p) {
    step<true>(p, 0);
    for (int64_t i = 1; i < p.steps; ++i) step<false>(p, i);
  }

  void flush() {
    if (c_ == nullptr) return;
    tile_store<0>(c_, c_row_);
    tile_store<1>(c_ + 64, c_row_);
    tile_store<2>(c_ + 16 * c_row_, c_row_);
    tile_store<3>(c_ + 16 * c_row_ + 64, c_row_);
    c_ = nullptr;
  }

  // One of the four tiles of C in one step, or all four in one product of pieces.
  template <int kUnit, bool kFirst>
  void unit(const Product& p, int64_t step) {
    const char* a = static_cast<const char*>(p.a) + step * p.a_step;
    const char* b = static_cast<const char*>(p.b) + step * p.b_step;
    if constexpr (kPieces == 1) {
      if (kUnit == 0) tile_load<4>(a, p.a_row);
      if (kUnit == 0) tile_stream<6>(b, 64);
      if (kUnit == 1) tile_stream<7>(b + p.b_right, 64);
      if (kUnit == 2) tile_load<5>(a + 16 * p.a_row, p.a_row);
      if (kFirst) exchange<kUnit>(p);
      tile_multiply<kUnit, 4 + kUnit / 2, 6 + kUnit % 2>();
    } else {
      // Each product has a piece of the one before it.
      constexpr int kLeft[2][6] = {{0, 0, 1, 1}, {0, 0, 1, 1, 2, 0}}, kRight[2][6] = {{1, 0, 0, 1}, {2, 1, 1, 0, 0, 0}};
      constexpr int kA = kLeft[kPieces - 2][kUnit], kB = kRight[kPieces - 2][kUnit];
      constexpr int kBefore = kUnit == 0 ? 0 : kUnit - 1;
      constexpr bool kNewA = kUnit == 0 || kLeft[kPieces - 2][kBefore] != kA;
      constexpr bool kNewB = kUnit == 0 || kRight[kPieces - 2][kBefore] != kB;
      a += kA * kPieceBytes;
      b += kB * kPieceBytes;
      if (kNewA) tile_load<4>(a, 64);
      if (kNewB) tile_stream<6>(b, 64);
      if (kFirst && kUnit == 0) exchange<0>(p);
      tile_multiply<0, 4, 6>();
      if (kNewB) tile_stream<7>(b + p.b_right, 64);
      if (kFirst && kUnit == 0) exchange<1>(p);
      tile_multiply<1, 4, 7>();
      if (kNewA) tile_load<5>(a + kTileBytes, 64);
      if (kFirst && kUnit == 0) exchange<2>(p);
      tile_multiply<2, 5, 6>();
      if (kFirst && kUnit == 0) exchange<3>(p);
      tile_multiply<3, 5, 7>();
    }
  }

 private:
  template <bool kFirst>
  void step(const Product& p, int64_t step) {
    unit<0, kFirst>(p, step), unit<1, kFirst>(p, step), unit<2, kFirst>(p, step);
    if (kPieces != 2 || p.whole) unit<3, kFirst>(p, step);
    if constexpr (kPieces == 3) unit<4, kFirst>(p, step), unit<5, kFirst>(p, step);
  }

  // A tile store waits for its product and holds up the next one: each accumulator is stored only when its register is
  // wanted again, three products later.
  template <int kTile>
  void exchange(const Product& p) {
    char* c = reinterpret_cast<char*>(p.c);
    if (c_ != nullptr) tile_store<kTile>(c_ + kTile / 2 * 16 * c_row_ + kTile % 2 * 64, c_row_);
    if (p.accumulate) {
      tile_load<kTile>(c + kTile / 2 * 16 * p.c_row + kTile % 2 * 64, p.c_row);
    } else {
      tile_zero<kTile>();
    }
    if (kTile < 3) return;
    c_ = c;
    c_row_ = p.c_row;
  }

  char* c_ = nullptr;  // where the accumulators belong that are still in registers
  int64_t c_row_ = 0;
};
using Products = TileProducts<1>;

// Products that run while vectors are worked on: tiles and vectors have units of their own, which out-of-order
// execution keeps busy both where their instructions alternate closely. make(i) gives the i-th of `count` products.
template <int kPieces, typename Make>
class Background {
 public:
  Background(TileProducts<kPieces>& products, int64_t count, const Make& make)
      : products_(products), make_(make), count_(count) {
    if (count_ > 0) product_ = make_(0);
  }

  // A unit of a step of a product.
  void advance() {
    if (next_ == count_) return;
    step_ == 0 ? run_unit<true>() : run_unit<false>();
    if (++unit_ < products_.units(product_.whole)) return;
    unit_ = 0;
    if (++step_ < product_.steps) return;
    step_ = 0;
    if (++next_ < count_) product_ = make_(next_);
  }
  // Runs the first `count` products, or all of them, to their end.
  void finish(int64_t count) {
    while (next_ < min(count, count_)) advance();
    products_.flush();
  }
  void finish() { finish(count_); }

 private:
  template <bool kFirst>
  void run_unit() {
    switch (unit_) {
      case 0:
        return products_.template unit<0, kFirst>(product_, step_);
      case 1:
        return products_.template unit<1, kFirst>(product_, step_);
      case 2:
        return products_.template unit<2, kFirst>(product_, step_);
      case 3:
        return products_.template unit<3, kFirst>(product_, step_);
    }
    if constexpr (kPieces == 3) {
      unit_ == 4 ? products_.template unit<4, kFirst>(product_, step_)
                 : products_.template unit<5, kFirst>(product_, step_);
    }
  }

  TileProducts<kPieces>& products_;
  const Make& make_;
  Product product_;
  int64_t count_, next_ = 0, step_ = 0;
  int unit_ = 0;
};

inline bool is_finite(BFloat16 x) { return x.bits % 0x8000 < 0x7f80; }

inline __mmask32 first_lanes32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

// Packs B = source^T for up to 16 rows of source: a tile for each 32 columns of `depth`, consecutive depths paired.
inline void pack_transposed_tiles(char* to, const BFloat16* source, int64_t row_stride, int64_t rows, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 32, to += kTileBytes) {
    FloatVec block[16];  // a lane is a pair of bfloat16
    if (rows >= 16 && d + 32 <= depth) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = load(reinterpret_cast<const float*>(source + i * row_stride + d));
    } else {
      const __mmask32 lanes = first_lanes32(depth - d);
      for (int i = 0; i < 16; ++i) {
        const __m512i row = _mm512_maskz_loadu_epi16(i < rows ? lanes : 0, source + i * row_stride + d);
        block[i] = {_mm512_castsi512_ps(row)};
      }
    }
    transpose<float>(block);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(to + i * 64), block[i]);
  }
}

// Packs B = source for up to 32 rows of source: two tiles for each 32 columns, rows l and l + 16 paired, the order that
// merge_bfloat16 gives. Elements that are NaN or Inf become 0; returns whether there were none.
inline bool pack_tiles(char* to, const BFloat16* source, int64_t row_stride, int64_t rows, int64_t columns) {
  const __m512i left = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
  const __m512i infinity = _mm512_set1_epi16(static_cast<int16_t>(0xff00));  // without its sign
  bool finite = true;
  for (int64_t c = 0; c < columns; c += 32, to += 2 * kTileBytes) {
    const __mmask32 lanes = first_lanes32(columns - c);
    for (int64_t l = 0; l < 16; ++l) {
      const BFloat16* from = source + l * row_stride + c;
      __m512i a = _mm512_maskz_loadu_epi16(l < rows ? lanes : 0, from);
      __m512i b = _mm512_maskz_loadu_epi16(l + 16 < rows ? lanes : 0, from + 16 * row_stride);
      const __mmask32 bad_a = _mm512_cmpge_epu16_mask(_mm512_add_epi16(a, a), infinity);
      const __mmask32 bad_b = _mm512_cmpge_epu16_mask(_mm512_add_epi16(b, b), infinity);
      if (__builtin_expect((bad_a | bad_b) != 0, 0)) {
        finite = false;
        a = _mm512_maskz_mov_epi16(~bad_a, a);
        b = _mm512_maskz_mov_epi16(~bad_b, b);
      }
      _mm512_storeu_si512(to + l * 64, _mm512_permutex2var_epi16(a, left, b));
      _mm512_storeu_si512(to + kTileBytes + l * 64, _mm512_permutex2var_epi16(a, right, b));
    }
  }
  return finite;
}

// Packs A = source for up to kStep rows of source: kStep rows of 64 bytes for each 32 columns.
inline void pack_rows(char* to, const BFloat16* source, int64_t row_stride, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kStep) {
    const __mmask32 lanes = first_lanes32(columns - c);
    for (int64_t i = 0; i < kStep; ++i, to += 64) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(i < rows ? lanes : 0, source + i * row_stride + c));
    }
  }
}

// Transposes tiles of pairs where they lie: what pack_tiles packs as B becomes A = source^T, its columns paired alike.
inline void transpose_tiles(char* tiles, int64_t count) {
  for (int64_t t = 0; t < count; ++t, tiles += kTileBytes) {
    FloatVec block[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) block[i] = load(reinterpret_cast<const float*>(tiles + i * 64));
    transpose<float>(block);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(tiles + i * 64), block[i]);
  }
}

// Writes the transpose of 32 x 16 floats, scaled and rounded to nearest even: `columns` <= 32 elements of each of 16
// rows. row_of(i) is where the i-th column of source goes, null for nowhere.
template <typename RowOf>
inline void write_transposed(const RowOf& row_of, int64_t columns, const float* source, int64_t row_stride,
                             FloatVec scale) {
  // Two rows of source become one vector of pairs: a column of pairs, transposed, is a whole row.
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  FloatVec block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const FloatVec even = load(source + 2 * i * row_stride) * scale,
                   odd = load(source + (2 * i + 1) * row_stride) * scale;
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    block[i] = {_mm512_castsi512_ps(_mm512_permutexvar_epi16(pairs, rounded))};
  }
  transpose<float>(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    BFloat16* to = row_of(i);
    if (to != nullptr) _mm512_mask_storeu_epi16(to, first_lanes32(columns), _mm512_castps_si512(block[i].v));
  }
}

// Rounds two vectors to bfloat16, halfway cases away from 0, and interleaves them: a[0] b[0] a[1] b[1] ...
inline __m512i merge_bfloat16(FloatVec a, FloatVec b) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a.v), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(b.v), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

// A maximum or an lse, in powers of two, whose own rounding is more than 2^-5: a score beside it has to be rounded too.
constexpr float kHugeShift = 0x1p20f;

// a * b, rounded by itself whatever is done to it next.
inline FloatVec multiply_rounded(FloatVec a, FloatVec b) {
  return {_mm512_mul_round_ps(a.v, b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// Writes log(x * 2^n) for x >= 0, within 2e-12; an infinite or NaN n goes through.
inline void log_of_scaled(FloatVec x, FloatVec n, double* to) {
  // log(m) = 2 atanh(z) for m in [3/4, 3/2) and z = (m - 1) / (m + 1), |z| <= 1/5: the next term is 1e-12 of the first.
  constexpr double kAtanh[] = {2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15};
  const DoubleVec one = DoubleVec::set1(1.0);
  float lanes[2][16];
  store(lanes[0], x);
  store(lanes[1], n);
  for (int i = 0; i < 16; i += 8) {
    const DoubleVec wide = load_as<double>(lanes[0] + i);
    const DoubleVec m = {_mm512_getmant_pd(wide.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero)};
    const DoubleVec exponent = select(lt(m, one), one, DoubleVec::zero()) + DoubleVec{_mm512_getexp_pd(wide.v)};
    const DoubleVec z = (m - one) / (m + one), power = exponent + load_as<double>(lanes[1] + i);
    store(to + i, fma(power, DoubleVec::set1(kLn2), z * polynomial(z * z, kAtanh)));
  }
}

// Combines the lanes of each of 16 vectors: lane i of the result is that of x[i]. A quarter of 16 reductions' work.
template <typename Combine>
inline FloatVec reduce_each(FloatVec (&x)[16], const Combine& combine) {
  // Each step folds two vectors into one: half of each stays in place, the other halves move onto them.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 kept = _mm512_mask_blend_ps(0xff00, x[i].v, x[i + 8].v);
    x[i] = combine(FloatVec{kept}, FloatVec{_mm512_shuffle_f32x4(x[i].v, x[i + 8].v, 0x4e)});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 kept = _mm512_mask_blend_ps(0xf0f0, x[i].v, x[i + 4].v);
    const __m512 other = _mm512_mask_blend_ps(0x0f0f, x[i].v, x[i + 4].v);
    x[i] = combine(FloatVec{kept}, FloatVec{_mm512_shuffle_f32x4(other, other, 0xb1)});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 kept = _mm512_mask_blend_ps(0xcccc, x[i].v, x[i + 2].v);
    x[i] = combine(FloatVec{kept}, FloatVec{_mm512_shuffle_ps(x[i].v, x[i + 2].v, 0x4e)});
  }
  const __m512 kept = _mm512_mask_blend_ps(0xaaaa, x[0].v, x[1].v);
  const __m512 other = _mm512_mask_blend_ps(0x5555, x[0].v, x[1].v);
  return combine(FloatVec{kept}, FloatVec{_mm512_permute_ps(other, 0xb1)});
}

}  // namespace fastattn::FASTATTN_ISA
