#pragma once

#include "attention.h"
#include "isa.h"

namespace fastattn {

// weights = dropout(exp(scores - lse)), 0 where invisible; v, sinks and lse's origin play no part.
struct AttentionWeightsArgs {
  AttentionProblem problem;
  View lse;           // [batch, num_heads_q, seq_len_q], double
  View out;           // [batch, num_heads_q, seq_len_q, seq_len_k], dtype of q, columns contiguous
  bool mean = false;  // over the query heads: out is then [batch, 1, seq_len_q, seq_len_k]
};

FASTATTN_DECLARE(void attention_weights(const AttentionWeightsArgs& args))
FASTATTN_DECLARE_AMX(attention_weights, AttentionWeightsArgs)

}  // namespace fastattn
