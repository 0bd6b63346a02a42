#pragma once

#include "attention.h"
#include "isa.h"

namespace fastattn {

// out = dropout(softmax(scores)) v and lse = log(sum(exp(scores))); docs/architecture.md has the details.
struct AttentionForwardArgs {
  AttentionProblem problem;
  View out;               // [batch, num_heads_q, seq_len_q, head_dim_v], dtype of q, columns contiguous
  double* lse = nullptr;  // [batch, num_heads_q, seq_len_q], contiguous
  // Without data, or what gets the mean over the query heads of the weights that dropout leaves: [batch, 1, seq_len_q,
  // seq_len_k], dtype of q, columns contiguous.
  View weights;
};

FASTATTN_DECLARE(void attention_forward(const AttentionForwardArgs& args))
FASTATTN_DECLARE_AMX(attention_forward, AttentionForwardArgs)

}  // namespace fastattn
