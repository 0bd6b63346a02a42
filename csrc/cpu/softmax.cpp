// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for merging partial sums.
//
// Where the elements of a line are adjacent, a line is small enough for the second-level cache to hold it through three
// passes: its maximum; the exponentials, which are kept, and their sum; the result. Where neighbouring lines are, as
// many lines as a register has lanes are read together, once for maximum and sum, chunk by chunk, and once more for the
// result, for which the exponentials are computed again.
//
// Longer than 400 lines because rows and columns, forward and backward are four loops over one set of helpers.
#include "softmax.h"

#include <type_traits>

#include "chains.h"
#include "reduce.h"
#include "scratch.h"
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
    // Added to a number this large, a fraction is rounded away.
    const Vec<C> large = Vec<C>::set1(C(sizeof(C) == 8 ? 0x1.8p52 : 0x1.8p23));
    const Vec<C> n = fma(d, Vec<C>::set1(high), large) - large;
    Vec<C> r = fma(d, Vec<C>::set1(high), -n);
    r = fma(d, Vec<C>::set1(low), r);
    return ldexp(fma(polynomial(r, ExpConstants<C>::kExp2), r, Vec<C>::set1(C(1))), n);
  }
};

template <typename C>
constexpr C kNegInf = -static_cast<C>(__builtin_inff());

inline uint64_t lane_bits(int lanes) { return (uint64_t{1} << lanes) - 1; }

template <typename C>
inline C finite_or_zero(C maximum) {
  return maximum == kNegInf<C> ? C(0) : maximum;  // -inf minus -inf is NaN
}

// The elements of a line are adjacent: a register holds several of one line.
template <typename T, typename TOut>
struct RowSoftmax {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kChunk = 32768 / sizeof(C);  // of how many a sum is one number, and what threads share out
  // The result itself can hold the exponentials, unless they would be rounded there twice.
  static constexpr bool kInPlace = sizeof(TOut) == sizeof(C);
  static constexpr int64_t kMostKept = (int64_t{1} << 20) / sizeof(C);  // in L2, beside the line

  const SoftmaxArgs& args;
  const Exponent<C> exponent;
  const V sign;            // a negative scale turns the maximum into the minimum
  const bool past_caches;  // whether results are streamed
  const int64_t ahead;     // from a line to the one that is fetched while its exponentials are computed

  explicit RowSoftmax(const SoftmaxArgs& a)
      : args(a),
        exponent(a.scale < 0 ? -a.scale : a.scale),
        sign(V::set1(a.scale < 0 ? C(-1) : C(1))),
        past_caches(streams(a)),
        ahead(lines_ahead(a.lines.length * static_cast<int64_t>(sizeof(T))) * a.lines.outer_stride[kSource][0]) {}
  static bool streams(const SoftmaxArgs& a) {
    const int64_t bytes = a.lines.length * static_cast<int64_t>(sizeof(TOut));
    return !in_chunks(a.lines.outer, a.lines.length) && prepare_stream(a.out, a.lines.outer * bytes, bytes);
  }
  // Few long lines are shared out chunk by chunk.
  static bool in_chunks(int64_t lines, int64_t length) {
    const int64_t threads = max_threads();
    return length > kChunk && lines < 4 * threads && threads > 1;
  }

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

  // Calls body(j, n) for each register of [begin, end); n is an int at the tail and AllLanes before it.
  template <typename Body>
  static void for_range(int64_t begin, int64_t end, const Body& body) {
    for_each_vec<C>(end - begin, [&](int64_t j, auto n) { body(begin + j, n); });
  }
  static auto visible(const Row& r, int64_t j, int lanes) {
    return mask_from_bits<C>(r.mask == nullptr ? lane_bits(lanes) : bits_nonzero(r.mask + j, lanes));
  }

  struct Maximum {
    C value = kNegInf<C>;  // where it is -inf, 0 is subtracted in its place
    bool any = false;      // whether anything is visible
  };
  Maximum maximum(const Row& r, int64_t begin, int64_t end) const {
    if (r.hidden) return {};
    return r.mask == nullptr ? maximum<false>(r, begin, end) : maximum<true>(r, begin, end);
  }
  template <bool kMasked>
  Maximum maximum(const Row& r, int64_t begin, int64_t end) const {
    const V lowest = V::set1(kNegInf<C>);
    V m[4] = {lowest, lowest, lowest, lowest};
    uint64_t any = !kMasked;
    for_each_vec<C>(end - begin, m, [&](V& into, int64_t at, auto n) {
      const int64_t j = begin + at;
      V x = load_n(r.x + j, n) * sign;
      if (kMasked) any |= bits_nonzero(r.mask + j, n);
      if (kMasked || n < kWidth) x = select(visible(r, j, n), x, lowest);
      into = max(x, into);
    });
    return {reduce_max(max(max(m[0], m[1]), max(m[2], m[3]))), any != 0};
  }

