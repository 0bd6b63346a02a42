// Which attention calls AMX serves. Forward and backward answer alike, because a probability is as exact as the lse
// that it is taken from: both must have seen the same scores, bit for bit.
#pragma once

#include "amx_pieces.h"
#include "attention.h"

namespace fastattn::FASTATTN_ISA {

// A single query's time is that of reading the keys: packing them would double it. In bfloat16 the backward is level
// with AVX-512 at 2 to 4 queries and ahead from 8 on. With one key dP - delta is 0, but for the rounding of out that
// delta comes from; AVX-512's kernel mends it.
constexpr int64_t kMinRows = 2, kMinKeys = 2;
// Cut into pieces, operands are dearer to pack and tiles dearer to waste. Measured: float32 is level with AVX-512 at 64
// queries and keys of 64 elements, float16 ahead; float32 of 16 elements is behind at any length. Six products
// are worth the packing of four operands only where there are enough of them: at 128 x 128 x 64 AMX takes 0.8 of
// AVX-512's time forward, but 1.3 with the backward.
constexpr int64_t kMinCut = 64, kMinDims = 64, kMinWork = 64 * 512 * 128;

inline bool amx_takes(const AttentionProblem& p) {
  if (p.q.dtype == DType::kFloat64) return false;
  if (p.q.dtype == DType::kBFloat16) return p.seq_len_q >= kMinRows;
  const int64_t dims = p.head_dim + p.head_dim_v;
  if (p.q.dtype == DType::kFloat32 && (dims < kMinDims || p.seq_len_q * p.seq_len_k * dims < kMinWork)) return false;
  return p.seq_len_q >= kMinCut && p.seq_len_k >= kMinCut;
}

// Operands whose largest elements lie between these are exact enough in pieces. So is what lies between two products if
// dout's, and dout's times the values', are large enough.
constexpr float kVeryLarge = 0x1p30f, kVerySmall = 0x1p-60f, kVerySmallOutput = 0x1p-80f;
inline bool is_very_small(float largest) { return largest != 0 && largest < kVerySmall; }

// Whether scores are small enough for their rounding not to be a factor of a probability: AVX-512 rounds them
// otherwise. `q` and `k` are the bits of the largest elements; `raw`, where the scale is not in the queries.
inline bool scores_fit(const AttentionProblem& p, uint32_t q, uint32_t k, bool raw) {
  constexpr double kLargeScore = 0x1p20;
  const double product = static_cast<double>(bit_cast<float>(q)) * static_cast<double>(bit_cast<float>(k));
  const double unit = raw ? __builtin_fabs(p.softmax_scale) * kLog2E : 1.0;
  // Infinity times 0 is NaN, and no less than anything.
  return product * static_cast<double>(p.head_dim) * unit < kLargeScore;
}

}  // namespace fastattn::FASTATTN_ISA
