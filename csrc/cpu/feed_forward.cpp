// The feed-forward block, forward (Vaswani et al., "Attention Is All You Need", 2017, equation 2; Shazeer, "GLU
// Variants Improve Transformer", 2020).
//
// Many tokens: a thread takes a block of them through both products, `kHidden` hidden units at a time, so that the
// hidden activation never leaves the second-level cache. Few tokens: the threads share out the rows of the weights
// instead, first of weight_in, then of weight_out. Every sum is taken in the same order either way. A handful of tokens
// would leave most lanes empty: there the lanes run along the rows of the weights, as in a matrix-vector product.
#include "feed_forward.h"

#include "feed_forward_blocks.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kHidden = 2 * kDepth;      // hidden units of a block; a multiple of kDepth
constexpr int64_t kTokens = 8 * kLanes;      // most tokens of a block
constexpr int64_t kRows = 16 * kTileRows;    // rows of weights a thread takes when tokens are few
constexpr int64_t kHandful = 4;              // most tokens whose dot products are taken row by row
constexpr int64_t kUnits = 64;               // rows a thread then takes: those of one word of dropout bits
constexpr int64_t kCopyTokens = 2 * kLanes;  // from so many tokens on, weights are copied to lie together

// Calls visitor(Count<n>()) for n in [1, Most].
template <int N>
struct Count {
  static constexpr int kCount = N;
};
template <int Most, typename Visitor>
void visit_count(int64_t n, const Visitor& visitor) {
  if constexpr (Most > 1) {
    if (n < Most) return visit_count<Most - 1>(n, visitor);
  }
  visitor(Count<Most>());
}

template <typename T>
class Forward {
 public:
  explicit Forward(const FeedForwardArgs& args) : args_(args), p_(args.problem) {}

  void run() const {
    if (p_.tokens <= kHandful) {
      return visit_count<kHandful>(p_.tokens, [&](auto n) { share_rows_of_handful<decltype(n)::kCount>(); });
    }
    const int64_t threads = max_threads(), panels = ceil_div(p_.tokens, kLanes);
    // As many blocks as threads, or a multiple of it, of about equal size.
    int64_t blocks = ceil_div(panels, kTokens / kLanes);
    if (panels >= threads) blocks = min(round_up(blocks, threads), panels);
    if (blocks < threads) return share_rows();
    const int64_t size = ceil_div(panels, blocks) * kLanes;
    parallel_for(ceil_div(p_.tokens, size), work(),
                 [&](int64_t task) { share_tokens(task * size, min(size, p_.tokens - task * size)); });
  }

 private:
  double work() const {
    return static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
           static_cast<double>(p_.model_dim + p_.out_dim);
  }
  bool gated() const { return p_.weight_gate.data != nullptr; }
  static int64_t floats(int64_t rows, int64_t tokens) { return round_up(tokens, kLanes) * rows; }

  void share_tokens(int64_t token, int64_t tokens) const {
    const int64_t left = max(kHidden, p_.out_dim) * kDepth;
    const int64_t total = floats(p_.model_dim + 2 * kHidden + p_.out_dim, tokens) + left;
    Carver scratch_memory(scratch(Scratch::kThread, static_cast<size_t>(total) * sizeof(float) + 5 * 64));
    const auto panels = [&](int64_t rows) {
      return Panels{scratch_memory.take<float>(floats(rows, tokens)), tokens, rows};
    };
    const Panels x = panels(p_.model_dim), hidden = panels(kHidden), gate = panels(kHidden), out = panels(p_.out_dim);
    float* buffer = tokens >= kCopyTokens || sizeof(T) < 4 ? scratch_memory.take<float>(left) : nullptr;
    pack_input(token, x);
    for (int64_t f = 0; f < p_.ff_dim; f += kHidden) {
      const int64_t rows = min(kHidden, p_.ff_dim - f);
      hidden_rows(token, f, rows, x, hidden, gate, 0, buffer);
      product<T>(p_.weight_out, 0, f, p_.out_dim, rows, hidden, 0, out, 0, f == 0, buffer);
    }
    write(token, 0, p_.out_dim, out);
  }

