// The gradients of the feed-forward block.
#pragma once

#include "feed_forward.h"

namespace fastattn {

// Gradients are null where they are not wanted; they have the shapes and the dtype of what they belong to.
struct FeedForwardBackwardArgs {
  FeedForwardProblem problem;
  Matrix dout;                                      // [tokens, out_dim]
  Matrix dinput;                                    // [tokens, model_dim]
  Matrix dweight_in, dweight_gate;                  // [ff_dim, model_dim]
  Matrix dweight_out;                               // [out_dim, ff_dim]
  void *dbias_in = nullptr, *dbias_gate = nullptr;  // [ff_dim]
  void* dbias_out = nullptr;                        // [out_dim]
};

FASTATTN_DECLARE(void feed_forward_backward(const FeedForwardBackwardArgs& args))
FASTATTN_DECLARE_AMX(feed_forward_backward, FeedForwardBackwardArgs)

}  // namespace fastattn
