// The feed-forward's backward on register tiles: feed_forward_few_tokens.h, and feed_forward_gradients.h over panels.
#include "feed_forward_few_tokens.h"
#include "feed_forward_gradients.h"

namespace fastattn::FASTATTN_ISA {
namespace {

class PanelEngine {
 public:
  static constexpr int64_t kUnits = 128, kRows = 1, kColumns = kPanelWidth<float>, kBytes = sizeof(float);
  // Summed at once in registers: 128 rows of a panel (32 KiB) stay in the first-level cache while all rows of the left
  // operand pass.
  static constexpr int64_t kDepth = 128;

  struct Left {
    float* data;
    int64_t row, column;  // strides
    Left at(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
  };
  struct Right {
    float* data;
    int64_t panel;  // from panel to panel
    Right at(int64_t, int64_t k) const { return {data + k * kColumns, panel}; }
  };

  static Left take_left(Carver& carver, int64_t rows, int64_t depth) {
    const int64_t row = round_up(depth, FloatVec::kWidth) + kPad;
    return {carver.take<float>(rows * row), row, 1};
  }
  static Left transposed(const Left& left, int64_t) { return {left.data, left.column, left.row}; }
  static Right take_right(Carver& carver, int64_t depth, int64_t columns) {
    return {carver.take<float>(panels_size<float>(depth, columns)), panel_size<float>(depth)};
  }

  template <typename S>
  static bool pack_left(const Left& to, const S* from, int64_t stride, int64_t rows, int64_t depth) {
    for (int64_t i = 0; i < rows; ++i) {
      for_each_vec<float>(depth, [&](int64_t k, auto n) {
        store(to.data + i * to.row + k, load_as_n<float>(from + i * stride + k, n));
      });
    }
    return true;
  }
  template <typename S>
  static bool pack_left_transposed(const Left&, const S*, int64_t, int64_t, int64_t) {
    return true;  // it is what pack_left has packed, read the other way
  }
  template <typename S>
  static bool pack_right(const Right& to, const S* from, int64_t stride, int64_t depth, int64_t columns) {
    pack(to.data, from, stride, depth, columns, to.panel);
    return true;
  }
  template <typename S>
  static bool pack_right_transposed(const Right& to, const S* from, int64_t stride, int64_t depth, int64_t columns) {
    pack_transposed(to.data, from, stride, depth, columns);
    return true;
  }

  template <typename Result>
  static void product(int64_t rows, int64_t columns, int64_t depth, const Left& left, const Right& right,
                      const Result& to, bool start) {
    for (int64_t n = 0; n < columns; n += kColumns) {
      float* block = to.at(0, n).data;
      for (int64_t k = 0; k < depth; k += kDepth) {
        const bool overwrite = start && k == 0;
        multiply<float>(rows, min(kColumns, columns - n), min(kDepth, depth - k), left.data + k * left.column, left.row,
                        left.column, right.data + n / kColumns * right.panel + k * kColumns, right.panel,
                        [&](int64_t i, int64_t j, FloatVec value) {
                          float* p = block + i * to.row + j;
                          store(p, overwrite ? value : load(p) + value);
                        });
      }
    }
  }

 private:
  static constexpr int64_t kPad = 16;  // rows a power of two apart would share few sets of the caches
};

}  // namespace

void feed_forward_backward(const FeedForwardBackwardArgs& args) {
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      if (args.problem.tokens <= FewTokensGradients<T>::kMostTokens) {
        FewTokensGradients<T>(args).run();
      } else {
        FeedForwardGradients<T, PanelEngine>(args).run();
      }
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
