// The dropout generator laid open, for tests and for callers that want the mask itself.
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

FASTATTN_DECLARE(void dropout_mask(const DropoutMaskArgs& args))

}  // namespace fastattn
