// A tensor seen as lines along one dimension, in three operands of the same shape.
#pragma once

#include <cstdint>
#include <vector>

namespace fastattn {

enum LineOperand { kSource = 0, kResult = 1, kMask = 2, kLineOperands = 3 };

constexpr int kMaxDims = 64;  // as many as a torch tensor has

// Where each line starts and how its elements lie. Either the elements of a line are adjacent in source and result, or
// those of `across` neighbouring lines are, so that a register holds one element of each.
struct Lines {
  int64_t length = 1;                        // elements of a line
  int64_t along[kLineOperands] = {1, 1, 1};  // stride from one element to the next
  int64_t across = 1;                        // lines that lie side by side
  int64_t mask_across = 0;                   // the mask's stride between them: 0 or 1
  int64_t outer = 1;                         // groups of `across` lines: the product of outer_size
  int outer_dims = 0;
  int64_t outer_size[kMaxDims] = {};  // innermost first
  int64_t outer_stride[kLineOperands][kMaxDims] = {};
};

// Takes lines along `dim`, merging the other dimensions where every operand allows it. Strides count elements; source
// is contiguous or has stride 1 in a last dimension longer than 1, and mask likewise (or stride 0). The result is
// contiguous. `mask` is empty where there is none.
Lines make_lines(const std::vector<int64_t>& shape, int dim, const std::vector<int64_t>& source,
                 const std::vector<int64_t>& mask);

}  // namespace fastattn
