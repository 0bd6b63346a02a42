// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for merging partial sums.
//
// A line is read once for the maximum and the sum, chunk by chunk in L1, and once more for the result, for which the
// exponentials are computed again rather than stored: half precision could not hold them without a second rounding.
//
// Longer than 400 lines because rows and columns, forward and backward are four loops over one set of helpers.
#include "softmax.h"

#include "reduce.h"
#include "stream.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <typename T>
inline Vec<T> operator-(Vec<T> a) {
  return {-a.v};
}

// e^(|scale| * d) as 2^(d * (high + low)).
template <typename C>
struct Exponent {
  C high, low;
  C lowest;  // d below it gives 0

  explicit Exponent(double scale) {
    const double factor = scale * kLog2E;
    high = static_cast<C>(factor);
    low = static_cast<C>(factor - static_cast<double>(high));
    lowest = C(sizeof(C) == 8 ? -1200 : -240) / high;
  }

  // Within 1 ulp for d <= 0: the product is never rounded, so that a large d costs no accuracy.
  Vec<C> operator()(Vec<C> d) const {
    d = max(Vec<C>::set1(lowest), d);
    const Vec<C> n = round(d * Vec<C>::set1(high));
    Vec<C> r = fma(d, Vec<C>::set1(high), -n);
    r = fma(d, Vec<C>::set1(low), r);
    return ldexp(fma(polynomial(r, ExpConstants<C>::kExp2), r, Vec<C>::set1(C(1))), n);
  }
};

template <typename C>
constexpr C kNegInf = -static_cast<C>(__builtin_inff());

inline uint64_t lane_bits(int lanes) { return (uint64_t{1} << lanes) - 1; }

// What is known of some elements of a line: their maximum, the sum of exp(|scale| * (x - maximum)), and whether any is
// visible. Where the maximum is -inf the sum is taken from 0 instead and is 0, or NaN if there is a NaN.
template <typename C>
struct LogSum {
  C maximum = kNegInf<C>;
  C sum = 0;
  bool any = false;
};

template <typename C>
inline C finite_or_zero(C maximum) {
  return maximum == kNegInf<C> ? C(0) : maximum;  // -inf minus -inf is NaN
}

// The elements of a line are adjacent: a register holds several of one line.
template <typename T, typename TOut>
struct RowSoftmax {
  using C = Compute<T>;
  using V = Vec<C>;
  using Partial = LogSum<C>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kChunk = 32768 / sizeof(C);  // with its mask it stays in an L1 of 48 KiB

  const SoftmaxArgs& args;
  const Exponent<C> exponent;
  const V sign;  // a negative scale turns the maximum into the minimum

  explicit RowSoftmax(const SoftmaxArgs& a)
      : args(a), exponent(a.scale < 0 ? -a.scale : a.scale), sign(V::set1(a.scale < 0 ? C(-1) : C(1))) {}

  struct Row {
    const T* x;
    TOut* out;
    const uint8_t* mask;  // null: all visible
    bool hidden;          // all hidden
  };
  Row row(int64_t line) const {
    const Start start(args.lines, line);
    Row r{static_cast<const T*>(args.input) + start.at[kSource], static_cast<TOut*>(args.out) + start.at[kResult],
          args.mask == nullptr ? nullptr : args.mask + start.at[kMask], false};
    if (r.mask != nullptr && args.lines.along[kMask] == 0) {
      r.hidden = *r.mask == 0;
      r.mask = nullptr;
    }
    return r;
  }

  V signed_value(const T* x, int lanes) const { return (lanes == kWidth ? load(x) : load_n(x, lanes)) * sign; }
  static uint64_t visible(const Row& r, int64_t j, int lanes) {
    return r.mask == nullptr ? lane_bits(lanes) : bits_nonzero(r.mask + j, lanes);
  }

  Partial partial(int64_t line, int64_t begin, int64_t end) const {
    const Row r = row(line);
    if (r.hidden) return {};
    return r.mask == nullptr ? partial<false>(r, begin, end) : partial<true>(r, begin, end);
  }