  void share_rows() const {
    const int64_t total = floats(p_.model_dim + p_.ff_dim, p_.tokens);
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(total) * sizeof(float) + 2 * 64));
    const Panels x{shared.take<float>(floats(p_.model_dim, p_.tokens)), p_.tokens, p_.model_dim};
    const Panels hidden{shared.take<float>(floats(p_.ff_dim, p_.tokens)), p_.tokens, p_.ff_dim};
    pack_input(0, x);
    const auto own = [&](int64_t& rows, Panels& panels, float*& buffer, int64_t row, int64_t end) {
      const size_t count = static_cast<size_t>(floats(kRows, p_.tokens) + kRows * kDepth);
      Carver memory(scratch(Scratch::kThread, count * sizeof(float) + 2 * 64));
      rows = min(kRows, end - row);
      panels = {memory.take<float>(floats(kRows, p_.tokens)), p_.tokens, kRows};
      buffer = p_.tokens >= kCopyTokens || sizeof(T) < 4 ? memory.take<float>(kRows * kDepth) : nullptr;
    };
    parallel_for(ceil_div(p_.ff_dim, kRows), work(), [&](int64_t task) {
      int64_t rows;
      Panels gate;
      float* buffer;
      own(rows, gate, buffer, task * kRows, p_.ff_dim);
      hidden_rows(0, task * kRows, rows, x, hidden, gate, task * kRows, buffer);
    });
    parallel_for(ceil_div(p_.out_dim, kRows), work(), [&](int64_t task) {
      int64_t rows;
      Panels out;
      float* buffer;
      own(rows, out, buffer, task * kRows, p_.out_dim);
      // The blocks of share_tokens().
      for (int64_t f = 0; f < p_.ff_dim; f += kHidden) {
        product<T>(p_.weight_out, task * kRows, f, rows, min(kHidden, p_.ff_dim - f), hidden, f, out, 0, f == 0,
                   buffer);
      }
      write(0, task * kRows, rows, out);
    });
  }

  // All vectors of tokens lie one after another here: x [N][model_dim], hidden [N][ff_dim], sums [N][kUnits].
  template <int N>
  void share_rows_of_handful() const {
    Carver shared(
        scratch(Scratch::kShared, static_cast<size_t>(N * (p_.model_dim + p_.ff_dim)) * sizeof(float) + 2 * 64));
    float* x = shared.take<float>(N * p_.model_dim);
    float* hidden = shared.take<float>(N * p_.ff_dim);
    for (int64_t t = 0; t < N; ++t) {
      const T* from = static_cast<const T*>(p_.input.data) + t * p_.input.row_stride;
      for_each_vec<float>(p_.model_dim, [&](int64_t k, auto n) {
        store_n(x + t * p_.model_dim + k, load_as_n<float>(from + k, n), n);
      });
    }
    parallel_for(ceil_div(p_.ff_dim, kUnits), work(), [&](int64_t task) {
      float in[N * kUnits], gate[N * kUnits];
      const int64_t f = task * kUnits, rows = min(kUnits, p_.ff_dim - f);
      dot_rows<N>(p_.weight_in, f, rows, x, p_.model_dim, in);
      if (gated()) dot_rows<N>(p_.weight_gate, f, rows, x, p_.model_dim, gate);
      for (int64_t t = 0; t < N; ++t) {
        const uint64_t keep = p_.dropout.threshold == 0 ? ~uint64_t{0}
                                                        : dropout_keep_bits(p_.dropout, 0, static_cast<uint64_t>(t),
                                                                            static_cast<uint64_t>(f));
        const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale));
        for_each_vec<float>(rows, [&](int64_t i, auto n) {
          FloatVec y;
          visit_activation(p_.activation, [&](auto tag) {
            y = activate<decltype(tag)::kValue>(load(in + t * kUnits + i) + bias_at<T>(p_.bias_in, f + i, n));
          });
          if (gated()) y = y * (load(gate + t * kUnits + i) + bias_at<T>(p_.bias_gate, f + i, n));
          y = select(mask_from_bits<float>(keep >> i), y * rescale, FloatVec::zero());
          store_n(hidden + t * p_.ff_dim + f + i, y, n);
        });
      }
    });
    parallel_for(ceil_div(p_.out_dim, kUnits), work(), [&](int64_t task) {
      float sums[N * kUnits];
      const int64_t row = task * kUnits, rows = min(kUnits, p_.out_dim - row);
      dot_rows<N>(p_.weight_out, row, rows, hidden, p_.ff_dim, sums);
      for (int64_t t = 0; t < N; ++t) {
        T* out = static_cast<T*>(args_.out.data) + t * args_.out.row_stride + row;
        for_each_vec<float>(rows, [&](int64_t i, auto n) {
          store_n(out + i, load(sums + t * kUnits + i) + bias_at<T>(p_.bias_out, row + i, n), n);
        });
      }
    });
  }

  // sums[t][i] = W[row + i] . x[t] for i < rows, with sums [N][kUnits].
  template <int N>
  void dot_rows(const Matrix& weight, int64_t row, int64_t rows, const float* x, int64_t depth, float* sums) const {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) dot_tile<4, N>(weight, row + i, x, depth, sums + i);
    for (; i < rows; ++i) dot_tile<1, N>(weight, row + i, x, depth, sums + i);
  }

  template <int R, int N>
  void dot_tile(const Matrix& weight, int64_t row, const float* x, int64_t depth, float* sums) const {
    const T* w = static_cast<const T*>(weight.data) + row * weight.row_stride;
    FloatVec sum[R][N];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < N; ++t) sum[r][t] = FloatVec::zero();
    }
    for_each_vec<float>(depth, [&](int64_t k, auto n) {
      FloatVec token[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) token[t] = load_n(x + t * depth + k, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const FloatVec weights = load_as_n<float>(w + r * weight.row_stride + k, n);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) sum[r][t] = fma(weights, token[t], sum[r][t]);
      }
    });
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < N; ++t) sums[t * kUnits + r] = reduce_add(sum[r][t]);
    }
  }

  void pack_input(int64_t token, const Panels& x) const {
    const T* from = static_cast<const T*>(p_.input.data) + token * p_.input.row_stride;
    pack_transposed(x.data, from, p_.input.row_stride, p_.model_dim, x.tokens);
  }

  // hidden[i0 ..] = dropout(act(W_in x + b_in) [* (W_gate x + b_gate)]) for the hidden units [f, f + rows).
  void hidden_rows(int64_t token, int64_t f, int64_t rows, const Panels& x, const Panels& hidden, const Panels& gate,
                   int64_t i0, float* buffer) const {
    product<T>(p_.weight_in, f, 0, rows, p_.model_dim, x, 0, hidden, i0, true, buffer);
    if (gated()) product<T>(p_.weight_gate, f, 0, rows, p_.model_dim, x, 0, gate, 0, true, buffer);
    visit_activation(p_.activation, [&](auto tag) {
      for (int64_t t = 0; t < x.tokens; t += kLanes) {
        for (int64_t i = 0; i < rows; ++i) {
          const FloatVec bias = broadcast<T>(p_.bias_in, f + i), gate_bias = broadcast<T>(p_.bias_gate, f + i);
          float* h = hidden.row(t, i0 + i);
          const float* g = gate.row(t, i);
          for (int64_t lane = 0; lane < kLanes; lane += FloatVec::kWidth) {
            FloatVec y = activate<decltype(tag)::kValue>(load(h + lane) + bias);
            if (gated()) y = y * (load(g + lane) + gate_bias);
            store(h + lane, y);
          }
        }
      }
    });
    if (p_.dropout.threshold != 0) drop(p_.dropout, token, f, rows, hidden, i0);
  }

  // out[token + t][row + i] = panels[i][t] + bias, transposed and rounded.
  void write(int64_t token, int64_t row, int64_t rows, const Panels& panels) const {
    constexpr int W = FloatVec::kWidth;
    for (int64_t t = 0; t < panels.tokens; t += W) {
      const int64_t count = min(W, panels.tokens - t);
      for (int64_t i = 0; i < rows; i += W) {
        const int n = static_cast<int>(min(W, rows - i));
        FloatVec square[W];
        for (int k = 0; k < W; ++k) square[k] = k < n ? load(panels.row(t, i + k)) : FloatVec::zero();
        transpose<float>(square);
        const FloatVec bias = p_.bias_out == nullptr
                                  ? FloatVec::zero()
                                  : load_as_n<float>(static_cast<const T*>(p_.bias_out) + row + i, n);
        for (int64_t k = 0; k < count; ++k) {
          store_n(static_cast<T*>(args_.out.data) + (token + t + k) * args_.out.row_stride + row + i, square[k] + bias,
                  n);
        }
      }
    }
  }

  const FeedForwardArgs& args_;
  const FeedForwardProblem& p_;
};

}  // namespace

void feed_forward(const FeedForwardArgs& args) {
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) Forward<T>(args).run();
  });
}

}  // namespace fastattn::FASTATTN_ISA
