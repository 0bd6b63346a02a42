// Plain data shared by every kernel, its callers and its instruction sets: no inline function lives here, so that no
// code compiled for one instruction set can be linked into another.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Storage types of the half precisions; arithmetic happens in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A 4-D tensor [batch, head, row, column] seen through element strides; a broadcast dimension has stride 0.
struct View {
  void* data = nullptr;  // null: the tensor is absent
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Element (slice, row, column) is dropped when word column % 4 of
// philox(key = seed, counter = (column / 4, row, slice, offset)) is below `threshold`.
struct Dropout {
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;  // floor(p * 2^32); 0: no dropout
  double rescale = 1.0;    // of the survivors: 1 / (1 - p)
};

}  // namespace fastattn