  template <bool kMasked>
  Partial partial(const Row& r, int64_t begin, int64_t end) const {
    constexpr int kChains = 4;  // two pipes of latency 4 want 8, but the exponential brings parallelism of its own
    const V lowest = V::set1(kNegInf<C>);
    uint64_t any = !kMasked;
    V m[kChains] = {lowest, lowest, lowest, lowest};
    const auto larger = [&](V& into, int64_t j, int lanes) {
      V x = signed_value(r.x + j, lanes);
      if (kMasked || lanes < kWidth) {
        const uint64_t bits = visible(r, j, lanes);
        any |= bits;
        x = select(mask_from_bits<C>(bits), x, lowest);
      }
      into = max(x, into);
    };
    int64_t j = begin;
    for (; j + kChains * kWidth <= end; j += kChains * kWidth) {
      for (int k = 0; k < kChains; ++k) larger(m[k], j + k * kWidth, kWidth);
    }
    for (; j + kWidth <= end; j += kWidth) larger(m[0], j, kWidth);
    if (j < end) larger(m[0], j, static_cast<int>(end - j));
    Partial result;
    result.maximum = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
    result.any = any != 0;
    if (kMasked && !result.any) return result;

    const V shift = V::set1(finite_or_zero(result.maximum));
    V s[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto add = [&](V& into, int64_t j, int lanes) {
      V e = exponent(signed_value(r.x + j, lanes) - shift);
      if (kMasked || lanes < kWidth) e = select(mask_from_bits<C>(visible(r, j, lanes)), e, V::zero());
      into = into + e;
    };
    j = begin;
    for (; j + kChains * kWidth <= end; j += kChains * kWidth) {
      for (int k = 0; k < kChains; ++k) add(s[k], j + k * kWidth, kWidth);
    }
    for (; j + kWidth <= end; j += kWidth) add(s[0], j, kWidth);
    if (j < end) add(s[0], j, static_cast<int>(end - j));
    result.sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
    return result;
  }

  void merge(Partial& into, const Partial& next) const {
    const C maximum = next.maximum > into.maximum ? next.maximum : into.maximum;
    const C shift = finite_or_zero(maximum);
    into.sum = into.sum * scalar_exponent(into.maximum - shift) + next.sum * scalar_exponent(next.maximum - shift);
    into.maximum = maximum;
    into.any |= next.any;
  }
  C scalar_exponent(C d) const {
    C lanes[kWidth];
    store(lanes, exponent(V::set1(d)));
    return lanes[0];
  }

  void write(int64_t line, int64_t begin, int64_t end, const Partial& total) const {
    const Row r = row(line);
    const V maximum = V::set1(total.maximum);
    const V nothing = V::set1(args.log ? kNegInf<C> : C(0));
    const auto put = [&](const auto& value) {
      if (r.mask == nullptr) {
        write_line(r.out, begin, end, args.past_caches,
                   [&](int64_t j, int lanes) { return value(signed_value(r.x + j, lanes) - maximum); });
      } else {
        write_line(r.out, begin, end, args.past_caches, [&](int64_t j, int lanes) {
          const auto seen = mask_from_bits<C>(visible(r, j, lanes));
          return select(seen, value(signed_value(r.x + j, lanes) - maximum), nothing);
        });
      }
    };
    if (!total.any) {
      write_line(r.out, begin, end, args.past_caches, [&](int64_t, int) { return nothing; });
    } else if (args.log) {
      const V scale = V::set1(static_cast<C>(args.scale < 0 ? -args.scale : args.scale));
      const V log_sum = V::set1(static_cast<C>(__builtin_log(static_cast<double>(total.sum))));
      put([&](V d) { return fma(d, scale, -log_sum); });
    } else {
      const V inverse = V::set1(C(1) / total.sum);
      put([&](V d) { return exponent(d) * inverse; });
    }
  }
};

// Neighbouring lines lie side by side: a register holds one element of each of kWidth lines, a strip.
template <typename T, typename TOut>
struct ColumnSoftmax {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kChunk = 16384 / (kWidth * sizeof(C));  // the chunk's cache lines stay in L1

  struct Partial {
    V maximum, sum;
    uint64_t any = 0;
  };

  const SoftmaxArgs& args;
  const Exponent<C> exponent;
  const V sign;
  const int64_t strips;

  explicit ColumnSoftmax(const SoftmaxArgs& a)
      : args(a),
        exponent(a.scale < 0 ? -a.scale : a.scale),
        sign(V::set1(a.scale < 0 ? C(-1) : C(1))),
        strips(ceil_div(a.lines.across, kWidth)) {}

