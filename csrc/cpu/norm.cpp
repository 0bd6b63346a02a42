// Layer norm (Ba, Kiros and Hinton, "Layer Normalization", 2016) and rms norm (Zhang and Sennrich, "Root Mean Square
// Layer Normalization", 2019): a row at a time, which stays in the first caches between the passes over it.
#include "norm.h"

#include <type_traits>

#include "chains.h"
#include "parallel.h"
#include "scratch.h"
#include "stream.h"
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

// Sums of a row, in chains: two pipes of latency 4 want more than one. Arrays of them are set element by element: GCC
// clears a whole one by `rep stos`, which waits until all stores before it, streamed ones too, have left the core.
template <typename C>
struct Sums {
  Vec<C> first = Vec<C>::zero(), second = Vec<C>::zero();
};
constexpr int kChains = 4;
template <typename C>
inline C total_of(const Sums<C> (&s)[kChains], Vec<C> Sums<C>::* which) {
  return reduce_add((s[0].*which + s[1].*which) + (s[2].*which + s[3].*which));
}

template <typename T, typename C, bool kResidual, bool kPast>
void norm_row(const NormArgs& args, int64_t row, const C* weight, const C* bias) {
  const auto [rows, columns, rms, eps] = args.shape;
  const double scale = 1.0 / static_cast<double>(columns);
  const T* input = row_of<const T>(args.input, row, 0, 0);
  const T* residual = kResidual ? row_of<const T>(args.residual, row, 0, 0) : nullptr;
  T* total = kResidual ? static_cast<T*>(args.total) + row * columns : nullptr;
  // What is normalised: not the sum as it was rounded for the user.
  const auto value_at = [&](int64_t j, auto n) {
    const Vec<C> x = load_as_n<C>(input + j, n);
    return kResidual ? x + load_as_n<C>(residual + j, n) : x;
  };
  const int64_t ahead = lines_ahead(columns * static_cast<int64_t>(sizeof(T))) * args.input.stride[0];
  Sums<C> sums[kChains] = {{}, {}, {}, {}};
  for_each_vec<C>(columns, sums, [&](Sums<C>& s, int64_t j, auto n) {
    const Vec<C> x = value_at(j, n);
    __builtin_prefetch(input + j + ahead);
    if (kResidual) store_n(total + j, x, n);
    s.first = rms ? fma(x, x, s.first) : s.first + x;
  });
  double mean = 0, shift = 0, variance = static_cast<double>(total_of(sums, &Sums<C>::first)) * scale;
  if (!rms) {
    // The second pass subtracts the mean first: a difference of large sums would lose the digits of a small variance.
    // What its own sum then leaves is the rounding of the first, and is taken out as well.
    mean = static_cast<double>(static_cast<C>(variance));
    const Vec<C> center = Vec<C>::set1(static_cast<C>(mean));
    Sums<C> rest[kChains] = {{}, {}, {}, {}};
    for_each_vec<C>(columns, rest, [&](Sums<C>& s, int64_t j, auto n) {
      const Vec<C> x = first_lanes(value_at(j, n) - center, n);
      s.first = s.first + x;
      s.second = fma(x, x, s.second);
    });
    shift = static_cast<double>(total_of(rest, &Sums<C>::first)) * scale;
    variance = static_cast<double>(total_of(rest, &Sums<C>::second)) * scale - shift * shift;
    static_cast<C*>(args.mean)[row] = static_cast<C>(mean + shift);
  }
  const C rstd = static_cast<C>(1.0 / __builtin_sqrt(variance + eps));
  static_cast<C*>(args.rstd)[row] = rstd;
  T* out = static_cast<T*>(args.out) + row * columns;
  const Vec<C> factor = Vec<C>::set1(rstd), center = Vec<C>::set1(static_cast<C>(mean));
  const Vec<C> offset = Vec<C>::set1(static_cast<C>(shift));
  for_each_vec<C>(columns, [&](int64_t j, auto n) {
    const Vec<C> normed = ((value_at(j, n) - center) - offset) * factor;
    put_n<kPast>(out + j, fma(normed, load_as_n<C>(weight + j, n), load_as_n<C>(bias + j, n)), n);
  });
}

