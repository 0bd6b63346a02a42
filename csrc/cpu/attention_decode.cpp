// Attention forward for few queries (decoding against a cache), bound by the reading of keys and values: they are read
// once, in their own dtype and strides, for all query heads of a group (Dao et al., "Flash-Decoding", 2023).
//
// The keys are split into pieces of fixed length, so that one sequence keeps all threads busy; each piece leaves a
// partial softmax and a second pass adds the pieces of a row in their order. The split depends on the shape alone:
// every thread count gives the same bits.
#include "attention_decode.h"

#include "attention_rows.h"
#include "attention_scores.h"
#include "mask.h"
#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kPiece = 512;  // keys a task: 128 KiB of float32 at head_dim 64, and a multiple of 64

// A number of rows as a type.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <typename C>
class Decode {
 public:
  explicit Decode(const AttentionForwardArgs& args)
      : args_(args),
        p_(args.problem),
        scores_(p_),
        group_size_(p_.num_heads_q / p_.num_heads_kv),
        rows_(group_size_ * p_.seq_len_q),
        pieces_(ceil_div(p_.seq_len_k, kPiece)),
        out_stride_(round_up(p_.head_dim_v, Vec<C>::kWidth)) {}

  void run() const {
    const int64_t groups = p_.batch * p_.num_heads_kv;
    // Of each row and piece: the weighted values, then the maximum and the sum.
    C* partials = static_cast<C*>(
        scratch(Scratch::kShared, static_cast<size_t>(groups * rows_ * pieces_ * partial_size()) * sizeof(C)));
    const double work = static_cast<double>(groups * rows_) * static_cast<double>(p_.seq_len_k) *
                        static_cast<double>(p_.head_dim + p_.head_dim_v);
    parallel_for(groups * pieces_, work, [&](int64_t task) {
      run_piece(partials + task / pieces_ * rows_ * pieces_ * partial_size(), task / pieces_, task % pieces_);
    });
    parallel_for(groups * rows_, static_cast<double>(groups * rows_ * pieces_ * partial_size()), [&](int64_t task) {
      combine(partials + task * pieces_ * partial_size(), task / rows_, task % rows_);
    });
  }

 private:
  int64_t partial_size() const { return out_stride_ + Vec<C>::kWidth; }

