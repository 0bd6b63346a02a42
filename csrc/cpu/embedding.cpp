// Forward: a row after another, the next of which is fetched meanwhile. Backward: tokens are sorted by the row they
// came from, and each row of the gradient is written once, as the sum of its tokens in their order: no atomics, and the
// bits do not depend on the number of threads.
#include "embedding.h"

#include <type_traits>

#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "stream.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

inline int64_t position_of(const EmbeddingTokens& t, int64_t token) {
  const int64_t at = token % t.period;
  return t.positions != nullptr ? t.positions[at] : t.offset + at;
}

// Calls body(j, n, bits) for each vector of a row of columns: bit l of bits[k] says whether element j + l of row k
// survives. Without dropout the bits are not looked at.
template <typename C, int kRows, typename Body>
inline void for_each_kept(const EmbeddingTokens& t, const int64_t (&rows)[kRows], const Body& body) {
  for (int64_t column = 0; column < t.columns; column += 64) {
    uint64_t bits[kRows];
    for (int k = 0; k < kRows; ++k) {
      bits[k] = dropout_keep_bits(t.dropout, 0, static_cast<uint64_t>(rows[k]), static_cast<uint64_t>(column));
    }
    for_each_vec<C>(min(64, t.columns - column), [&](int64_t j, auto n) {
      typename Vec<C>::Mask kept[kRows];
      for (int k = 0; k < kRows; ++k) kept[k] = mask_from_bits<C>(bits[k] >> j);
      body(column + j, n, kept);
    });
  }
}

template <typename T, typename P, bool kPast>
void embed_rows(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const EmbeddingTokens& t = args.tokens;
  const bool drops = t.dropout.threshold != 0, adds = args.table.data != nullptr;
  const Vec<C> scale = Vec<C>::set1(static_cast<C>(t.scale)), zero = Vec<C>::zero();
  const Vec<C> rescale = Vec<C>::set1(static_cast<C>(t.dropout.rescale));
  const auto row = [&](int64_t token) {
    return static_cast<const T*>(args.weight.data) + t.ids[token] * args.weight.stride[0];
  };
  for (int64_t token = begin; token < end; ++token) {
    const T *from = row(token), *next = row(min(token + 1, end - 1));
    const P* position =
        adds ? static_cast<const P*>(args.table.data) + position_of(t, token) * args.table.stride[0] : nullptr;
    T* to = static_cast<T*>(args.out) + token * t.columns;
    const auto sum = [&](int64_t j, auto n) {
      __builtin_prefetch(next + j);
      const Vec<C> x = load_as_n<C>(from + j, n);
      return adds ? fma(x, scale, load_as_n<C>(position + j, n)) : x * scale;
    };
    if (drops) {
      const int64_t one[1] = {token};
      for_each_kept<C>(t, one, [&](int64_t j, auto n, const auto& kept) {
        put_n<kPast>(to + j, select(kept[0], sum(j, n) * rescale, zero), n);
      });
    } else {
      for_each_vec<C>(t.columns, [&](int64_t j, auto n) { put_n<kPast>(to + j, sum(j, n), n); });
    }
  }
}

template <typename T, typename P>
void embed(const EmbeddingArgs& args) {
  const EmbeddingTokens& t = args.tokens;
  const int64_t row_bytes = t.columns * static_cast<int64_t>(sizeof(T));
  const bool past_caches = prepare_stream(args.out, t.tokens * row_bytes, row_bytes);
  const int64_t group = max(1, 8192 / t.columns);
  const double each = t.dropout.threshold != 0 ? 10.0 : 4.0;
  const double work = each * static_cast<double>(t.tokens) * static_cast<double>(t.columns);
  parallel_for(ceil_div(t.tokens, group), work, [&](int64_t task) {
    const int64_t begin = task * group, end = min(t.tokens, begin + group);
    past_caches ? embed_rows<T, P, true>(args, begin, end) : embed_rows<T, P, false>(args, begin, end);
    stream_end();
  });
}

