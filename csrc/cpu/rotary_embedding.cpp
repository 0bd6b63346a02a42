// A task takes a block of positions through a batch entry's heads: cosines and sines are computed once for all of them,
// in double, and stay in the first cache.
#include "rotary_embedding.h"

#include <type_traits>

#include "parallel.h"
#include "scratch.h"
#include "stream.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

#if defined(FASTATTN_ISA_AVX512)
inline FloatVec swap_neighbours(FloatVec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline DoubleVec swap_neighbours(DoubleVec a) { return {_mm512_permute_pd(a.v, 0x55)}; }
#elif defined(FASTATTN_ISA_AVX2)
inline FloatVec swap_neighbours(FloatVec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
inline DoubleVec swap_neighbours(DoubleVec a) { return {_mm256_permute_pd(a.v, 0x5)}; }
#else
inline FloatVec swap_neighbours(FloatVec a) { return {decltype(a.v){a.v[1], a.v[0], a.v[3], a.v[2]}}; }
inline DoubleVec swap_neighbours(DoubleVec a) { return {decltype(a.v){a.v[1], a.v[0]}}; }
#endif

// Cosine and sine of `turns[i] * position` in 2^-64 of a turn, whose whole turns overflow away. The rest of a quarter
// turn, |x| <= pi / 4, goes into the Taylor series: what those leave out is below 5e-12.
void cos_sin(const int64_t* turns, int64_t position, int64_t count, double scale, double* cosine, double* sine) {
  constexpr double kRadians = 0x1.921fb54442d18p+2 * 0x1p-64;  // 2 pi / 2^64
  const uint64_t times = static_cast<uint64_t>(position);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t phase = static_cast<uint64_t>(turns[i]) * times;
    const uint64_t quarter = (phase + (uint64_t{1} << 61)) >> 62;
    const double x = static_cast<double>(static_cast<int64_t>(phase - (quarter << 62))) * kRadians;
    const double y = x * x;
    const double c =
        1 + y * (-1.0 / 2 +
                 y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800 + y * (1.0 / 479001600))))));
    const double s =
        x + x * y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880 + y * (-1.0 / 39916800)))));
    const bool odd = quarter & 1;
    cosine[i] = ((quarter + 1) & 2 ? -scale : scale) * (odd ? s : c);
    sine[i] = (quarter & 2 ? -scale : scale) * (odd ? c : s);
  }
}

// Cosines and sines of `rows` positions, as rotate() takes them: [rows, 2, width] in the compute type. Where pairs are
// neighbours each stands there twice, the first sine of the two with its sign changed.
template <typename C>
class Tables {
 public:
  explicit Tables(const RotaryEmbeddingArgs& args)
      : args_(args), half_(args.rotary_dim / 2), width_(round_up(args.rotary_dim, 16)) {}

  int64_t width() const { return width_; }
  // Of scratch for a number of rows.
  int64_t bytes(int64_t rows) const {
    return rows * 2 * width_ * static_cast<int64_t>(sizeof(C)) + 2 * half_ * static_cast<int64_t>(sizeof(double)) + 128;
  }

  // Fills `to` for positions [begin, end) of a batch entry; `wide` has room for 2 * half numbers.
  void fill(int64_t batch, int64_t begin, int64_t end, C* to, double* wide) const {
    const double sign = args_.inverse ? -1.0 : 1.0;
    for (int64_t row = begin; row < end; ++row, to += 2 * width_) {
      double *cosine = wide, *sine = wide + half_;
      if (args_.turns != nullptr) {
        const int64_t* positions = args_.positions + batch * args_.position_stride;
        const int64_t position = args_.positions == nullptr ? args_.offset + row : positions[row];
        cos_sin(args_.turns, position, half_, args_.scale, cosine, sine);
      } else {
        read(args_.cos, batch, row, cosine);
        read(args_.sin, batch, row, sine);
      }
      for (int64_t i = 0; i < half_; ++i) {
        const C c = static_cast<C>(cosine[i]), s = static_cast<C>(sign * sine[i]);
        if (args_.interleaved) {
          to[2 * i] = to[2 * i + 1] = c;
          to[width_ + 2 * i] = -s;
          to[width_ + 2 * i + 1] = s;
        } else {
          to[i] = c;
          to[width_ + i] = s;
        }
      }
    }
  }