  // The sum of the exponentials of [begin, end); they are kept in `kept`, if it is not null, from element `begin` on.
  C sum(const Row& r, int64_t begin, int64_t end, C highest, C* kept) const {
    if (r.mask != nullptr) return sum<true>(r, begin, end, highest, kept);
    return sum<false>(r, begin, end, highest, kept);
  }
  template <bool kMasked>
  C sum(const Row& r, int64_t begin, int64_t end, C highest, C* kept) const {
    V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto add = [&](auto keep) {
      for_each_vec<C>(end - begin, s, [&](V& into, int64_t at, auto n) {
        const int64_t j = begin + at;
        __builtin_prefetch(r.x + j + ahead);
        V e = exponential(r, j, n, V::set1(highest));
        if (kMasked || n < kWidth) e = select(visible(r, j, n), e, V::zero());
        if constexpr (decltype(keep)::value) store_n(kept + at, e, n);
        into = into + e;
      });
    };
    kept != nullptr ? add(std::true_type()) : add(std::false_type());
    return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  }
  template <typename N>
  V exponential(const Row& r, int64_t j, N n, V highest) const {
    return exponent(fma(load_n(r.x + j, n), sign, -highest));
  }

  // The result of [begin, end); `kept` as above.
  void write(const Row& r, int64_t begin, int64_t end, Maximum highest, C total, const C* kept) const {
    past_caches ? write<true>(r, begin, end, highest, total, kept) : write<false>(r, begin, end, highest, total, kept);
  }
  template <bool kPast>
  void write(const Row& r, int64_t begin, int64_t end, Maximum highest, C total, const C* kept) const {
    const V nothing = V::set1(args.log ? kNegInf<C> : C(0)), shift = V::set1(finite_or_zero(highest.value));
    const auto put = [&](const auto& value) {
      if (r.mask == nullptr) {
        for_range(begin, end, [&](int64_t j, auto n) { put_n<kPast>(r.out + j, value(j, n), n); });
      } else {
        for_range(begin, end, [&](int64_t j, auto n) {
          put_n<kPast>(r.out + j, select(visible(r, j, n), value(j, n), nothing), n);
        });
      }
    };
    const V inverse = V::set1(C(1) / total);
    if (!highest.any) {
      for_range(begin, end, [&](int64_t j, auto n) { put_n<kPast>(r.out + j, nothing, n); });
    } else if (args.log) {
      const V scale = V::set1(static_cast<C>(args.scale < 0 ? -args.scale : args.scale));
      const V log_sum = V::set1(static_cast<C>(__builtin_log(static_cast<double>(total))));
      const V top = V::set1(highest.value);
      put([&](int64_t j, auto n) { return fma(fma(load_n(r.x + j, n), sign, -top), scale, -log_sum); });
    } else if (kept != nullptr) {
      put([&](int64_t j, auto n) { return load_n(kept + (j - begin), n) * inverse; });
    } else {
      put([&](int64_t j, auto n) { return exponential(r, j, n, shift) * inverse; });
    }
  }

  // One line, chunk by chunk: a sum has the same bits whoever adds it up.
  void run_line(int64_t line) const {
    const int64_t length = args.lines.length;
    const Row r = row(line);
    const Maximum highest = maximum(r, 0, length);
    const C shift = finite_or_zero(highest.value);
    C total = 0;
    C* kept = nullptr;
    if (!args.log && length <= kMostKept) {
      if constexpr (kInPlace) kept = past_caches ? nullptr : r.out;
      if (kept == nullptr) kept = static_cast<C*>(scratch(Scratch::kThread, length * sizeof(C)));
    }
    for (int64_t begin = 0; highest.any && begin < length; begin += kChunk) {
      total += sum(r, begin, min(length, begin + kChunk), shift, kept == nullptr ? nullptr : kept + begin);
    }
    write(r, 0, length, highest, total, kept);
  }

  // Few long lines: their chunks are shared out each by itself.
  void run_chunks(int64_t lines, double work) const {
    const int64_t length = args.lines.length, chunks = ceil_div(length, kChunk);
    Carver carver(scratch(Scratch::kShared, lines * chunks * (sizeof(Maximum) + sizeof(C)) + 2 * 64));
    Maximum* highest = carver.take<Maximum>(lines * chunks);
    C* sums = carver.take<C>(lines * chunks);
    const auto for_each_chunk = [&](const auto& body) {
      parallel_for(lines * chunks, work, [&](int64_t task) {
        const int64_t begin = task % chunks * kChunk;
        const Row r = row(task / chunks);
        body(task, r, begin, min(length, begin + kChunk), kInPlace && !args.log ? exponentials(r, begin) : nullptr);
      });
    };
    for_each_chunk(
        [&](int64_t task, const Row& r, int64_t begin, int64_t end, C*) { highest[task] = maximum(r, begin, end); });
    for (int64_t line = 0; line < lines; ++line) {
      Maximum whole;
      for (Maximum* m = highest + line * chunks; m < highest + (line + 1) * chunks; ++m) {
        whole = {m->value > whole.value ? m->value : whole.value, m->any || whole.any};
      }
      for (int64_t k = 0; k < chunks; ++k) highest[line * chunks + k] = whole;
    }
    for_each_chunk([&](int64_t task, const Row& r, int64_t begin, int64_t end, C* kept) {
      sums[task] = highest[task].any ? sum(r, begin, end, finite_or_zero(highest[task].value), kept) : C(0);
    });
    for (int64_t line = 0; line < lines; ++line) {
      C* first = sums + line * chunks;
      for (int64_t k = 1; k < chunks; ++k) *first += first[k];
    }
    for_each_chunk([&](int64_t task, const Row& r, int64_t begin, int64_t end, C* kept) {
      write(r, begin, end, highest[task], sums[task / chunks * chunks], kept);
    });
  }
  static C* exponentials(const Row& r, int64_t begin) {
    if constexpr (kInPlace) return r.out + begin;
    return nullptr;
  }

