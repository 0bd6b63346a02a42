// Matrix products of one thread: C = A * B with B packed into panels, the part every kernel shares.
//
// A panel is kPanelWidth columns of B, row after row: element (k, n) of panel p stands at
// panels[p * panel_size(depth) + k * kPanelWidth + n]; columns beyond the matrix are 0. The product keeps a tile of
// kTileRows x kPanelWidth of C in registers.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// Two FMA ports x 4 cycles want 8 chains; each step of k loads kPanelVecs vectors of B and broadcasts kTileRows
// elements of A for kPanelVecs * kTileRows FMAs. AVX-512 has 32 registers: 6 x 4 accumulators + 4 of B + 1 of A = 29,
// and 10 loads a step against 12 cycles of FMAs. With 16 registers: 6 x 2 + 2 + 1 = 15.
#if defined(FASTATTN_ISA_AVX512)
constexpr int kPanelVecs = 4;
#else
constexpr int kPanelVecs = 2;
#endif
constexpr int kTileRows = 6;
template <typename C>
constexpr int kPanelWidth = kPanelVecs * Vec<C>::kWidth;

// Elements of one panel, and of all panels of a matrix.
template <typename C>
inline int64_t panel_size(int64_t depth) {
  return depth * kPanelWidth<C>;
}
template <typename C>
inline int64_t panels_size(int64_t depth, int64_t columns) {
  return ceil_div(columns, kPanelWidth<C>) * panel_size<C>(depth);
}

// Packs B[k][n] = source[k * row_stride + n] into panels `panel_stride` apart: panel_size(depth), or more where only
// the first rows are filled. Returns whether every element is finite.
template <typename C, typename T>
inline bool pack(C* panels, const T* source, int64_t row_stride, int64_t depth, int64_t columns, int64_t panel_stride) {
  constexpr int W = Vec<C>::kWidth;
  Vec<C> poison = Vec<C>::zero();  // 0 * x is NaN for NaN and Inf
  for (int64_t n = 0; n < columns; n += kPanelWidth<C>) {
    const int64_t width = min(kPanelWidth<C>, columns - n);
    const int64_t whole = width / W * W;
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = source + k * row_stride + n;
      C* to = panels + k * kPanelWidth<C>;
      for (int64_t i = 0; i < whole; i += W) {
        const Vec<C> x = load_as<C>(from + i);
        poison = fma(x, Vec<C>::zero(), poison);
        store(to + i, x);
      }
      if (whole < width) {
        const Vec<C> x = load_as_n<C>(from + whole, static_cast<int>(width - whole));
        poison = fma(x, Vec<C>::zero(), poison);
        store(to + whole, x);
      }
      for (int64_t i = round_up(width, W); i < kPanelWidth<C>; i += W) store(to + i, Vec<C>::zero());
    }
    panels += panel_stride;
  }
  const C sum = reduce_add(poison);
  return sum == sum;
}

