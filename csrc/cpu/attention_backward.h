#pragma once

#include "attention.h"
#include "isa.h"

namespace fastattn {

// Gradients of attention; a null view or pointer is a gradient that is not wanted. Those of biases and sinks are
// written in the compute type (float, double where q is double), to be rounded by the caller.
struct AttentionBackwardArgs {
  AttentionProblem problem;
  View out, dout;                // [batch, num_heads_q, seq_len_q, head_dim_v], dtype of q, columns contiguous
  const double* lse = nullptr;   // [batch, num_heads_q, seq_len_q], contiguous
  const double* dlse = nullptr;  // the same
  View dq, dk, dv;               // shapes and dtypes of q, k and v, columns contiguous
  View dbias;                    // shape of the bias, with stride 0 where it is broadcast, columns contiguous
  View drelative;                // [num_heads_q or 1, seq_len_q + seq_len_k - 1] as [0, head, 0, diagonal]
  void* dsinks = nullptr;        // [num_heads_q]
};

FASTATTN_DECLARE(void attention_backward(const AttentionBackwardArgs& args))
FASTATTN_DECLARE_AMX(attention_backward, AttentionBackwardArgs)

}  // namespace fastattn
