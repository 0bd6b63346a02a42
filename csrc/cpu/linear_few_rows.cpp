// out [rows, columns] = input [rows, depth] * weight [columns, depth]^T + bias.
//
// A task takes kTask columns, four at a time: their weights stay in the first-level cache while the rows pass, up to
// four at a time, in tiles of 4 x 4 sums, and the next four columns' weights are fetched meanwhile. A sum has one lane
// for each element of a register, and no task shares one, so that bits do not depend on the number of threads.
#include "linear_few_rows.h"

#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kColumns = 4, kRows = 4;  // of a tile: 16 sums, 4 weights and an input in 32 registers
constexpr int64_t kTask = 32;               // columns: 64 KiB of weights 512 deep

// values[i] = the sum of the lanes of sum[i]. As many sums as a register has lanes are added up together: each step
// interleaves pairs and adds their halves, so that the last one's lanes are the sums, in order.
template <int N>
inline void add_up(const FloatVec (&sum)[N], float* values) {
  constexpr int W = FloatVec::kWidth;
  int i = 0;
  for (; i + W <= N; i += W) {
    FloatVec v[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) v[j] = sum[i + j];
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < half; ++j) {
        FloatVec low, high;
        interleave(v[j], v[j + half], &low, &high);
        v[j] = low + high;
      }
    }
    store(values + i, v[0]);
  }
  for (; i < N; ++i) values[i] = reduce_add(sum[i]);
}

template <int R, int C>
void tile(const LinearFewRowsArgs& args, int64_t row, int64_t column, bool fetch) {
  const float* x = args.input + row * args.depth;
  const float* w = args.weight + column * args.weight_stride;
  FloatVec sum[R * C];
  for (int i = 0; i < R * C; ++i) sum[i] = FloatVec::zero();
  const float* next = w + C * args.weight_stride;
  for_each_vec<float>(args.depth, [&](int64_t k, auto n) {
    FloatVec weight[C];
    for (int c = 0; c < C; ++c) {
      weight[c] = load_n(w + c * args.weight_stride + k, n);
      if (fetch) __builtin_prefetch(next + c * args.weight_stride + k);
    }
    for (int r = 0; r < R; ++r) {
      const FloatVec input = load_n(x + r * args.depth + k, n);
      for (int c = 0; c < C; ++c) sum[r * C + c] = fma(input, weight[c], sum[r * C + c]);
    }
  });
  float* out = args.out + row * args.columns + column;
  float values[R * C];
  add_up(sum, values);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      out[r * args.columns + c] = values[r * C + c] + (args.bias == nullptr ? 0.0f : args.bias[column + c]);
    }
  }
}

template <int C>
void columns_of_all_rows(const LinearFewRowsArgs& args, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= args.rows; row += kRows) tile<kRows, C>(args, row, column, row == 0);
  switch (args.rows - row) {
    case 3:
      return tile<3, C>(args, row, column, row == 0);
    case 2:
      return tile<2, C>(args, row, column, row == 0);
    case 1:
      return tile<1, C>(args, row, column, row == 0);
    default:
      return;
  }
}

}  // namespace

void linear_few_rows(const LinearFewRowsArgs& args) {
  const double work =
      static_cast<double>(args.rows) * static_cast<double>(args.columns) * static_cast<double>(args.depth);
  parallel_for(ceil_div(args.columns, kTask), work, [&](int64_t task) {
    const int64_t end = min((task + 1) * kTask, args.columns);
    int64_t column = task * kTask;
    for (; column + kColumns <= end; column += kColumns) columns_of_all_rows<kColumns>(args, column);
    for (; column < end; ++column) columns_of_all_rows<1>(args, column);
  });
}

}  // namespace fastattn::FASTATTN_ISA