// Tokens by the row they came from: those of row r are order[starts[r]] to order[starts[r + 1]], ascending. Tasks take
// rows [first[i], first[i + 1]), all about as long.
struct Groups {
  int32_t *starts, *order;
  int64_t* first;
  int64_t tasks;
};
constexpr int64_t kMostTasks = 256;

// Bytes of scratch for the groups of a number of tokens and rows.
int64_t group_bytes(int64_t tokens, int64_t rows) {
  return (tokens + rows + 2) * static_cast<int64_t>(sizeof(int32_t)) +
         (kMostTasks + 2) * static_cast<int64_t>(sizeof(int64_t)) + 3 * 64;
}

template <typename Row>
Groups make_groups(int64_t tokens, int64_t rows, const Row& row_of_token) {
  Carver carver(scratch(Scratch::kShared, static_cast<size_t>(group_bytes(tokens, rows))));
  Groups groups{carver.take<int32_t>(rows + 2), carver.take<int32_t>(tokens), carver.take<int64_t>(kMostTasks + 2), 0};
  // Counted two places further, a row's place holds its start while it is handed out, and its end afterwards.
  int32_t* starts = groups.starts;
  for (int64_t r = 0; r < rows + 2; ++r) starts[r] = 0;
  for (int64_t t = 0; t < tokens; ++t) ++starts[row_of_token(t) + 2];
  for (int64_t r = 2; r < rows + 2; ++r) starts[r] += starts[r - 1];
  for (int64_t t = 0; t < tokens; ++t) groups.order[starts[row_of_token(t) + 1]++] = static_cast<int32_t>(t);
  const int64_t share = ceil_div(rows + 2 * tokens, kMostTasks);
  int64_t done = 0;
  groups.first[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t cost = r + 1 + 2 * int64_t{starts[r + 1]};
    if (cost - done >= share || r + 1 == rows) {
      done = cost;
      groups.first[++groups.tasks] = r + 1;
    }
  }
  return groups;
}

// Adds kRows rows of dout to `sums`, or to 0 if they are the `first`; the `last` go to `to`, times `factor`.
template <bool kPast, typename T, typename P, typename C, int kRows>
inline void add_rows(const EmbeddingBackwardArgs& args, const int32_t* tokens, C* sums, P* to, bool first, bool last,
                     Vec<C> factor) {
  const T* from[kRows];
  int64_t rows[kRows];
  for (int k = 0; k < kRows; ++k) {
    rows[k] = tokens[k];
    from[k] = row_of<const T>(args.dout, rows[k], 0, 0);
  }
  const auto finish = [&](int64_t j, auto n, Vec<C> sum) {
    if (last) {
      put_n<kPast>(to + j, sum * factor, n);
    } else {
      store_n(sums + j, sum, n);
    }
  };
  const auto begin = [&](int64_t j, auto n) { return first ? Vec<C>::zero() : load_as_n<C>(sums + j, n); };
  if (args.tokens.dropout.threshold != 0) {
    for_each_kept<C>(args.tokens, rows, [&](int64_t j, auto n, const auto& kept) {
      Vec<C> sum = begin(j, n);
      for (int k = 0; k < kRows; ++k) sum = sum + select(kept[k], load_as_n<C>(from[k] + j, n), Vec<C>::zero());
      finish(j, n, sum);
    });
  } else {
    for_each_vec<C>(args.tokens.columns, [&](int64_t j, auto n) {
      Vec<C> sum = begin(j, n);
      for (int k = 0; k < kRows; ++k) sum = sum + load_as_n<C>(from[k] + j, n);
      finish(j, n, sum);
    });
  }
}

