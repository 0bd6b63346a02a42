// Dropout of a matrix, and its generator laid open, for tests and for callers that want the mask itself.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// keep[slice, row, column] = 1 where the element survives, else 0.
struct DropoutMaskArgs {
  int64_t slices = 0, rows = 0, columns = 0;
  Dropout dropout;
  uint8_t* keep = nullptr;  // contiguous
};

// out = input * rescale where the element (slice 0) survives, else 0, plus a residual if there is one; all contiguous
// [rows, columns], and any two may be one.
struct DropoutArgs {
  int64_t rows = 0, columns = 0;
  Dropout dropout;
  DType dtype = DType::kFloat32;
  const void* input = nullptr;
  void* out = nullptr;
  const void* residual = nullptr;
};

FASTATTN_DECLARE(void dropout(const DropoutArgs& args))
FASTATTN_DECLARE(void dropout_mask(const DropoutMaskArgs& args))

}  // namespace fastattn
