#include "lines.h"

namespace fastattn {
namespace {

struct Dim {
  int64_t size;
  int64_t stride[kLineOperands];
};

// Whether stepping through `inner` to its end arrives at the next step of `outer`.
bool continues(const Dim& outer, const Dim& inner) {
  for (int k = 0; k < kLineOperands; ++k) {
    if (outer.stride[k] != inner.stride[k] * inner.size) return false;
  }
  return true;
}

}  // namespace

Lines make_lines(const std::vector<int64_t>& shape, int dim, const std::vector<int64_t>& source,
                 const std::vector<int64_t>& mask) {
  Lines lines;
  Dim merged[kMaxDims];
  int count = 0;
  int64_t contiguous = 1;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    const Dim next{shape[d], {source[d], contiguous, mask.empty() ? 0 : mask[d]}};
    contiguous *= shape[d];
    if (d == dim) {
      lines.length = next.size;
      for (int k = 0; k < kLineOperands; ++k) lines.along[k] = next.stride[k];
    } else if (count > 0 && continues(next, merged[count - 1])) {
      merged[count - 1].size *= next.size;
    } else if (next.size != 1) {
      merged[count++] = next;
    }
  }
  int outer = 0;
  if (lines.along[kResult] > 1) {  // there are dimensions inside `dim`: their lines lie side by side
    lines.across = merged[0].size;
    lines.mask_across = merged[0].stride[kMask];
    outer = 1;
  }
  for (; outer < count; ++outer) {
    lines.outer *= merged[outer].size;
    lines.outer_size[lines.outer_dims] = merged[outer].size;
    for (int k = 0; k < kLineOperands; ++k) lines.outer_stride[k][lines.outer_dims] = merged[outer].stride[k];
    ++lines.outer_dims;
  }
  return lines;
}

}  // namespace fastattn
