// Layer norm and rms norm over the columns of a matrix, forward and backward, with the residual's sum fused.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// A matrix [rows, columns]: stride[0] between rows, columns adjacent.
struct NormShape {
  int64_t rows = 0, columns = 0;
  bool rms = false;   // no mean is subtracted and there is no bias
  double eps = 1e-5;  // added to the variance, or to the mean square
};

// total = input + residual;  out = (total - mean) * rstd * weight + bias
struct NormArgs {
  NormShape shape;
  View input;                             // any dtype; residual, out and total have the same
  View residual;                          // absent: total is input and is not written
  View weight, bias;                      // [columns] each, contiguous; of the input's compute type; absent: 1 and 0
  void *out = nullptr, *total = nullptr;  // [rows, columns], contiguous
  void *mean = nullptr, *rstd = nullptr;  // [rows], in the compute type; mean is not written with rms
};

// From the gradients of out and of total: that of the input (and of the residual), of weight and of bias.
struct NormBackwardArgs {
  NormShape shape;
  View input;                 // what was normalised: total where there was a residual
  View weight, dout, dtotal;  // dtotal, weight: may be absent
  const void *mean = nullptr, *rstd = nullptr;
  void* dinput = nullptr;  // [rows, columns], contiguous; null: not wanted
  View dweight, dbias;     // [columns]; absent: not wanted
};

FASTATTN_DECLARE(void norm(const NormArgs& args))
FASTATTN_DECLARE(void norm_backward(const NormBackwardArgs& args))

}  // namespace fastattn