// Transposes a square of registers by log2(kWidth) perfect shuffles.
template <typename C>
inline void transpose(Vec<C> (&rows)[Vec<C>::kWidth]) {
  constexpr int W = Vec<C>::kWidth;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Vec<C> shuffled[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) interleave(rows[i], rows[i + W / 2], &shuffled[2 * i], &shuffled[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = shuffled[i];
  }
}

// Packs the transpose, B[k][n] = source[n * row_stride + k], of a matrix of `columns` rows of `depth` elements.
template <typename C, typename T>
inline void pack_transposed(C* panels, const T* source, int64_t row_stride, int64_t depth, int64_t columns) {
  constexpr int W = Vec<C>::kWidth;
  for (int64_t n = 0; n < columns; n += W) {
    C* to = panels + n / kPanelWidth<C> * panel_size<C>(depth) + n % kPanelWidth<C>;
    const int64_t width = min(W, columns - n);
    for (int64_t k = 0; k < depth; k += W) {
      const int64_t height = min(W, depth - k);
      const T* from = source + n * row_stride + k;
      Vec<C> block[W];
      if (width == W && height == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load_as<C>(from + i * row_stride);
      } else {
        for (int i = 0; i < W; ++i) {
          block[i] = i < width ? load_as_n<C>(from + i * row_stride, static_cast<int>(height)) : Vec<C>::zero();
        }
      }
      transpose<C>(block);
      for (int64_t i = 0; i < height; ++i) store(to + (k + i) * kPanelWidth<C>, block[i]);
    }
  }
  for (int64_t n = round_up(columns, W); n % kPanelWidth<C> != 0; n += W) {
    C* to = panels + n / kPanelWidth<C> * panel_size<C>(depth) + n % kPanelWidth<C>;
    for (int64_t k = 0; k < depth; ++k) store(to + k * kPanelWidth<C>, Vec<C>::zero());
  }
}

// One register tile: `finish(row, column, value)` gets the vectors of A[0..R) * panel[.., 0..V vectors).
template <int R, int V, typename C, typename Finish>
inline void multiply_tile(const C* a, int64_t a_row, int64_t a_column, const C* panel, int64_t depth, int64_t row,
                          int64_t column, const Finish& finish) {
  Vec<C> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec<C>::zero();
  }
#pragma GCC unroll 2  // measured: 2 brings 5 % over 1, and 4 and 8 bring nothing more
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * Vec<C>::kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<C> x = Vec<C>::set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fma(x, b[v], sum[r][v]);
    }
    a += a_column;
    panel += kPanelWidth<C>;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) finish(row + r, column + v * Vec<C>::kWidth, sum[r][v]);
  }
}

// All rows of one panel. Where the matrix leaves fewer vectors a row, the register tile is taller instead.
template <int V, typename C, typename Finish>
inline void multiply_panel(int64_t rows, int64_t depth, const C* a, int64_t a_row, int64_t a_column, const C* panel,
                           int64_t column, const Finish& finish) {
  constexpr int R = kTileRows * kPanelVecs / V < 12 ? kTileRows * kPanelVecs / V : 12;
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    multiply_tile<R, V>(a + i * a_row, a_row, a_column, panel, depth, i, column, finish);
  }
  for (; i + 4 <= rows; i += 4) {
    multiply_tile<4, V>(a + i * a_row, a_row, a_column, panel, depth, i, column, finish);
  }
  if (i + 2 <= rows) {
    multiply_tile<2, V>(a + i * a_row, a_row, a_column, panel, depth, i, column, finish);
    i += 2;
  }
  if (i < rows) multiply_tile<1, V>(a + i * a_row, a_row, a_column, panel, depth, i, column, finish);
}

// C = A * B for A[i][k] = a[i * a_row + k * a_column]. `finish(i, n, value)` is called once for each vector of C, with
// n a multiple of kWidth; the last vector of a row may reach beyond `columns`, with zeros there. Panels are
// `panel_stride` apart: panel_size(depth), or more where only a part of the packed rows is used.
template <typename C, typename Finish>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row, int64_t a_column,
                     const C* panels, int64_t panel_stride, const Finish& finish) {
  for (int64_t n = 0; n < columns; n += kPanelWidth<C>) {
    const int64_t vecs = ceil_div(min(kPanelWidth<C>, columns - n), Vec<C>::kWidth);
    const C* panel = panels + n / kPanelWidth<C> * panel_stride;
#if defined(FASTATTN_ISA_AVX512)
    if (vecs == 4) multiply_panel<4>(rows, depth, a, a_row, a_column, panel, n, finish);
    if (vecs == 3) multiply_panel<3>(rows, depth, a, a_row, a_column, panel, n, finish);
#endif
    if (vecs == 2) multiply_panel<2>(rows, depth, a, a_row, a_column, panel, n, finish);
    if (vecs == 1) multiply_panel<1>(rows, depth, a, a_row, a_column, panel, n, finish);
  }
}

}  // namespace fastattn::FASTATTN_ISA