 private:
  void read(const View& table, int64_t batch, int64_t row, double* to) const {
    visit(table.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const T* from = static_cast<const T*>(table.data) + batch * table.stride[0] + row * table.stride[1];
      for (int64_t i = 0; i < half_; ++i) to[i] = to_double(from[i]) * args_.scale;
    });
  }

  const RotaryEmbeddingArgs& args_;
  const int64_t half_, width_;
};

// Rotates one row, given its cosines and sines.
template <bool kPast, typename T, typename C>
inline void rotate(const RotaryEmbeddingArgs& args, const T* from, T* to, const C* cosine, const C* sine) {
  if (args.interleaved) {
    for_each_vec<C>(args.rotary_dim, [&](int64_t i, auto n) {
      const Vec<C> x = load_as_n<C>(from + i, n);
      const Vec<C> turned = swap_neighbours(x) * load_as_n<C>(sine + i, n);
      put_n<kPast>(to + i, fma(x, load_as_n<C>(cosine + i, n), turned), n);
    });
  } else {
    const int64_t half = args.rotary_dim / 2;
    for_each_vec<C>(half, [&](int64_t i, auto n) {
      const Vec<C> x = load_as_n<C>(from + i, n), y = load_as_n<C>(from + half + i, n);
      const Vec<C> c = load_as_n<C>(cosine + i, n), s = load_as_n<C>(sine + i, n);
      put_n<kPast>(to + i, fnma(y, s, x * c), n);
      put_n<kPast>(to + half + i, fma(x, s, y * c), n);
    });
  }
  for_each_vec<C>(args.head_dim - args.rotary_dim, [&](int64_t i, auto n) {
    store_n(to + args.rotary_dim + i, load_as_n<C>(from + args.rotary_dim + i, n), n);
  });
}

template <typename T, typename C>
void rotate_all(const RotaryEmbeddingArgs& args) {
  const Tables<C> tables(args);
  const int64_t planes = args.query.heads + args.key.heads;
  const int64_t elements = args.batch * planes * args.seq_len * args.head_dim;
  // As many positions as leave the first cache to the rows.
  const int64_t rows = max(1, min(min(64, args.seq_len), 16384 / (2 * tables.width() * int64_t{sizeof(C)})));
  const int64_t blocks = ceil_div(args.seq_len, rows);
  // Few positions: heads are shared out too, 32 KiB of floats a task.
  const int64_t shares = args.batch * blocks >= 64 ? 1 : min(planes, elements / 8192 / (args.batch * blocks));
  const int64_t per_group = ceil_div(planes, max(1, shares)), groups = ceil_div(planes, per_group);

  const int64_t row_bytes = args.head_dim * static_cast<int64_t>(sizeof(T));
  // Both halves of a row begin at a register.
  const bool aligned = args.rotary_dim == args.head_dim && row_bytes % 128 == 0;
  const auto streams = [&](const RotaryEmbeddingArgs::Operand& operand) {
    const int64_t bytes = args.batch * operand.heads * args.seq_len * row_bytes;
    return aligned && prepare_stream(operand.to.data, bytes, row_bytes);
  };
  const bool past[] = {streams(args.query), args.key.heads > 0 && streams(args.key)};

  parallel_for(args.batch * blocks * groups, 4.0 * static_cast<double>(elements), [&](int64_t task) {
    const int64_t first = task % groups * per_group, last = min(planes, first + per_group);
    const int64_t block = task / groups % blocks, batch = task / groups / blocks;
    const int64_t begin = block * rows, end = min(args.seq_len, begin + rows);
    Carver carver(scratch(Scratch::kThread, static_cast<size_t>(tables.bytes(rows))));
    C* table = carver.take<C>(rows * 2 * tables.width());
    tables.fill(batch, begin, end, table, carver.take<double>(args.rotary_dim));
    for (int64_t plane = first; plane < last; ++plane) {
      const bool is_key = plane >= args.query.heads;
      const RotaryEmbeddingArgs::Operand& operand = is_key ? args.key : args.query;
      const int64_t head = is_key ? plane - args.query.heads : plane;
      const auto go = [&](auto streamed) {
        const C* at = table;
        for (int64_t row = begin; row < end; ++row, at += 2 * tables.width()) {
          rotate<decltype(streamed)::value>(args, row_of<const T>(operand.from, batch, head, row),
                                            row_of<T>(operand.to, batch, head, row), at, at + tables.width());
        }
      };
      past[is_key] ? go(std::true_type()) : go(std::false_type());
    }
    stream_end();
  });
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingArgs& args) {
  visit(args.query.from.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    rotate_all<T, Compute<T>>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
