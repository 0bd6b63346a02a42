// Blocks of logits on their way to a cross entropy and back.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

struct LogitsArgs {
  int64_t rows, columns;  // tokens, classes
  const float* data;
  int64_t row_stride;
};

// Adds a block of classes to what is known of each row: its largest logit (-inf before the first block), the sum of
// exp(logit - largest), and the sum of logits unless `total` is null.
FASTATTN_DECLARE(void logits_statistics(const LogitsArgs& args, float* largest, double* sum, double* total))

// out = (exp(logits - lse) - less) * scale, in `dtype`, which may be where the logits stand; not float64.
FASTATTN_DECLARE(void logits_gradient(const LogitsArgs& args, const float* lse, const float* scale, float less,
                                      void* out, int64_t out_stride, DType dtype))

}  // namespace fastattn
