// Layer norm (Ba, Kiros and Hinton, "Layer Normalization", 2016) and rms norm (Zhang and Sennrich, "Root Mean Square
// Layer Normalization", 2019): a row at a time, which stays in the first caches between the passes over it.
#include "norm.h"

#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Writes `columns` values of a [columns] tensor of any dtype as C; an absent one is `fallback` throughout.
template <typename C>
void load_parameter(C* to, const View& from, int64_t columns, C fallback) {
  if (from.data == nullptr) {
    for (int64_t j = 0; j < columns; ++j) to[j] = fallback;
    return;
  }
  visit(from.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    const T* source = static_cast<const T*>(from.data);
    for_each_vec<C>(columns, [&](int64_t j, auto n) { store_n(to + j, load_as_n<C>(source + j, n), n); });
  });
}

template <typename T, typename C>
void norm_rows(const NormArgs& args) {
  const auto [rows, columns, rms, eps] = args.shape;
  const double scale = 1.0 / static_cast<double>(columns);
  Carver shared(scratch(Scratch::kShared, 2 * (columns * sizeof(C) + 64)));
  C* weight = shared.take<C>(columns);
  C* bias = shared.take<C>(columns);
  load_parameter(weight, args.weight, columns, C(1));
  load_parameter(bias, args.bias, columns, C(0));

  // Rows in groups, so that a short row does not cost more to hand out than to compute.
  const int64_t group = max(1, 4096 / max(columns, 1));
  const double work = 8.0 * static_cast<double>(rows) * static_cast<double>(columns);
  parallel_for(ceil_div(rows, group), work, [&](int64_t task) {
    C* x = static_cast<C*>(scratch(Scratch::kThread, columns * sizeof(C)));
    for (int64_t i = task * group; i < min(rows, (task + 1) * group); ++i) {
      const T* input = row_of<const T>(args.input, i, 0, 0);
      const T* residual = args.residual.data == nullptr ? nullptr : row_of<const T>(args.residual, i, 0, 0);
      T* total = residual == nullptr ? nullptr : static_cast<T*>(args.total) + i * columns;
      Vec<C> sum = Vec<C>::zero();
      for_each_vec<C>(columns, [&](int64_t j, auto n) {
        Vec<C> value = load_as_n<C>(input + j, n);
        if (residual != nullptr) {
          value = value + load_as_n<C>(residual + j, n);
          store_n(total + j, value, n);
        }
        store_n(x + j, value, n);
        sum = rms ? fma(value, value, sum) : sum + value;
      });
      double mean = 0, shift = 0, variance = static_cast<double>(reduce_add(sum)) * scale;
      if (!rms) {
        // The second pass subtracts the mean first: a difference of large sums would lose the digits of a small
        // variance. What its own sum then leaves is the rounding of the first, and is taken out as well.
        mean = variance;
        const Vec<C> center = Vec<C>::set1(static_cast<C>(mean));
        mean = static_cast<double>(static_cast<C>(mean));
        Vec<C> rest = Vec<C>::zero(), squares = Vec<C>::zero();
        for_each_vec<C>(columns, [&](int64_t j, auto n) {
          store_n(x + j, load_as_n<C>(x + j, n) - center, n);
          const Vec<C> value = load_as_n<C>(x + j, n);  // read back: lanes beyond the row are 0, not 0 - center
          rest = rest + value;
          squares = fma(value, value, squares);
        });
        shift = static_cast<double>(reduce_add(rest)) * scale;
        variance = static_cast<double>(reduce_add(squares)) * scale - shift * shift;
        static_cast<C*>(args.mean)[i] = static_cast<C>(mean + shift);
      }
      const C rstd = static_cast<C>(1.0 / __builtin_sqrt(variance + eps));
      static_cast<C*>(args.rstd)[i] = rstd;
      T* out = static_cast<T*>(args.out) + i * columns;
      const Vec<C> factor = Vec<C>::set1(rstd), offset = Vec<C>::set1(static_cast<C>(shift));
      for_each_vec<C>(columns, [&](int64_t j, auto n) {
        const Vec<C> normed = (load_as_n<C>(x + j, n) - offset) * factor;
        store_n(out + j, fma(normed, load_as_n<C>(weight + j, n), load_as_n<C>(bias + j, n)), n);
      });
    }
  });
}

