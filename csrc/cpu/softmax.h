// Softmax and log-softmax along one dimension, forward and backward.
#pragma once

#include "common.h"
#include "isa.h"
#include "lines.h"

namespace fastattn {

// out = exp(scale * input - lse) over the visible elements, or its logarithm.
struct SoftmaxArgs {
  Lines lines;  // input is kSource, out kResult
  const void* input = nullptr;
  const uint8_t* mask = nullptr;  // nonzero is visible; null: everything is
  void* out = nullptr;
  DType input_dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;  // input_dtype, or float32 for a half
  double scale = 1.0;
  bool log = false;
};

// dinput = scale * p * (dout - sum(p * dout)), or for the logarithm scale * (dout - exp(out) * sum(dout)).
struct SoftmaxBackwardArgs {
  Lines lines;  // of contiguous out, dout (kSource) and dinput (kResult)
  const void* out = nullptr;
  const void* dout = nullptr;
  const uint8_t* mask = nullptr;
  void* dinput = nullptr;
  DType out_dtype = DType::kFloat32;
  DType dinput_dtype = DType::kFloat32;  // out_dtype, or a half for float32
  double scale = 1.0;
  bool log = false;
};

FASTATTN_DECLARE(void softmax(const SoftmaxArgs& args))
FASTATTN_DECLARE(void softmax_backward(const SoftmaxBackwardArgs& args))

}  // namespace fastattn