template <typename T, typename C>
void norm_rows(const NormArgs& args) {
  const int64_t rows = args.shape.rows, columns = args.shape.columns;
  Carver shared(scratch(Scratch::kShared, 2 * (columns * sizeof(C) + 64)));
  C* weight = shared.take<C>(columns);
  C* bias = shared.take<C>(columns);
  load_parameter(weight, args.weight, columns, C(1));
  load_parameter(bias, args.bias, columns, C(0));

  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool past_caches = prepare_stream(args.out, rows * row_bytes, row_bytes);
  // Rows in groups, so that a short row does not cost more to hand out than to compute.
  const int64_t group = max(1, 16384 / max(columns, 1));
  const double work = 8.0 * static_cast<double>(rows) * static_cast<double>(columns);
  parallel_for(ceil_div(rows, group), work, [&](int64_t task) {
    for (int64_t i = task * group; i < min(rows, (task + 1) * group); ++i) {
      if (args.residual.data != nullptr) {
        norm_row<T, C, true, false>(args, i, weight, bias);
      } else if (past_caches) {
        norm_row<T, C, false, true>(args, i, weight, bias);
      } else {
        norm_row<T, C, false, false>(args, i, weight, bias);
      }
    }
    stream_end();
  });
}

// Writes the sum over `chunks` partial rows of `columns` to a [columns] tensor, in the order of the chunks.
template <typename C>
void store_sum(const View& to, const C* partials, int64_t chunks, int64_t chunk_stride, int64_t columns) {
  constexpr int64_t kColumns = 1024;
  visit(to.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(Compute<T>) == sizeof(C)) {
      T* target = static_cast<T*>(to.data);
      const double work = static_cast<double>(chunks) * static_cast<double>(columns);
      parallel_for(ceil_div(columns, kColumns), work, [&](int64_t task) {
        const int64_t begin = task * kColumns;
        for_each_vec<C>(min(kColumns, columns - begin), [&](int64_t j, auto n) {
          Vec<C> sum = Vec<C>::zero();
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            sum = sum + load_as_n<C>(partials + chunk * chunk_stride + begin + j, n);
          }
          store_n(target + begin + j, sum, n);
        });
      });
    }
  });
}

