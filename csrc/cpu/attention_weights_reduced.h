#pragma once

#include "attention.h"
#include "isa.h"

namespace fastattn {

// What is asked of the weights; each result is contiguous, in the dtype of q.
enum class WeightsReduction {
  kKeySum,   // sum over the queries: [batch, num_heads_q, seq_len_k]
  kEntropy,  // -sum w log(w) of each row: [batch, num_heads_q, seq_len_q]
  kTopK,     // each row's largest weights, falling: [batch, num_heads_q, seq_len_q, top_k]
  kPooled,   // means of cells: [batch, num_heads_q, ceil(seq_len_q / pool_size), ceil(seq_len_k / pool_size)]
};

struct AttentionWeightsReducedArgs {
  AttentionProblem problem;
  View lse;  // [batch, num_heads_q, seq_len_q], double
  WeightsReduction reduction = WeightsReduction::kKeySum;
  int64_t top_k = 0;      // in [1, seq_len_k], for kTopK
  int64_t pool_size = 0;  // >= 1, for kPooled: queries and keys a cell
  void* out = nullptr;
  int64_t* keys = nullptr;  // for kTopK, of out's shape: whose weights they are; -1 where the weight is 0
};

FASTATTN_DECLARE(void attention_weights_reduced(const AttentionWeightsReducedArgs& args))

}  // namespace fastattn
