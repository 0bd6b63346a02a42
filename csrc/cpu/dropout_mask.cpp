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

void dropout(const DropoutArgs& args) {
  constexpr double kPhilox = 8;  // of a number's cost, in multiply-adds
  constexpr int64_t kRows = 16;  // of a task
  const double work = kPhilox * static_cast<double>(args.rows) * static_cast<double>(args.columns);
  visit(args.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    using C = Compute<T>;
    const Vec<C> rescale = Vec<C>::set1(static_cast<C>(args.dropout.rescale)), zero = Vec<C>::zero();
    parallel_for(ceil_div(args.rows, kRows), work, [&](int64_t task) {
      for (int64_t row = task * kRows; row < min((task + 1) * kRows, args.rows); ++row) {
        const T* input = static_cast<const T*>(args.input) + row * args.columns;
        T* out = static_cast<T*>(args.out) + row * args.columns;
        const T* residual =
            args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + row * args.columns;
        for (int64_t column = 0; column < args.columns; column += 64) {
          const uint64_t bits =
              dropout_keep_bits(args.dropout, 0, static_cast<uint64_t>(row), static_cast<uint64_t>(column));
          for_each_vec<C>(min(64, args.columns - column), [&](int64_t k, auto n) {
            const auto kept = mask_from_bits<C>(bits >> k);
            Vec<C> found = select(kept, load_as_n<C>(input + column + k, n) * rescale, zero);
            if (residual != nullptr) found = found + load_as_n<C>(residual + column + k, n);
            store_n(out + column + k, found, n);
          });
        }
      }
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
