// Reductions along lines, spread over threads without the result depending on how.
#pragma once

#include <new>

#include "lines.h"
#include "parallel.h"
#include "scratch.h"
#include "stream.h"

namespace fastattn::FASTATTN_ISA {

// Where line `index` of `lines.outer` starts in each operand.
struct Start {
  int64_t at[kLineOperands] = {0, 0, 0};

  Start(const Lines& lines, int64_t index) {
    for (int d = 0; d < lines.outer_dims; ++d) {
      // The outermost needs no division, and most calls have no other.
      const int64_t step = d == lines.outer_dims - 1 ? index : index % lines.outer_size[d];
      for (int k = 0; k < kLineOperands; ++k) at[k] += step * lines.outer_stride[k][d];
      if (d < lines.outer_dims - 1) index /= lines.outer_size[d];
    }
  }
};

// For each of `lines`, reduces its `length` elements and then writes its result, which depends on all of them.
//
// Kernel has a plain struct Partial, the constant kChunk and
//   Partial partial(line, begin, end)           the reduction of elements [begin, end)
//   void merge(Partial& into, const Partial&)   ... of two neighbouring ranges
//   void write(line, begin, end, total)         the result of a range, from the reduction of the whole line
// A line is always cut into the same chunks of kChunk elements, merged from first to last, so that its bits do not
// depend on the number of threads. Many lines are shared out whole, the chunks of few long ones are shared out each by
// itself. `cost` is what one element takes, in multiply-adds.
template <typename Kernel>
void reduce_lines(const Kernel& kernel, int64_t lines, int64_t length, double cost) {
  using Partial = typename Kernel::Partial;
  const int64_t kChunk = Kernel::kChunk;
  const int64_t chunks = ceil_div(length, kChunk);
  const double work = cost * static_cast<double>(lines) * static_cast<double>(length);
  const int64_t threads = max_threads();

  if (chunks <= 1 || lines >= 4 * threads || threads == 1) {
    // Four pieces a thread even out the load; no smaller than a chunk, which costs more than handing it out.
    const int64_t group = max(ceil_div(kChunk, max(length, 1)), ceil_div(lines, 4 * threads));
    parallel_for(ceil_div(lines, group), work, [&](int64_t task) {
      for (int64_t line = task * group; line < min(lines, (task + 1) * group); ++line) {
        Partial total = kernel.partial(line, 0, min(length, kChunk));
        for (int64_t begin = kChunk; begin < length; begin += kChunk) {
          kernel.merge(total, kernel.partial(line, begin, min(length, begin + kChunk)));
        }
        for (int64_t begin = 0; begin < length; begin += kChunk) {
          kernel.write(line, begin, min(length, begin + kChunk), total);
        }
      }
      stream_end();
    });
    return;
  }

  Partial* partials = static_cast<Partial*>(scratch(Scratch::kShared, sizeof(Partial) * lines * chunks));
  parallel_for(lines * chunks, work, [&](int64_t task) {
    const int64_t begin = task % chunks * kChunk;
    partials[task] = kernel.partial(task / chunks, begin, min(length, begin + kChunk));
  });
  for (int64_t line = 0; line < lines; ++line) {
    Partial* first = partials + line * chunks;
    for (int64_t k = 1; k < chunks; ++k) kernel.merge(*first, first[k]);
  }
  parallel_for(lines * chunks, work, [&](int64_t task) {
    const int64_t begin = task % chunks * kChunk;
    kernel.write(task / chunks, begin, min(length, begin + kChunk), partials[task / chunks * chunks]);
    stream_end();
  });
}

}  // namespace fastattn::FASTATTN_ISA
