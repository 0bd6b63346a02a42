// Passes over blocks of logits: a row of a block (16 KiB) is read from memory once and from the first-level cache
// twice.
#include "logits.h"

#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRows = 16;  // of a task

// Calls body(row, logits) for all rows.
template <typename Body>
void for_each_row(const LogitsArgs& args, const Body& body) {
  const double work = 8.0 * static_cast<double>(args.rows) * static_cast<double>(args.columns);
  parallel_for(ceil_div(args.rows, kRows), work, [&](int64_t task) {
    for (int64_t row = task * kRows; row < min((task + 1) * kRows, args.rows); ++row) {
      body(row, args.data + row * args.row_stride);
    }
  });
}

FloatVec largest_of(const float* logits, int64_t columns) {
  // Four chains; lanes that do not exist stay -inf. max(x, m) lets a NaN in x through only if m comes second and is
  // not one: a row with a NaN gets its NaN from the sum.
  const FloatVec lowest = FloatVec::set1(-__builtin_inff());
  FloatVec best[4] = {lowest, lowest, lowest, lowest};
  constexpr int W = FloatVec::kWidth;
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) best[k] = max(load(logits + j + k * W), best[k]);
  }
  for (; j + W <= columns; j += W) best[0] = max(load(logits + j), best[0]);
  if (j < columns) {
    float rest[W];
    store(rest, lowest);
    for (int64_t k = j; k < columns; ++k) rest[k - j] = logits[k];
    best[0] = max(load(rest), best[0]);
  }
  return max(max(best[0], best[1]), max(best[2], best[3]));
}

}  // namespace

void logits_statistics(const LogitsArgs& args, float* largest, double* sum, double* total) {
  const float infinity = __builtin_inff();
  for_each_row(args, [&](int64_t row, const float* logits) {
    const float here = reduce_max(largest_of(logits, args.columns));
    const float before = largest[row], now = here > before ? here : before;
    // Subtracting 0 where all are -inf; and where one is +inf, its row is Inf - Inf = NaN as in PyTorch.
    const float shift = now == -infinity ? 0.0f : now;
    const FloatVec less = FloatVec::set1(shift), zero = FloatVec::zero();
    FloatVec exps[2] = {zero, zero}, sums[2] = {zero, zero};
    int odd = 0;
    for_each_vec<float>(args.columns, [&](int64_t j, auto n) {
      const FloatVec x = load_as_n<float>(logits + j, n);
      FloatVec e = exp(x - less);
      if (n < FloatVec::kWidth) {
        float lanes[FloatVec::kWidth];
        store(lanes, e);
        e = load_as_n<float>(lanes, static_cast<int>(n));
      }
      exps[odd] = exps[odd] + e;
      sums[odd] = sums[odd] + x;
      odd ^= 1;
    });
    const double kept = before == -infinity ? 0.0 : sum[row] * __builtin_exp(static_cast<double>(before - shift));
    sum[row] = kept + static_cast<double>(reduce_add(exps[0] + exps[1]));
    if (total != nullptr) total[row] += static_cast<double>(reduce_add(sums[0] + sums[1]));
    largest[row] = now;
  });
}

void logits_gradient(const LogitsArgs& args, const float* lse, const float* scale, float less, void* out,
                     int64_t out_stride, DType dtype) {
  visit(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      const FloatVec minus = FloatVec::set1(less);
      for_each_row(args, [&](int64_t row, const float* logits) {
        const FloatVec shift = FloatVec::set1(lse[row]), factor = FloatVec::set1(scale[row]);
        T* to = static_cast<T*>(out) + row * out_stride;
        for_each_vec<float>(args.columns, [&](int64_t j, auto n) {
          store_n(to + j, (exp(load_as_n<float>(logits + j, n) - shift) - minus) * factor, n);
        });
      });
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
