// What the feed-forward's kernels share: operands as panels and as blocks of rows, and the activation of a block.
//
// Tokens are the lanes. hidden^T = W_in x^T takes the weights as the left operand, read where they lie as broadcast
// scalars, and the tokens, transposed into panels, as the right one. Its result is then, without any packing, the right
// operand of out^T = W_out hidden^T, and a handful of tokens costs no packing of weights at all.
#pragma once

#include "activation.h"
#include "panel.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {

// Summed at once in registers: 128 rows of a panel (32 KiB) stay in the first-level cache while all rows of the left
// operand pass, and sums of sums are more exact than one long chain. Fixed, so that no other choice changes a bit.
constexpr int64_t kDepth = 128;
constexpr int64_t kLanes = kPanelWidth<float>;

// A block of `rows` x `depth` <= kDepth of a left operand: where it lies, or widened into `buffer`.
struct Block {
  const float* data;
  int64_t row_stride;
};
template <typename T>
inline Block left_block(const Matrix& matrix, int64_t row, int64_t column, int64_t rows, int64_t depth, float* buffer) {
  const T* from = static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (buffer == nullptr) return {from, matrix.row_stride};
  }
  for (int64_t i = 0; i < rows; ++i) {
    for_each_vec<float>(depth, [&](int64_t k, auto n) {
      store(buffer + i * kDepth + k, load_as_n<float>(from + i * matrix.row_stride + k, n));
    });
  }
  return {buffer, kDepth};
}

// Products of a block of tokens, held as panels [ceil(tokens / kLanes)][panel_rows][kLanes].
struct Panels {
  float* data;
  int64_t tokens, panel_rows;
  float* row(int64_t token, int64_t i) const {
    return data + (token / kLanes * panel_rows + i) * kLanes + token % kLanes;
  }
};

// to[i0 + i] (+)= W[row + i][column .. column + depth) * from[k0 .. k0 + depth), in steps of kDepth; overwrites where
// `start` says so.
template <typename T>
inline void product(const Matrix& weight, int64_t row, int64_t column, int64_t rows, int64_t depth, const Panels& from,
                    int64_t k0, const Panels& to, int64_t i0, bool start, float* buffer) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = min(kDepth, depth - k);
    const Block a = left_block<T>(weight, row, column + k, rows, n, buffer);
    const bool overwrite = start && k == 0;
    multiply<float>(rows, from.tokens, n, a.data, a.row_stride, 1, from.data + (k0 + k) * kLanes,
                    panel_size<float>(from.panel_rows), [&](int64_t i, int64_t token, FloatVec value) {
                      float* p = to.row(token, i0 + i);
                      store(p, overwrite ? value : load(p) + value);
                    });
  }
}

template <typename T>
inline FloatVec broadcast(const void* vector, int64_t i) {
  return FloatVec::set1(vector == nullptr ? 0.0f : to_float(static_cast<const T*>(vector)[i]));
}

// Drops and rescales the hidden units [f, f + rows) of the tokens from `token` on, which stand in rows i0 .. of panels;
// f is a multiple of 4.
inline void drop(const Dropout& dropout, int64_t token, int64_t f, int64_t rows, const Panels& panels, int64_t i0) {
  constexpr int W = FloatVec::kWidth;
  const FloatVec rescale = FloatVec::set1(static_cast<float>(dropout.rescale));
  for (int64_t t = 0; t < panels.tokens; t += kLanes) {
    for (int64_t i = 0; i < rows; i += 4) {
      uint64_t keep[4];
      dropout_keep_bits_of_rows(dropout, 0, static_cast<uint64_t>(token + t), static_cast<uint64_t>(f + i), kLanes,
                                keep);
      for (int64_t j = 0; j < 4 && i + j < rows; ++j) {
        float* h = panels.row(t, i0 + i + j);
        for (int64_t lane = 0; lane < kLanes; lane += W) {
          const auto mask = mask_from_bits<float>(keep[j] >> lane);
          store(h + lane, select(mask, load(h + lane) * rescale, FloatVec::zero()));
        }
      }
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
