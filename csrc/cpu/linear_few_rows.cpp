// out [rows, columns] = input [rows, depth] * weight [columns, depth]^T + bias.
//
// A task takes kTask columns, four at a time: their weights stay in the first-level cache while the rows pass, up to
// four at a time, in tiles of 4 x 4 sums, and the next four columns' weights are fetched meanwhile. A sum has one lane
// for each element of a register; its bits depend neither on the number of rows nor on that of threads.
#include "linear_few_rows.h"

#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kColumns = 4, kRows = 4;  // of a tile: 16 sums, 4 weights and an input in 32 registers
constexpr int64_t kTask = 32;               // columns: 64 KiB of weights 512 deep

template <typename T, int R, int C>
void tile(const LinearFewRowsArgs& args, int64_t row, int64_t column, bool fetch) {
  const T* x = static_cast<const T*>(args.input) + row * args.depth;
  const T* w = static_cast<const T*>(args.weight) + column * args.weight_stride;
  FloatVec sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = FloatVec::zero();
  }
  const T* next = w + C * args.weight_stride;
  for_each_vec<float>(args.depth, [&](int64_t k, auto n) {
    FloatVec weight[C];
    for (int c = 0; c < C; ++c) {
      weight[c] = load_as_n<float>(w + c * args.weight_stride + k, n);
      if (fetch) __builtin_prefetch(next + c * args.weight_stride + k);
    }
    for (int r = 0; r < R; ++r) {
      const FloatVec input = load_as_n<float>(x + r * args.depth + k, n);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(input, weight[c], sum[r][c]);
    }
  });
  const T* bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out) + row * args.columns + column;
  for (int r = 0; r < R; ++r) {
    float values[C];
    for (int c = 0; c < C; ++c)
      values[c] = reduce_add(sum[r][c]) + (bias == nullptr ? 0.0f : to_float(bias[column + c]));
    for (int c = 0; c < C; ++c) {
      if constexpr (sizeof(T) == sizeof(float)) {
        out[r * args.columns + c] = values[c];
      } else {
        store_n(out + r * args.columns + c, FloatVec::set1(values[c]), 1);
      }
    }
  }
}

template <typename T, int C>
void columns_of_all_rows(const LinearFewRowsArgs& args, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= args.rows; row += kRows) tile<T, kRows, C>(args, row, column, row == 0);
  switch (args.rows - row) {
    case 3:
      return tile<T, 3, C>(args, row, column, row == 0);
    case 2:
      return tile<T, 2, C>(args, row, column, row == 0);
    case 1:
      return tile<T, 1, C>(args, row, column, row == 0);
    default:
      return;
  }
}

}  // namespace

void linear_few_rows(const LinearFewRowsArgs& args) {
  const double work =
      static_cast<double>(args.rows) * static_cast<double>(args.columns) * static_cast<double>(args.depth);
  visit(args.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      parallel_for(ceil_div(args.columns, kTask), work, [&](int64_t task) {
        const int64_t end = min((task + 1) * kTask, args.columns);
        int64_t column = task * kTask;
        for (; column + kColumns <= end; column += kColumns) columns_of_all_rows<T, kColumns>(args, column);
        for (; column < end; ++column) columns_of_all_rows<T, 1>(args, column);
      });
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