  struct Strip {
    const T* x;
    TOut* out;
    const uint8_t* mask;
    int lanes;
  };
  Strip strip(int64_t line) const {
    const Start start(args.lines, line / strips);
    const int64_t first = line % strips * kWidth;
    return {static_cast<const T*>(args.input) + start.at[kSource] + first,
            static_cast<TOut*>(args.out) + start.at[kResult] + first,
            args.mask == nullptr ? nullptr : args.mask + start.at[kMask] + first * args.lines.mask_across,
            static_cast<int>(min(kWidth, args.lines.across - first))};
  }
  V signed_value(const Strip& s, int64_t j) const {
    const T* x = s.x + j * args.lines.along[kSource];
    return (s.lanes == kWidth ? load(x) : load_n(x, s.lanes)) * sign;
  }
  uint64_t visible(const Strip& s, int64_t j) const {
    if (s.mask == nullptr) return lane_bits(s.lanes);
    const uint8_t* mask = s.mask + j * args.lines.along[kMask];
    if (args.lines.mask_across == 0) return *mask ? lane_bits(s.lanes) : 0;
    return bits_nonzero(mask, s.lanes);
  }
  static V shift_of(V maximum) { return select(eq(maximum, V::set1(kNegInf<C>)), V::zero(), maximum); }

  Partial partial(int64_t line, int64_t begin, int64_t end) const {
    const Strip s = strip(line);
    const V lowest = V::set1(kNegInf<C>);
    Partial result{lowest, V::zero()};
    for (int64_t j = begin; j < end; ++j) {
      const uint64_t bits = visible(s, j);
      result.any |= bits;
      result.maximum = max(select(mask_from_bits<C>(bits), signed_value(s, j), lowest), result.maximum);
    }
    const V shift = shift_of(result.maximum);
    for (int64_t j = begin; j < end; ++j) {
      const V e = exponent(signed_value(s, j) - shift);
      result.sum = result.sum + select(mask_from_bits<C>(visible(s, j)), e, V::zero());
    }
    return result;
  }

  void merge(Partial& into, const Partial& next) const {
    const V maximum = max(into.maximum, next.maximum);
    const V shift = shift_of(maximum);
    into.sum = into.sum * exponent(into.maximum - shift) + next.sum * exponent(next.maximum - shift);
    into.maximum = maximum;
    into.any |= next.any;
  }

  void write(int64_t line, int64_t begin, int64_t end, const Partial& total) const {
    const Strip s = strip(line);
    const V nothing = V::set1(args.log ? kNegInf<C> : C(0));
    const auto put = [&](const auto& value) {
      for (int64_t j = begin; j < end; ++j) {
        const V y = select(mask_from_bits<C>(visible(s, j)), value(signed_value(s, j) - total.maximum), nothing);
        TOut* out = s.out + j * args.lines.along[kResult];
        s.lanes == kWidth ? store(out, y) : store_n(out, y, s.lanes);
      }
    };
    if (args.log) {
      const V scale = V::set1(static_cast<C>(args.scale < 0 ? -args.scale : args.scale));
      C lanes[kWidth];
      store(lanes, total.sum);
      for (C& lane : lanes) lane = static_cast<C>(__builtin_log(static_cast<double>(lane)));
      const V log_sum = load(lanes);
      put([&](V d) { return fma(d, scale, -log_sum); });
    } else {
      const V inverse = V::set1(C(1)) / total.sum;
      put([&](V d) { return exponent(d) * inverse; });
    }
  }
};

// What the gradients of a line and of a strip do with an element: out y, its gradient dy and the line's total.
template <typename C>
struct SoftmaxGradient {
  Vec<C> scale;
  Vec<C> term(Vec<C> y, Vec<C> dy) const { return y * dy; }
  Vec<C> gradient(Vec<C> y, Vec<C> dy, Vec<C> total) const { return y * (dy - total) * scale; }
};
template <typename C>
struct LogSoftmaxGradient {
  Vec<C> scale;
  Vec<C> term(Vec<C>, Vec<C> dy) const { return dy; }
  Vec<C> gradient(Vec<C> y, Vec<C> dy, Vec<C> total) const { return (dy - exp(y) * total) * scale; }
};

template <typename T, typename TGrad, typename Gradient>
struct RowBackward {
  using C = Compute<T>;
  using V = Vec<C>;
  using Partial = C;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kChunk = 16384 / sizeof(C);  // of out and of dout

