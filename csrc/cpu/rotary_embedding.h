// The rotary embedding (Su et al., "RoFormer", 2021) of queries and keys.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// Pairs (i, i + rotary_dim / 2), or (2 i, 2 i + 1), of the first rotary_dim features are rotated by the angle of their
// position; the others are copied.
struct RotaryEmbeddingArgs {
  struct Operand {
    View from, to;  // [batch, heads, seq_len, head_dim], rows contiguous, of one dtype; absent without data
    int64_t heads = 0;
  };
  Operand query, key;
  int64_t batch = 0, seq_len = 0, head_dim = 0, rotary_dim = 0;
  bool interleaved = false, inverse = false;
  double scale = 1.0;

  // Either how far each pair turns a position, in 2^-64 of a turn, and the positions; or cosines and sines.
  const int64_t* turns = nullptr;      // [rotary_dim / 2]
  const int64_t* positions = nullptr;  // null: offset, offset + 1, ...
  int64_t position_stride = 0;         // from one batch entry to the next
  int64_t offset = 0;
  View cos, sin;  // [batch, seq_len, rotary_dim / 2] in stride[0] and stride[1], rows contiguous
};

FASTATTN_DECLARE(void rotary_embedding(const RotaryEmbeddingArgs& args))

}  // namespace fastattn
