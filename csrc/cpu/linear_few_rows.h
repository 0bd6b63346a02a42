// A linear layer of a few rows, as in generation step by step: the weights are read once and in order, and that is all
// it costs.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// out = input * weight^T + bias, all of one dtype, summed in float32.
struct LinearFewRowsArgs {
  int64_t rows = 0, columns = 0, depth = 0;
  DType dtype = DType::kFloat32;  // not kFloat64
  const void* input = nullptr;    // [rows, depth], contiguous
  const void* weight = nullptr;   // [columns, depth], rows contiguous
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [columns], or null
  void* out = nullptr;         // [rows, columns], contiguous
};

FASTATTN_DECLARE(void linear_few_rows(const LinearFewRowsArgs& args))

}  // namespace fastattn