  const SoftmaxBackwardArgs& args;
  const Gradient rule;

  explicit RowBackward(const SoftmaxBackwardArgs& a) : args(a), rule{V::set1(static_cast<C>(a.scale))} {}

  struct Row {
    const T *y, *dy;
    TGrad* dx;
    const uint8_t* mask;
    bool hidden;
  };
  Row row(int64_t line) const {
    const Start start(args.lines, line);
    Row r{static_cast<const T*>(args.out) + start.at[kResult], static_cast<const T*>(args.dout) + start.at[kSource],
          static_cast<TGrad*>(args.dinput) + start.at[kResult],
          args.mask == nullptr ? nullptr : args.mask + start.at[kMask], false};
    if (r.mask != nullptr && args.lines.along[kMask] == 0) {
      r.hidden = *r.mask == 0;
      r.mask = nullptr;
    }
    return r;
  }
  static V at(const T* x, int64_t j, int lanes) { return lanes == kWidth ? load(x + j) : load_n(x + j, lanes); }
  // What is hidden has no gradient, whatever arrives there.
  static V seen(const Row& r, int64_t j, int lanes, V value) {
    return select(mask_from_bits<C>(bits_nonzero(r.mask + j, lanes)), value, V::zero());
  }

  C partial(int64_t line, int64_t begin, int64_t end) const {
    const Row r = row(line);
    if (r.hidden) return 0;
    return r.mask == nullptr ? partial<false>(r, begin, end) : partial<true>(r, begin, end);
  }
  template <bool kMasked>
  C partial(const Row& r, int64_t begin, int64_t end) const {
    constexpr int kChains = 8;  // two pipes x latency 4
    V s[kChains];
    for (V& chain : s) chain = V::zero();
    const auto add = [&](V& into, int64_t j, int lanes) {
      const V term = rule.term(at(r.y, j, lanes), at(r.dy, j, lanes));
      into = into + (kMasked ? seen(r, j, lanes, term) : term);
    };
    int64_t j = begin;
    for (; j + kChains * kWidth <= end; j += kChains * kWidth) {
      for (int k = 0; k < kChains; ++k) add(s[k], j + k * kWidth, kWidth);
    }
    for (; j + kWidth <= end; j += kWidth) add(s[0], j, kWidth);
    if (j < end) add(s[0], j, static_cast<int>(end - j));
    return reduce_add(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  }
  void merge(C& into, const C& next) const { into += next; }

  void write(int64_t line, int64_t begin, int64_t end, const C& total) const {
    const Row r = row(line);
    const V sum = V::set1(total);
    const auto gradient = [&](int64_t j, int lanes) {
      return rule.gradient(at(r.y, j, lanes), at(r.dy, j, lanes), sum);
    };
    if (r.hidden) {
      write_line(r.dx, begin, end, args.past_caches, [](int64_t, int) { return V::zero(); });
    } else if (r.mask == nullptr) {
      write_line(r.dx, begin, end, args.past_caches, gradient);
    } else {
      write_line(r.dx, begin, end, args.past_caches,
                 [&](int64_t j, int lanes) { return seen(r, j, lanes, gradient(j, lanes)); });
    }
  }
};

template <typename T, typename TGrad, typename Gradient>
struct ColumnBackward {
  using C = Compute<T>;
  using V = Vec<C>;
  using Partial = V;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kChunk = 8192 / (kWidth * sizeof(C));

  const SoftmaxBackwardArgs& args;
  const Gradient rule;
  const int64_t strips;

  explicit ColumnBackward(const SoftmaxBackwardArgs& a)
      : args(a), rule{V::set1(static_cast<C>(a.scale))}, strips(ceil_div(a.lines.across, kWidth)) {}

