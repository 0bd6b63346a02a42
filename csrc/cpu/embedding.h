// Rows of an embedding, scaled, with positions and dropout, and the gradients of both tables.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// What tokens there are: token t has id ids[t] and position positions[t % period], or offset + t % period.
struct EmbeddingTokens {
  int64_t tokens = 0, columns = 0, period = 1, offset = 0;
  const int64_t* ids = nullptr;
  const int64_t* positions = nullptr;
  int64_t num_embeddings = 0, num_positions = 0;
  double scale = 1.0;
  Dropout dropout;
};

// out[t] = dropout(scale * weight[id] + table[position])
struct EmbeddingArgs {
  EmbeddingTokens tokens;
  View weight, table;   // [rows, columns] each, stride[0] between rows; no table: nothing is added
  void* out = nullptr;  // [tokens, columns], contiguous, of weight's dtype
};

struct EmbeddingBackwardArgs {
  EmbeddingTokens tokens;
  int64_t padding = -1;  // this row of dweight is 0
  View dout;             // [tokens, columns], stride[0] between rows
  View dweight, dtable;  // [num_embeddings or num_positions, columns], contiguous; absent: not wanted
};

// The number of the first token whose id or position (the latter only with_table) is no row; -1 where all are.
FASTATTN_DECLARE(int64_t embedding_bad_token(const EmbeddingTokens& tokens, bool with_table))
FASTATTN_DECLARE(void embedding(const EmbeddingArgs& args))
FASTATTN_DECLARE(void embedding_backward(const EmbeddingBackwardArgs& args))

}  // namespace fastattn
