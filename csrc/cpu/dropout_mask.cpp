#include "dropout_mask.h"

#include "parallel.h"
#include "philox.h"

namespace fastattn::FASTATTN_ISA {

void dropout_mask(const DropoutMaskArgs& args) {
  const double work = static_cast<double>(args.slices) * static_cast<double>(args.rows * args.columns);
  parallel_for(args.slices * args.rows, work, [&](int64_t task) {
    uint8_t* keep = args.keep + task * args.columns;
    for (int64_t column = 0; column < args.columns; column += 64) {
      const uint64_t bits = dropout_keep_bits(args.dropout, static_cast<uint64_t>(task / args.rows),
                                              static_cast<uint64_t>(task % args.rows), static_cast<uint64_t>(column));
      const int64_t n = min(64, args.columns - column);
      for (int64_t k = 0; k < n; ++k) keep[column + k] = bits >> k & 1;
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
