// A linear layer of a few rows, as in generation step by step: the weights are read once and in order, and that is all
// it costs.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastattn {

// out = input * weight^T + bias in float32.
struct LinearFewRowsArgs {
  int64_t rows = 0, columns = 0, depth = 0;
  const float* input = nullptr;   // [rows, depth], contiguous
  const float* weight = nullptr;  // [columns, depth], rows contiguous
  int64_t weight_stride = 0;
  const float* bias = nullptr;  // [columns], or null
  float* out = nullptr;         // [rows, columns], contiguous
};

FASTATTN_DECLARE(void linear_few_rows(const LinearFewRowsArgs& args))

}  // namespace fastattn