// Writes the sum over `chunks` partial rows of `columns` to a [columns] tensor, in the order of the chunks.
template <typename C>
void store_sum(const View& to, const C* partials, int64_t chunks, int64_t chunk_stride, int64_t columns) {
  visit(to.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(Compute<T>) == sizeof(C)) {
      T* target = static_cast<T*>(to.data);
      for_each_vec<C>(columns, [&](int64_t j, auto n) {
        Vec<C> sum = Vec<C>::zero();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum = sum + load_as_n<C>(partials + chunk * chunk_stride + j, n);
        }
        store_n(target + j, sum, n);
      });
    }
  });
}

template <typename T, typename C>
void norm_backward_rows(const NormBackwardArgs& args) {
  const auto [rows, columns, rms, eps] = args.shape;
  const double scale = 1.0 / static_cast<double>(columns);
  const bool sums = args.dweight.data != nullptr || args.dbias.data != nullptr;
  // The gradients of weight and bias add up over the rows: each chunk adds up its own, and chunks depend on the shape
  // alone, so that the bits do not depend on the threads. 64 chunks keep as many cores busy.
  const int64_t chunks = max(1, min(64, ceil_div(rows, 8)));
  const int64_t height = ceil_div(rows, chunks);
  const int64_t padded = round_up(columns, Vec<C>::kWidth);
  Carver shared(scratch(Scratch::kShared, (padded + (sums ? 2 * chunks * padded : 0)) * sizeof(C) + 2 * 64));
  C* weight = shared.take<C>(padded);
  C* partials = sums ? shared.take<C>(2 * chunks * padded) : nullptr;
  load_parameter(weight, args.weight, columns, C(1));

  const double work = 12.0 * static_cast<double>(rows) * static_cast<double>(columns);
  parallel_for(chunks, work, [&](int64_t chunk) {
    Carver own(scratch(Scratch::kThread, 2 * (padded * sizeof(C) + 64)));
    C* normed = own.take<C>(padded);
    C* grad = own.take<C>(padded);
    C* dweight = sums ? partials + 2 * chunk * padded : nullptr;
    C* dbias = sums ? dweight + padded : nullptr;
    for (int64_t j = 0; sums && j < 2 * padded; j += Vec<C>::kWidth) store(dweight + j, Vec<C>::zero());
    for (int64_t i = chunk * height; i < min(rows, (chunk + 1) * height); ++i) {
      const T* input = row_of<const T>(args.input, i, 0, 0);
      const T* dout = row_of<const T>(args.dout, i, 0, 0);
      const Vec<C> center = Vec<C>::set1(rms ? C(0) : static_cast<const C*>(args.mean)[i]);
      const C rstd = static_cast<const C*>(args.rstd)[i];
      Vec<C> sum = Vec<C>::zero(), product = Vec<C>::zero();
      for_each_vec<C>(columns, [&](int64_t j, auto n) {
        const Vec<C> x = (load_as_n<C>(input + j, n) - center) * Vec<C>::set1(rstd);
        const Vec<C> d = load_as_n<C>(dout + j, n);  // 0 beyond the row, and so is g
        const Vec<C> g = d * load_as_n<C>(weight + j, n);
        if (sums) {
          store(dweight + j, fma(d, x, load(dweight + j)));
          store(dbias + j, load(dbias + j) + d);
        }
        sum = sum + g;
        product = fma(g, x, product);
        store(normed + j, x);
        store(grad + j, g);
      });
      if (args.dinput == nullptr) continue;
      const C mean_g = rms ? C(0) : static_cast<C>(static_cast<double>(reduce_add(sum)) * scale);
      const C mean_gx = static_cast<C>(static_cast<double>(reduce_add(product)) * scale);
      const T* dtotal = args.dtotal.data == nullptr ? nullptr : row_of<const T>(args.dtotal, i, 0, 0);
      T* dinput = static_cast<T*>(args.dinput) + i * columns;
      for_each_vec<C>(columns, [&](int64_t j, auto n) {
        const Vec<C> inner = load(grad + j) - Vec<C>::set1(mean_g) - load(normed + j) * Vec<C>::set1(mean_gx);
        Vec<C> value = inner * Vec<C>::set1(rstd);
        if (dtotal != nullptr) value = value + load_as_n<C>(dtotal + j, n);
        store_n(dinput + j, value, n);
      });
    }
  });
  if (args.dweight.data != nullptr) store_sum(args.dweight, partials, chunks, 2 * padded, columns);
  if (args.dbias.data != nullptr) store_sum(args.dbias, partials + padded, chunks, 2 * padded, columns);
}

}  // namespace

void norm(const NormArgs& args) {
  visit(args.input.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    norm_rows<T, Compute<T>>(args);
  });
}

void norm_backward(const NormBackwardArgs& args) {
  visit(args.input.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    norm_backward_rows<T, Compute<T>>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