// The gradients of kRows rows from `row` on: what they add to those of weight and bias is read and written once for
// all of them. `fresh`: nothing has been added yet.
template <typename T, typename C, int kRows>
void norm_backward_rows(const NormBackwardArgs& args, int64_t row, const C* weight, C* dweight, C* dbias, bool fresh,
                        bool past_caches) {
  const auto [rows, columns, rms, eps] = args.shape;
  const double scale = 1.0 / static_cast<double>(columns);
  const bool wants_input = args.dinput != nullptr, wants_sums = dweight != nullptr;
  const T *input[kRows], *dout[kRows], *dtotal[kRows];
  T* dinput[kRows];
  Vec<C> center[kRows], rstd[kRows], mean_g[kRows], mean_gx[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row + r;
    input[r] = row_of<const T>(args.input, i, 0, 0);
    dout[r] = row_of<const T>(args.dout, i, 0, 0);
    dtotal[r] = args.dtotal.data == nullptr ? nullptr : row_of<const T>(args.dtotal, i, 0, 0);
    dinput[r] = wants_input ? static_cast<T*>(args.dinput) + i * columns : nullptr;
    const C factor = static_cast<const C*>(args.rstd)[i];
    center[r] = Vec<C>::set1(rms ? C(0) : static_cast<const C*>(args.mean)[i]);
    rstd[r] = Vec<C>::set1(factor);
    mean_g[r] = mean_gx[r] = Vec<C>::zero();
    if (!wants_input) continue;
    Sums<C> sums[kChains] = {{}, {}, {}, {}};
    for_each_vec<C>(columns, sums, [&, r](Sums<C>& s, int64_t j, auto n) {
      const Vec<C> x = load_as_n<C>(input[r] + j, n) - center[r];
      const Vec<C> g = load_as_n<C>(dout[r] + j, n) * load_as_n<C>(weight + j, n);  // 0 beyond the row
      s.first = s.first + g;
      s.second = fma(g, x, s.second);
    });
    if (!rms) mean_g[r] = Vec<C>::set1(static_cast<C>(static_cast<double>(total_of(sums, &Sums<C>::first)) * scale));
    const double product = static_cast<double>(total_of(sums, &Sums<C>::second)) * static_cast<double>(factor);
    mean_gx[r] = Vec<C>::set1(static_cast<C>(product * scale));
  }
  // The next rows are fetched, where L2 holds them beside these.
  const bool fetch = kRows * columns * static_cast<int64_t>(sizeof(T)) <= (int64_t{1} << 18);
  const int64_t next_input = kRows * args.input.stride[0], next_dout = kRows * args.dout.stride[0];
  const auto write = [&](auto past, auto with_sums, auto with_total) {
    for_each_vec<C>(columns, [&](int64_t j, auto n) {
      const Vec<C> w = load_as_n<C>(weight + j, n);
      Vec<C> dw = Vec<C>::zero(), db = Vec<C>::zero();
      if (with_sums() && !fresh) {
        dw = load(dweight + j);
        db = load(dbias + j);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec<C> x = (load_as_n<C>(input[r] + j, n) - center[r]) * rstd[r];
        const Vec<C> d = load_as_n<C>(dout[r] + j, n);
        if (fetch) {
          __builtin_prefetch(input[r] + j + next_input);
          __builtin_prefetch(dout[r] + j + next_dout);
        }
        if (with_sums()) {
          dw = fma(d, x, dw);
          db = db + d;
        }
        if (!wants_input) continue;
        Vec<C> value = fnma(x, mean_gx[r], fma(d, w, Vec<C>::zero() - mean_g[r])) * rstd[r];
        if (with_total()) value = value + load_as_n<C>(dtotal[r] + j, n);
        put_n<decltype(past)::value>(dinput[r] + j, value, n);
      }
      if (with_sums()) {
        store(dweight + j, dw);
        store(dbias + j, db);
      }
    });
  };
  const std::true_type yes;
  const std::false_type no;
  if (args.dtotal.data != nullptr) {
    wants_sums ? write(no, yes, yes) : write(no, no, yes);
  } else if (past_caches) {
    wants_sums ? write(yes, yes, no) : write(yes, no, no);
  } else {
    wants_sums ? write(no, yes, no) : write(no, no, no);
  }
}

template <typename T, typename C>
void norm_backward_matrix(const NormBackwardArgs& args) {
  const int64_t rows = args.shape.rows, columns = args.shape.columns;
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

  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool past_caches = args.dinput != nullptr && prepare_stream(args.dinput, rows * row_bytes, row_bytes);
  // The more rows together the less often the sums pass through the caches, also where those do not hold the rows.
  constexpr int kTogether = 4;
  const double work = 12.0 * static_cast<double>(rows) * static_cast<double>(columns);
  parallel_for(chunks, work, [&](int64_t chunk) {
    const int64_t begin = chunk * height, end = min(rows, begin + height);
    C* dweight = sums ? partials + 2 * chunk * padded : nullptr;
    C* dbias = sums ? dweight + padded : nullptr;
    for (int64_t j = 0; sums && begin >= end && j < 2 * padded; j += Vec<C>::kWidth) store(dweight + j, Vec<C>::zero());
    int64_t i = begin;
    for (; i + kTogether <= end; i += kTogether) {
      norm_backward_rows<T, C, kTogether>(args, i, weight, dweight, dbias, i == begin, past_caches);
    }
    for (; i < end; ++i) norm_backward_rows<T, C, 1>(args, i, weight, dweight, dbias, i == begin, past_caches);
    stream_end();
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
    norm_backward_matrix<T, Compute<T>>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