// Writes the sum over each row's tokens, times `factor`; 0 for a row without tokens, and for row `padding`.
template <typename T, typename P, typename C>
void sum_groups(const EmbeddingBackwardArgs& args, const Groups& groups, P* to, int64_t rows, int64_t padding,
                double factor) {
  const int64_t columns = args.tokens.columns, row_bytes = columns * static_cast<int64_t>(sizeof(P));
  const Vec<C> scale = Vec<C>::set1(static_cast<C>(factor));
  const bool past_caches = prepare_stream(to, rows * row_bytes, row_bytes);
  const double each = args.tokens.dropout.threshold != 0 ? 10.0 : 4.0;
  const double work =
      static_cast<double>(columns) * (static_cast<double>(rows) + each * static_cast<double>(args.tokens.tokens));
  const auto write = [&](auto past, int64_t task) {
    constexpr bool kPast = decltype(past)::value;
    C* sums = static_cast<C*>(scratch(Scratch::kThread, static_cast<size_t>(columns) * sizeof(C)));
    for (int64_t r = groups.first[task]; r < groups.first[task + 1]; ++r) {
      P* target = to + r * columns;
      int64_t begin = groups.starts[r], end = r == padding ? begin : groups.starts[r + 1];
      if (begin == end) {
        for_each_vec<C>(columns, [&](int64_t j, auto n) { put_n<kPast>(target + j, Vec<C>::zero(), n); });
      }
      for (bool first = true; begin < end; first = false) {
        const int64_t count = min(4, end - begin);
        const int32_t* tokens = groups.order + begin;
        begin += count;
        const bool last = begin == end;
        if (count == 4) {
          add_rows<kPast, T, P, C, 4>(args, tokens, sums, target, first, last, scale);
        } else if (count == 3) {
          add_rows<kPast, T, P, C, 3>(args, tokens, sums, target, first, last, scale);
        } else if (count == 2) {
          add_rows<kPast, T, P, C, 2>(args, tokens, sums, target, first, last, scale);
        } else {
          add_rows<kPast, T, P, C, 1>(args, tokens, sums, target, first, last, scale);
        }
      }
    }
    stream_end();
  };
  parallel_for(groups.tasks, work,
               [&](int64_t task) { past_caches ? write(std::true_type(), task) : write(std::false_type(), task); });
}

}  // namespace

int64_t embedding_bad_token(const EmbeddingTokens& t, bool with_table) {
  bool bad = false;
  for (int64_t i = 0; i < t.tokens; ++i)
    bad |= static_cast<uint64_t>(t.ids[i]) >= static_cast<uint64_t>(t.num_embeddings);
  for (int64_t i = 0; with_table && t.positions != nullptr && i < t.period; ++i) {
    bad |= static_cast<uint64_t>(t.positions[i]) >= static_cast<uint64_t>(t.num_positions);
  }
  for (int64_t i = 0; bad && i < t.tokens; ++i) {
    const bool no_row = t.ids[i] < 0 || t.ids[i] >= t.num_embeddings;
    const int64_t position = with_table ? position_of(t, i) : 0;
    if (no_row || (with_table && (position < 0 || position >= t.num_positions))) return i;
  }
  return -1;
}

void embedding(const EmbeddingArgs& args) {
  visit(args.weight.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    visit(args.table.data == nullptr ? args.weight.dtype : args.table.dtype, [&](auto table_type) {
      using P = typename decltype(table_type)::Type;
      if constexpr (sizeof(Compute<P>) == sizeof(Compute<T>)) embed<T, P>(args);
    });
  });
}

void embedding_backward(const EmbeddingBackwardArgs& args) {
  const EmbeddingTokens& t = args.tokens;
  visit(args.dout.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    using C = Compute<T>;
    if (args.dweight.data != nullptr) {
      const Groups groups = make_groups(t.tokens, t.num_embeddings, [&](int64_t token) { return t.ids[token]; });
      sum_groups<T, T, C>(args, groups, static_cast<T*>(args.dweight.data), t.num_embeddings, args.padding,
                          t.scale * t.dropout.rescale);
    }
    if (args.dtable.data != nullptr) {
      const Groups groups =
          make_groups(t.tokens, t.num_positions, [&](int64_t token) { return position_of(t, token); });
      visit(args.dtable.dtype, [&](auto table_type) {
        using P = typename decltype(table_type)::Type;
        if constexpr (sizeof(Compute<P>) == sizeof(C)) {
          sum_groups<T, P, C>(args, groups, static_cast<P*>(args.dtable.data), t.num_positions, -1, t.dropout.rescale);
        }
      });
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
