// The feed-forward block: what a call is, and its kernels.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

enum class Activation : int32_t { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

// A matrix whose rows are contiguous; null: absent.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;
};

// The fields are those of spec.FeedForwardCall with all tokens in one dimension; sizes are already checked, all tensors
// have one dtype, vectors are contiguous.
struct FeedForwardProblem {
  int64_t tokens = 0, model_dim = 0, ff_dim = 0, out_dim = 0;
  DType dtype = DType::kFloat32;  // not kFloat64
  Activation activation = Activation::kRelu;
  Dropout dropout;
  Matrix input;                                   // [tokens, model_dim]
  Matrix weight_in, weight_gate;                  // [ff_dim, model_dim]
  void *bias_in = nullptr, *bias_gate = nullptr;  // [ff_dim]
  Matrix weight_out;                              // [out_dim, ff_dim]
  void* bias_out = nullptr;                       // [out_dim]
};

struct FeedForwardArgs {
  FeedForwardProblem problem;
  Matrix out;  // [tokens, out_dim]
};

FASTATTN_DECLARE(void feed_forward(const FeedForwardArgs& args))
FASTATTN_DECLARE_AMX(feed_forward, FeedForwardArgs)

}  // namespace fastattn