  // One piece of keys for all rows of a group; partials are [rows, pieces, partial_size].
  void run_piece(C* partials, int64_t group, int64_t piece) const {
    constexpr int W = Vec<C>::kWidth;
    const int64_t batch = group / p_.num_heads_kv, kv_head = group % p_.num_heads_kv;
    Carver carver(
        scratch(Scratch::kThread, static_cast<size_t>(rows_ * (p_.head_dim + W + kPiece)) * sizeof(C) + 2 * 64));
    C* q = carver.take<C>(rows_ * p_.head_dim + W);
    C* s = carver.take<C>(rows_ * kPiece);

    const Range seen = Mask(p_, batch, kv_head * group_size_).k_range(0, p_.seq_len_q);
    const Range columns{max(piece * kPiece, seen.begin / 64 * 64), min((piece + 1) * kPiece, seen.end)};
    const int64_t width = columns.end - columns.begin;
    if (width <= 0) {
      for (int64_t r = 0; r < rows_; ++r) {
        C* partial = partials + (r * pieces_ + piece) * partial_size();
        for (int64_t d = 0; d < partial_size(); d += W) store(partial + d, Vec<C>::zero());
        partial[out_stride_] = -infinity<C>();
      }
      return;
    }
    for (int64_t h = 0; h < group_size_; ++h) {
      scores_.load_queries(q + h * p_.seq_len_q * p_.head_dim, batch, kv_head * group_size_ + h, {0, p_.seq_len_q});
    }
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        multiply_keys(s, q, row_of<const T>(p_.k, batch, kv_head, columns.begin), width);
      }
    });
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t head = kv_head * group_size_ + r / p_.seq_len_q, i = r % p_.seq_len_q;
      const Mask mask(p_, batch, head);
      const Range row{i, i + 1};
      const bool masked = mask.coverage(row, columns) != Coverage::kAll || width % W != 0;
      C* scores = s + r * kPiece;
      scores_.finish(scores, kPiece, batch, head, row, columns, masked, mask);
      RowState<C> state{-infinity<C>(), Vec<C>::zero(), {}};
      softmax_row(scores, width, &state);
      if (p_.dropout.threshold != 0) {
        drop_row(scores, width, p_.dropout, batch * p_.num_heads_q + head, i, columns.begin);
      }
      C* partial = partials + (r * pieces_ + piece) * partial_size();
      partial[out_stride_] = state.max;
      partial[out_stride_ + 1] = reduce_add(state.sum);
    }
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        multiply_values(partials + piece * partial_size(), s, row_of<const T>(p_.v, batch, kv_head, columns.begin),
                        batch, kv_head, columns);
      }
    });
  }

  // s[r, j] = q[r] . k[j] for `width` keys, kWidth of them at a time, which stay in the first cache for all rows.
  template <typename T>
  void multiply_keys(C* s, const C* q, const T* k, int64_t width) const {
    constexpr int W = Vec<C>::kWidth;
    const int64_t stride = p_.k.stride[2];
    for (int64_t j = 0; j < width; j += W) {
      const T* keys[W];  // past the end the last key stands in; the mask hides what it gives
      for (int i = 0; i < W; ++i) keys[i] = k + min(j + i, width - 1) * stride;
      for_each_rows([&](int64_t r, auto count) {
        constexpr int R = decltype(count)::value;
        for (int i = 0; i < W; i += W / R) {
          multiply_key_tile<R>(s + r * kPiece + j + i, q + r * p_.head_dim, keys + i, r == 0);
        }
      });
    }
  }

  // R rows against kWidth / R keys: an accumulator each along head_dim, so that a key is loaded and widened once for R
  // rows and there are kWidth chains of FMAs.
  template <int R, typename T>
  void multiply_key_tile(C* s, const C* q, const T* const* keys, bool first) const {
    constexpr int W = Vec<C>::kWidth, K = W / R;
    static_assert(K >= 1);
    const int64_t ahead = first ? W * p_.k.stride[2] : 0;
    Vec<C> sum[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sum[i] = Vec<C>::zero();
    for_each_vec<C>(p_.head_dim, [&](int64_t d, auto n) {
      Vec<C> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load_n(q + r * p_.head_dim + d, n);
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        if (first) __builtin_prefetch(keys[i] + ahead + d);
        const Vec<C> key = load_as_n<C>(keys[i] + d, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * K + i] = fma(x[r], key, sum[r * K + i]);
      }
    });
    fold<W / 2>(sum);
    C total[W];
    store(total, sum[0]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * kPiece, total + r * K, K * sizeof(C));
  }

  // Leaves in lane i of sum[0] the sum of the lanes of sum[i], by halves: 2 shuffles an addition, 30 where a
  // transposition takes 64.
  template <int Half>
  static void fold(Vec<C>* sum) {
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i) {
      Vec<C> low, high;
      interleave(sum[i], sum[i + Half], &low, &high);
      sum[i] = low + high;
    }
    if constexpr (Half > 1) fold<Half / 2>(sum);
  }

  // Calls body(r, count) for blocks of 4, 2 and 1 rows, but no more than a register has lanes; the count is a type.
  template <typename Body>
  void for_each_rows(const Body& body) const {
    for (int64_t r = 0; r < rows_;) {
      constexpr int kMost = Vec<C>::kWidth < 4 ? 2 : 4;
      if (rows_ - r >= kMost) {
        body(r, Count<kMost>());
        r += kMost;
      } else if (rows_ - r >= 2) {
        body(r, Count<2>());
        r += 2;
      } else {
        body(r, Count<1>());
        r += 1;
      }
    }
  }

  // out[r] = sum_j s[r, j] v[j]; out rows are pieces_ * partial_size() apart.
  template <typename T>
  void multiply_values(C* out, const C* s, const T* v, int64_t batch, int64_t kv_head, Range columns) const {
    for_each_rows([&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      if (multiply_rows<R>(out + r * pieces_ * partial_size(), s + r * kPiece, v, columns.end - columns.begin)) return;
      // 0 * NaN is NaN: when anything came out non-finite, invisible values are left out one by one.
      for (int64_t i = r; i < r + R; ++i) {
        const Mask mask(p_, batch, kv_head * group_size_ + i / p_.seq_len_q);
        multiply_visible(out + i * pieces_ * partial_size(), s + i * kPiece, v, mask, i % p_.seq_len_q, columns);
      }
    });
  }

  // Values whose vectors are multiplied together: a block of them is in the first cache when its later columns' turn
  // comes, and is read from end to end by the first.
  static constexpr int64_t kTogether = 32;

  // Returns whether all results are finite.
  template <int R, typename T>
  bool multiply_rows(C* out, const C* s, const T* v, int64_t width) const {
    for (int64_t j = 0; j < width; j += kTogether) {
      multiply_block<R>(out, s + j, v + j * p_.v.stride[2], min(kTogether, width - j), j == 0);
    }
    Vec<C> poison = Vec<C>::zero();
    for (int r = 0; r < R; ++r) {
      for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
        poison = fma(load_n(out + r * pieces_ * partial_size() + d, n), Vec<C>::zero(), poison);
      });
    }
    const C sum = reduce_add(poison);
    return sum == sum;
  }

  // Adds the values of a block, or begins with them. Four vectors of four rows are 16 chains of FMAs; a single row
  // takes eight vectors.
  template <int R, typename T>
  void multiply_block(C* out, const C* s, const T* v, int64_t width, bool fresh) const {
    constexpr int W = Vec<C>::kWidth;
    int64_t d = 0;
    for (; R == 1 && d + 8 * W <= p_.head_dim_v; d += 8 * W) {
      multiply_columns<R, 8>(out + d, s, v + d, width, AllLanes<C>(), fresh);
    }
    for (; d + 4 * W <= p_.head_dim_v; d += 4 * W) {
      multiply_columns<R, 4>(out + d, s, v + d, width, AllLanes<C>(), fresh);
    }
    for (; d + W <= p_.head_dim_v; d += W) multiply_columns<R, 1>(out + d, s, v + d, width, AllLanes<C>(), fresh);
    if (d < p_.head_dim_v) {
      multiply_columns<R, 1>(out + d, s, v + d, width, static_cast<int>(p_.head_dim_v - d), fresh);
    }
  }

  template <int R, int V, typename T, typename Lanes>
  void multiply_columns(C* out, const C* s, const T* v, int64_t width, Lanes n, bool fresh) const {
    constexpr int W = Vec<C>::kWidth;
    const int64_t ahead = W * p_.v.stride[2];
    Vec<C> sum[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) {
        sum[r][i] = fresh ? Vec<C>::zero() : load(out + r * pieces_ * partial_size() + i * W);
      }
    }
    for (int64_t j = 0; j < width; ++j, v += p_.v.stride[2]) {
      Vec<C> value[V];
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) {
        __builtin_prefetch(v + i * W + ahead);
        value[i] = load_as_n<C>(v + i * W, n);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<C> weight = Vec<C>::set1(s[r * kPiece + j]);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) store(out + r * pieces_ * partial_size() + i * W, sum[r][i]);
    }
  }

  template <typename T>
  void multiply_visible(C* out, const C* s, const T* v, const Mask& mask, int64_t row, Range columns) const {
    for (int64_t d = 0; d < out_stride_; d += Vec<C>::kWidth) store(out + d, Vec<C>::zero());
    for (int64_t j = columns.begin; j < columns.end; ++j, ++s, v += p_.v.stride[2]) {
      if (!mask.visible(row, j)) continue;
      for_each_vec<C>(p_.head_dim_v, [&](int64_t d, auto n) {
        store(out + d, fma(Vec<C>::set1(*s), load_as_n<C>(v + d, n), load(out + d)));
      });
    }
  }

  // Adds the pieces of one row and writes it.
  void combine(C* partials, int64_t group, int64_t r) const {
    const int64_t batch = group / p_.num_heads_kv;
    const int64_t head = group % p_.num_heads_kv * group_size_ + r / p_.seq_len_q, row = r % p_.seq_len_q;
    C highest = -infinity<C>();
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const C here = partials[piece * partial_size() + out_stride_];
      highest = here < highest ? highest : here;
    }
    const Vec<C> shift = Vec<C>::set1(highest == -infinity<C>() ? C(0) : highest);
    C sum = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      C* partial = partials + piece * partial_size();
      const Vec<C> alpha = exp2(Vec<C>::set1(partial[out_stride_]) - shift);
      C factor;
      store_n(&factor, alpha, 1);
      sum += factor * partial[out_stride_ + 1];
      for (int64_t d = 0; d < out_stride_; d += Vec<C>::kWidth) {
        const Vec<C> before = piece == 0 ? Vec<C>::zero() : load(partials + d);
        store(partials + d, fma(alpha, load(partial + d), before));
      }
    }
    double* lse = args_.lse + (batch * p_.num_heads_q + head) * p_.seq_len_q + row;
    const C factor = end_row(p_, head, sum, highest, lse);
    write_row(args_.out, batch, head, row, p_.head_dim_v, partials, factor);
  }

  const AttentionForwardArgs& args_;
  const AttentionProblem& p_;
  const Scores<C> scores_;
  const int64_t group_size_, rows_, pieces_, out_stride_;
};

}  // namespace

void attention_decode(const AttentionForwardArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Decode<double>(args).run();
  } else {
    Decode<float>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
