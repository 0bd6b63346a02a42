// How the feed-forward's work is cut where hidden units are the columns: a task is a group of hidden units, which takes
// a block of tokens after the other; what is a sum over all hidden units, tasks add up in turn, in the order of their
// units. An Engine (feed_forward_gradients.h) multiplies.
#pragma once

#include "feed_forward.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kCacheBytes = int64_t{768} << 10;  // a good part of a second-level cache
constexpr int64_t kTaskBytes = int64_t{16} << 20;    // of the working memory of a task, about
constexpr int64_t kMostUnits = 512;                  // of a group: every one packs all tokens

// A product in float32: element (i, j) stands at data[j / kColumns * block + i * row + j % kColumns].
template <int64_t kColumns>
struct ProductResult {
  float* data;
  int64_t row, block;
  ProductResult at(int64_t i, int64_t j) const {
    return {data + j / kColumns * block + i * row + j % kColumns, row, block};
  }
};

// Blocks of tokens: an operand of `width` columns stays in the second-level cache, and there are at least `least` of
// them where tokens allow.
struct TokenBlocks {
  int64_t size, count;
};
template <typename Engine>
inline TokenBlocks token_blocks(int64_t tokens, int64_t width, int64_t least) {
  constexpr int64_t kMostTokens = 512, kDepth = Engine::kDepth;
  const int64_t fit = min(kCacheBytes / (Engine::kBytes * width), tokens / least);
  const int64_t count = ceil_div(tokens, max(min(fit, kMostTokens) / kDepth, 1) * kDepth);
  const int64_t size = count == 1 ? round_up(tokens, Engine::kRows) : round_up(ceil_div(tokens, count), kDepth);
  return {size, ceil_div(tokens, size)};
}

// The hidden units in sub-blocks of Engine::kUnits, shared out to tasks.
struct UnitGroups {
  int64_t subblocks, tasks, group;  // group: most sub-blocks of a task
  int64_t begin(int64_t task) const { return task * subblocks / tasks; }
};
// `bytes(n)` is the working memory of a task of n sub-blocks.
template <typename Engine, typename Bytes>
inline UnitGroups unit_groups(int64_t ff_dim, int64_t tokens, int64_t threads, const Bytes& bytes) {
  const int64_t subblocks = ceil_div(ff_dim, Engine::kUnits), one = bytes(1), more = bytes(2) - one;
  // A task packs all tokens, and adds to a sum of as many rows: that wants many units. It packs their weights, which
  // are wanted again by every token: that wants few, so that they stay in the second-level cache. Few tokens, few
  // units.
  const int64_t most = max(min(kMostUnits, tokens) / Engine::kUnits, 1);
  const int64_t fit = min(most, max((kTaskBytes - one) / more + 1, 2));
  // As many tasks as threads, or a multiple of it.
  int64_t tasks = ceil_div(subblocks, fit);
  tasks = subblocks >= threads ? min(round_up(tasks, threads), subblocks) : subblocks;
  return {subblocks, tasks, ceil_div(subblocks, tasks)};
}

// keep[t]: of the 64 hidden units from `unit` on, those that dropout spares for token + t.
inline void draw_kept_units(const Dropout& dropout, int64_t token, int64_t tokens, int64_t unit, uint64_t* keep) {
  for (int64_t t = 0; t < tokens; ++t) {
    keep[t] = dropout_keep_bits(dropout, 0, static_cast<uint64_t>(token + t), static_cast<uint64_t>(unit));
  }
}

// Bytes of what carve(Carver&) hands out.
template <typename Carve>
inline int64_t measure(const Carve& carve) {
  char* const nowhere = reinterpret_cast<char*>(uintptr_t{64});  // never touched
  Carver carver(nowhere);
  carve(carver);
  return carver.next() - nowhere;
}

// [tokens, columns] in float32, to which tasks add in turn. It stands where the result is to be if that is float32 and
// whole tiles fit.
template <typename T, typename Engine>
class TurnSum {
 public:
  using Result = ProductResult<Engine::kColumns>;

  TurnSum(const Matrix& to, int64_t tokens, int64_t columns, const TokenBlocks& blocks)
      : to_(to), tokens_(tokens), columns_(columns), blocks_(blocks) {
    in_place_ = sizeof(T) == sizeof(float) && columns % Engine::kColumns == 0 && tokens % Engine::kRows == 0;
    if (to.data == nullptr) in_place_ = true;
    const int64_t row = round_up(columns, Engine::kColumns);
    sum_ = {in_place_ ? static_cast<float*>(to.data) : nullptr, in_place_ ? to.row_stride : row, Engine::kColumns};
  }
  void carve(Carver& carver) {
    turn_ = carver.take<int32_t>(blocks_.count);
    if (!in_place_) sum_.data = carver.take<float>(round_up(tokens_, Engine::kRows) * sum_.row);
  }
  void start() const {
    for (int64_t block = 0; block < blocks_.count; ++block) turn_[block] = 0;
  }

  // Calls add(sum) with the sum of a block of tokens when it is the turn of task `turn`. All else needs no order:
  // threads meet here alone. The last of all rounds the sum, plus `bias` [columns] unless that is null.
  template <typename Add>
  void add(int64_t block, int64_t turn, bool last, const void* bias, const Add& add) const {
    wait_for_turn(turn_ + block, turn);
    const int64_t token = block * blocks_.size;
    add(sum_.at(token, 0));
    if (last && (bias != nullptr || !in_place_)) write(token, min(blocks_.size, tokens_ - token), bias);
    pass_turn(turn_ + block);
  }

 private:
  void write(int64_t token, int64_t tokens, const void* bias) const {
    for_each_vec<float>(columns_, [&](int64_t i, auto n) {
      const FloatVec plus = bias == nullptr ? FloatVec::zero() : load_as_n<float>(static_cast<const T*>(bias) + i, n);
      for (int64_t t = token; t < token + tokens; ++t) {
        store_n(static_cast<T*>(to_.data) + t * to_.row_stride + i, load(sum_.data + t * sum_.row + i) + plus, n);
      }
    });
  }

  const Matrix to_;
  const int64_t tokens_, columns_;
  const TokenBlocks blocks_;
  bool in_place_;
  Result sum_{};
  int32_t* turn_ = nullptr;  // [blocks]: which task's turn it is
};

}  // namespace fastattn::FASTATTN_ISA