  // One register of a strip at step j: out, its gradient, and which lanes are visible.
  struct Element {
    V y, dy;
    uint64_t visible;
  };
  struct Strip {
    Start start;
    int64_t first;
    int lanes;
  };
  Strip strip(int64_t line) const {
    const int64_t first = line % strips * kWidth;
    return {Start(args.lines, line / strips), first, static_cast<int>(min(kWidth, args.lines.across - first))};
  }
  Element element(const Strip& s, int64_t j) const {
    const int64_t at = s.start.at[kResult] + s.first + j * args.lines.along[kResult];
    const T *y = static_cast<const T*>(args.out) + at, *dy = static_cast<const T*>(args.dout) + at;
    uint64_t bits = lane_bits(s.lanes);
    if (args.mask != nullptr) {
      const uint8_t* mask =
          args.mask + s.start.at[kMask] + s.first * args.lines.mask_across + j * args.lines.along[kMask];
      bits = args.lines.mask_across == 1 ? bits_nonzero(mask, s.lanes) : *mask ? bits : 0;
    }
    if (s.lanes == kWidth) return {load(y), load(dy), bits};
    return {load_n(y, s.lanes), load_n(dy, s.lanes), bits};
  }

  V partial(int64_t line, int64_t begin, int64_t end) const {
    const Strip s = strip(line);
    V sum = V::zero();
    for (int64_t j = begin; j < end; ++j) {
      const Element e = element(s, j);
      sum = sum + select(mask_from_bits<C>(e.visible), rule.term(e.y, e.dy), V::zero());
    }
    return sum;
  }
  void merge(V& into, const V& next) const { into = into + next; }

  void write(int64_t line, int64_t begin, int64_t end, const V& total) const {
    const Strip s = strip(line);
    TGrad* dx = static_cast<TGrad*>(args.dinput) + s.start.at[kResult] + s.first;
    for (int64_t j = begin; j < end; ++j) {
      const Element e = element(s, j);
      const V g = select(mask_from_bits<C>(e.visible), rule.gradient(e.y, e.dy, total), V::zero());
      s.lanes == kWidth ? store(dx + j * args.lines.along[kResult], g)
                        : store_n(dx + j * args.lines.along[kResult], g, s.lanes);
    }
  }
};

template <template <typename...> class Rows, template <typename...> class Columns, typename Args, typename... Types>
void run(const Args& args, double cost) {
  const Lines& lines = args.lines;
  if (lines.across == 1) {
    reduce_lines(Rows<Types...>(args), lines.outer, lines.length, cost);
  } else {
    const Columns<Types...> kernel(args);
    reduce_lines(kernel, lines.outer * kernel.strips, lines.length, cost * kernel.kWidth);
  }
  stream_end();
}

// An exponential is about 12 multiply-adds of a register.
template <typename T, typename TOut>
void forward(const SoftmaxArgs& args) {
  run<RowSoftmax, ColumnSoftmax, SoftmaxArgs, T, TOut>(args, 2.0);
}

template <typename T, typename TGrad>
void backward(const SoftmaxBackwardArgs& args) {
  using C = Compute<T>;
  if (args.log) {
    run<RowBackward, ColumnBackward, SoftmaxBackwardArgs, T, TGrad, LogSoftmaxGradient<C>>(args, 1.0);
  } else {
    run<RowBackward, ColumnBackward, SoftmaxBackwardArgs, T, TGrad, SoftmaxGradient<C>>(args, 1.0);
  }
}

}  // namespace

void softmax(const SoftmaxArgs& args) {
  const bool widen = args.input_dtype != args.out_dtype;
  switch (args.input_dtype) {
    case DType::kFloat32:
      return forward<float, float>(args);
    case DType::kFloat64:
      return forward<double, double>(args);
    case DType::kBFloat16:
      return widen ? forward<BFloat16, float>(args) : forward<BFloat16, BFloat16>(args);
    case DType::kFloat16:
      return widen ? forward<Float16, float>(args) : forward<Float16, Float16>(args);
  }
}

void softmax_backward(const SoftmaxBackwardArgs& args) {
  switch (args.out_dtype) {
    case DType::kFloat64:
      return backward<double, double>(args);
    case DType::kBFloat16:
      return backward<BFloat16, BFloat16>(args);
    case DType::kFloat16:
      return backward<Float16, Float16>(args);
    case DType::kFloat32:
      if (args.dinput_dtype == DType::kBFloat16) return backward<float, BFloat16>(args);
      if (args.dinput_dtype == DType::kFloat16) return backward<float, Float16>(args);
      return backward<float, float>(args);
  }
}

}  // namespace fastattn::FASTATTN_ISA
