// One row of the running softmax: shared by the blocked forward and the decode kernel, so that both give a row the same
// meaning.
#pragma once

#include "attention_scores.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {

template <typename C>
inline C infinity() {
  return static_cast<C>(__builtin_inff());
}

// What has been seen of a row: probabilities are relative to exp2(max).
template <typename C>
struct RowState {
  C max;         // -inf: nothing
  Vec<C> sum;    // of the probabilities, lane by lane
  Vec<C> alpha;  // what the last step's new maximum scales the past by
};

// Turns `width` more scores of a row into probabilities, in place, whole vectors of them.
template <typename C>
inline void softmax_row(C* s, int64_t width, RowState<C>* state) {
  constexpr int W = Vec<C>::kWidth;
  Vec<C> highest = load(s);
  for (int64_t j = W; j < width; j += W) highest = max(highest, load(s + j));
  const C before = state->max, here = reduce_max(highest);
  const C now = here < before ? before : here;  // a NaN becomes the maximum and the whole row with it
  // -inf minus -inf is NaN, so a row that has seen nothing subtracts 0 instead.
  const Vec<C> shift = Vec<C>::set1(now == -infinity<C>() ? C(0) : now);
  state->alpha = exp2(Vec<C>::set1(before) - shift);
  Vec<C> sum = state->sum * state->alpha;
  for (int64_t j = 0; j < width; j += W) {
    const Vec<C> e = exp2(load(s + j) - shift);
    sum = sum + e;
    store(s + j, e);
  }
  state->sum = sum;
  state->max = now;
}

// Sets a row's dropped probabilities to 0; `column`, a multiple of 64, is that of s[0].
template <typename C>
inline void drop_row(C* s, int64_t width, const Dropout& dropout, int64_t slice, int64_t row, int64_t column) {
  for (int64_t j = 0; j < width; j += 64) {
    const uint64_t keep = dropout_keep_bits(dropout, static_cast<uint64_t>(slice), static_cast<uint64_t>(row),
                                            static_cast<uint64_t>(column + j));
    for (int64_t k = 0; k < 64 && j + k < width; k += Vec<C>::kWidth) {
      store(s + j + k, select(mask_from_bits<C>(keep >> k), load(s + j + k), Vec<C>::zero()));
    }
  }
}

// Ends a row of query head `head`: writes its lse, in natural-log units, and returns what its weighted values are to be
// multiplied by.
template <typename C>
inline C end_row(const AttentionProblem& p, int64_t head, C sum, C max, double* lse) {
  const double highest = static_cast<double>(max) * kLn2;
  if (p.sinks.data == nullptr) {
    if (sum == 0) {
      *lse = -__builtin_inf();
      return 0;
    }
    // A score of +inf makes the row NaN, but its lse is +inf.
    *lse = highest == __builtin_inf() ? highest : highest + __builtin_log(static_cast<double>(sum));
    return static_cast<C>(p.dropout.rescale / static_cast<double>(sum));
  }
  // The sink is one more logit in the denominator.
  double sink = 0;
  visit(p.sinks.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    sink = to_double(*row_of<const T>(p.sinks, 0, head, 0));
  });
  if (sum == 0 || sink == __builtin_inf()) {
    *lse = sink;
    return 0;
  }
  const double top = sink > highest ? sink : highest;
  const double kept = __builtin_exp(highest - top);
  const double total = static_cast<double>(sum) * kept + __builtin_exp(sink - top);
  *lse = top + __builtin_log(total);
  return static_cast<C>(kept * p.dropout.rescale / total);
}

// Rounds factor * from to a row of the output.
template <typename C>
inline void write_row(const View& out, int64_t batch, int64_t head, int64_t row, int64_t length, const C* from,
                      C factor) {
  visit(out.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(Compute<T>) == sizeof(C)) {
      T* to = row_of<T>(out, batch, head, row);
      for_each_vec<C>(length, [&](int64_t d, auto n) { store_n(to + d, load(from + d) * Vec<C>::set1(factor), n); });
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
