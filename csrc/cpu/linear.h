// Matrix products of linear layers: out = left * right + bias. Forward, gradient of the input and gradient of the
// weights are such products of one shape or another.
#pragma once

#include "common.h"
#include "isa.h"

namespace fastattn {

// A matrix cut into up to three of the same size, so that what a projection makes of queries, keys and values needs
// neither be cut apart nor put together.
struct JoinedMatrix {
  static constexpr int kMost = 3;
  void* data[kMost] = {};
  int64_t row_stride[kMost] = {};
  int64_t count = 1;
};

// All matrices have one dtype and contiguous rows. Where a joined matrix has several parts, the dimension they share is
// a multiple of 32 in each.
struct LinearArgs {
  int64_t rows = 0, columns = 0, depth = 0;  // none is 0
  DType dtype = DType::kFloat32;             // not kFloat64
  JoinedMatrix left;                         // [rows, depth], joined along depth; transposed: [depth, rows], along rows
  bool left_transposed = false;
  void* right = nullptr;  // [depth, columns]; transposed: [columns, depth]
  int64_t right_stride = 0;
  bool right_transposed = false;
  const void* bias = nullptr;  // [columns], or null
  JoinedMatrix out;            // [rows, columns], joined along columns
  bool wide = false;           // out is float32, whatever dtype is
};

#if defined(FASTATTN_HAS_AMX)
namespace amx {
// Returns whether tiles can multiply these numbers exactly; if not, out is void.
bool linear(const LinearArgs& args);
}  // namespace amx
#endif

}  // namespace fastattn
