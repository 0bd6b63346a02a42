// Who may see whom: the only definition of masking in C++. Kernels ask it for ranges, for whole tiles and for 64 keys
// of a row at a time.
#pragma once

#include "attention.h"
#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

struct Range {
  int64_t begin, end;  // empty when end <= begin
};

enum class Coverage { kNone, kSome, kAll };

// Bits [begin, end) of 64, the ends clamped.
inline uint64_t bit_range(int64_t begin, int64_t end) {
  begin = max(begin, 0);
  end = min(end, 64);
  if (begin >= end) return 0;
  return (~uint64_t{0} >> (64 - (end - begin))) << begin;
}

// The mask of one batch entry and one query head.
class Mask {
 public:
  Mask(const AttentionProblem& p, int64_t batch, int64_t head) : seq_len_q_(p.seq_len_q), key_limit_(p.seq_len_k) {
    const AttentionMask& m = p.mask;
    // Beyond these bounds the band covers everything or nothing, and sums with positions cannot overflow.
    diag_lo_ = max(m.diag_lo, -p.seq_len_q);
    diag_hi_ = min(m.diag_hi, p.seq_len_k);
    diag_lo_ = min(diag_lo_, p.seq_len_k + 1);
    diag_hi_ = max(diag_hi_, -p.seq_len_q - 1);
    if (m.key_lengths != nullptr) key_limit_ = max(0, min(key_limit_, m.key_lengths[batch]));
    if (m.segments_q != nullptr) {
      segments_q_ = m.segments_q + batch * p.seq_len_q;
      segments_k_ = m.segments_k + batch * p.seq_len_k;
    }
    if (m.dense != nullptr) {
      dense_ = m.dense + batch * m.dense_stride[0] + head * m.dense_stride[1];
      dense_row_ = m.dense_stride[2];
      dense_column_ = m.dense_stride[3];
    }
  }

  // Keys outside this range are invisible to every query of [row_begin, row_end).
  Range k_range(int64_t row_begin, int64_t row_end) const {
    return {max(0, row_begin + diag_lo_), min(key_limit_, row_end + diag_hi_)};
  }

  // Queries outside this range see no key of [column_begin, column_end).
  Range q_range(int64_t column_begin, int64_t column_end) const {
    if (column_begin >= key_limit_) return {0, 0};
    return {max(0, column_begin - diag_hi_), min(seq_len_q_, min(column_end, key_limit_) - diag_lo_)};
  }

  // Whether a tile is invisible, visible, or mixed. Exact for the band and the lengths; segments and dense masks
  // may answer kSome for a tile that is in fact uniform.
  Coverage coverage(Range rows, Range columns) const {
    const Range possible = k_range(rows.begin, rows.end);
    if (columns.begin >= possible.end || columns.end <= possible.begin) return Coverage::kNone;
    // The last row starts latest and the first row ends earliest.
    bool all = columns.begin >= rows.end - 1 + diag_lo_ && columns.end <= min(key_limit_, rows.begin + diag_hi_ + 1);
    if (segments_q_ != nullptr) {
      int32_t low_q, high_q, low_k, high_k;
      bounds(segments_q_, rows, &low_q, &high_q);
      bounds(segments_k_, columns, &low_k, &high_k);
      if (high_q < low_k || high_k < low_q) return Coverage::kNone;
      all = all && low_q == high_q && low_k == high_k;
    }
    if (dense_ != nullptr) {
      uint64_t any = 0, missing = 0;
      const int64_t row_end = dense_row_ == 0 ? rows.begin + 1 : rows.end;
      for (int64_t i = rows.begin; i < row_end; ++i) {
        for (int64_t j = columns.begin; j < columns.end; j += 64) {
          const uint64_t bits = dense_bits(i, j, columns.end);
          any |= bits;
          missing |= ~bits & bit_range(0, columns.end - j);
        }
      }
      if (any == 0) return Coverage::kNone;
      all = all && missing == 0;
    }
    return all ? Coverage::kAll : Coverage::kSome;
  }

  // Bit k says whether query `row` may see key column + k.
  uint64_t visible_bits(int64_t row, int64_t column) const {
    uint64_t bits = bit_range(row + diag_lo_ - column, min(key_limit_, row + diag_hi_ + 1) - column);
    if (bits == 0) return 0;
    if (segments_q_ != nullptr) {
      bits &= bits_equal(segments_k_ + column, segments_q_[row], static_cast<int>(min(64, key_limit_ - column)));
    }
    if (dense_ != nullptr) bits &= dense_bits(row, column, key_limit_);
    return bits;
  }

  bool visible(int64_t row, int64_t column) const { return visible_bits(row, column) & 1; }

 private:
  static void bounds(const int32_t* ids, Range range, int32_t* low, int32_t* high) {
    int32_t smallest = ids[range.begin], largest = smallest;
    for (int64_t i = range.begin + 1; i < range.end; ++i) {
      smallest = ids[i] < smallest ? ids[i] : smallest;
      largest = ids[i] > largest ? ids[i] : largest;
    }
    *low = smallest;
    *high = largest;
  }

  uint64_t dense_bits(int64_t row, int64_t column, int64_t column_end) const {
    const int n = static_cast<int>(min(64, column_end - column));
    const uint8_t* p = dense_ + row * dense_row_ + column * dense_column_;
    if (dense_column_ == 1) return bits_nonzero(p, n);
    if (dense_column_ == 0) return *p != 0 ? bit_range(0, n) : 0;
    uint64_t bits = 0;
    for (int k = 0; k < n; ++k) bits |= uint64_t{p[k * dense_column_] != 0} << k;
    return bits;
  }

  int64_t seq_len_q_, key_limit_, diag_lo_, diag_hi_;
  const int32_t* segments_q_ = nullptr;
  const int32_t* segments_k_ = nullptr;
  const uint8_t* dense_ = nullptr;
  int64_t dense_row_ = 0, dense_column_ = 0;
};

}  // namespace fastattn::FASTATTN_ISA