  void run(double cost) const {
    const int64_t lines = args.lines.outer, length = args.lines.length, threads = max_threads();
    const double work = cost * static_cast<double>(lines) * static_cast<double>(length);
    if (in_chunks(lines, length)) return run_chunks(lines, work);
    // Four pieces a thread even out the load; no smaller than a chunk, which costs more than handing it out.
    const int64_t group = max(ceil_div(kChunk, max(length, 1)), ceil_div(lines, 4 * threads));
    parallel_for(ceil_div(lines, group), work, [&](int64_t task) {
      for (int64_t line = task * group; line < min(lines, (task + 1) * group); ++line) run_line(line);
      stream_end();
    });
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
  const bool past_caches;  // whether gradients are streamed
  const int64_t ahead;     // from a line to the one that is fetched while its gradient is written

  explicit RowBackward(const SoftmaxBackwardArgs& a)
      : args(a),
        rule{V::set1(static_cast<C>(a.scale))},
        past_caches(streams(a)),
        ahead(lines_ahead(a.lines.length * static_cast<int64_t>(sizeof(T))) * a.lines.length) {}
  static bool streams(const SoftmaxBackwardArgs& a) {
    const int64_t bytes = a.lines.length * static_cast<int64_t>(sizeof(TGrad));
    return prepare_stream(a.dinput, a.lines.outer * bytes, bytes);
  }

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
    // Two pipes x latency 4. One by one: GCC clears an array by `rep stos`, which waits for the streamed stores.
    V s[8] = {V::zero(), V::zero(), V::zero(), V::zero(), V::zero(), V::zero(), V::zero(), V::zero()};
    for_each_vec<C>(end - begin, s, [&](V& into, int64_t at, auto n) {
      const int64_t j = begin + at;
      const V term = rule.term(load_n(r.y + j, n), load_n(r.dy + j, n));
      into = into + (kMasked ? seen(r, j, n, term) : term);
    });
    return reduce_add(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  }
  void merge(C& into, const C& next) const { into += next; }

  void write(int64_t line, int64_t begin, int64_t end, const C& total) const {
    past_caches ? write<true>(line, begin, end, total) : write<false>(line, begin, end, total);
  }
  template <bool kPast>
  void write(int64_t line, int64_t begin, int64_t end, const C& total) const {
    const Row r = row(line);
    const V sum = V::set1(total);
    const auto gradient = [&](int64_t j, auto n) {
      __builtin_prefetch(r.y + j + ahead);
      __builtin_prefetch(r.dy + j + ahead);
      return rule.gradient(load_n(r.y + j, n), load_n(r.dy + j, n), sum);
    };
    const auto put = [&](const auto& value) {
      for_each_vec<C>(end - begin, [&](int64_t j, auto n) { put_n<kPast>(r.dx + begin + j, value(begin + j, n), n); });
    };
    if (r.hidden) {
      put([](int64_t, auto) { return V::zero(); });
    } else if (r.mask == nullptr) {
      put(gradient);
    } else {
      put([&](int64_t j, auto n) { return seen(r, j, n, gradient(j, n)); });
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

// An exponential is about 12 multiply-adds of a register.
template <typename T, typename TOut>
void forward(const SoftmaxArgs& args) {
  constexpr double kCost = 2.0;
  if (args.lines.across == 1) return RowSoftmax<T, TOut>(args).run(kCost);
  const ColumnSoftmax<T, TOut> kernel(args);
  reduce_lines(kernel, args.lines.outer * kernel.strips, args.lines.length, kCost * kernel.kWidth);
}

template <typename T, typename TGrad, typename Gradient>
void backward(const SoftmaxBackwardArgs& args) {
  if (args.lines.across == 1) {
    return reduce_lines(RowBackward<T, TGrad, Gradient>(args), args.lines.outer, args.lines.length, 1.0);
  }
  const ColumnBackward<T, TGrad, Gradient> kernel(args);
  reduce_lines(kernel, args.lines.outer * kernel.strips, args.lines.length, kernel.kWidth);
}
template <typename T, typename TGrad>
void backward(const SoftmaxBackwardArgs& args) {
  using C = Compute<T>;
  args.log ? backward<T, TGrad, LogSoftmaxGradient<C>>(args) : backward<T, TGrad, SoftmaxGradient<C>>(args);
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
