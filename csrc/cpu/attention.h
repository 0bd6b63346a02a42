// What an attention call is, to every attention kernel. The fields are those of `AttentionCall` (docs/architecture.md);
// sizes are already checked against each other, strides are in elements.
#pragma once

#include "common.h"

namespace fastattn {

// The visible set is the & of all that is present.
struct AttentionMask {
  int64_t diag_lo = INT64_MIN, diag_hi = INT64_MAX;  // visible only where diag_lo <= column - row <= diag_hi
  const int32_t* key_lengths = nullptr;              // [batch]
  const int32_t* segments_q = nullptr;               // [batch, seq_len_q]
  const int32_t* segments_k = nullptr;               // [batch, seq_len_k]
  const uint8_t* dense = nullptr;                    // [batch, num_heads_q, seq_len_q, seq_len_k]; nonzero may attend
  int64_t dense_stride[4] = {0, 0, 0, 0};
};

struct AttentionProblem {
  int64_t batch = 0, num_heads_q = 0, num_heads_kv = 0, seq_len_q = 0, seq_len_k = 0, head_dim = 0, head_dim_v = 0;
  View q, k, v;  // one dtype; columns are contiguous
  double softmax_scale = 1.0;
  double softcap = 0.0;  // 0: none
  AttentionMask mask;
  View bias[2];  // each any dtype: the additive bias, and the relative bias as a view with row stride -1
  View sinks;    // indexed by stride[1]
  Dropout dropout;
};

}  // namespace fastattn
