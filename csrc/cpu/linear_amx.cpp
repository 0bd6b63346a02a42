// Products of linear layers on AMX tiles (feed_forward_tiles.h), a float32 as three bfloat16.
//
// All threads pack the left operand, as many of its rows as fit kSharedBytes; then a task is a panel of columns against
// a range of those rows. It packs its panel of the right operand a block of kDepth at a time, so that every element of
// the result is one sum in one order, whatever the threads. The result is written where it is to be if that is float32
// and whole tiles fit.
#include "feed_forward_groups.h"
#include "feed_forward_tiles.h"
#include "linear.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kSharedBytes = int64_t{48} << 20;
// A block of rows and a panel of columns, kDepth deep, share the second-level cache (2 MiB): 768 KiB each.
constexpr int64_t kBlockRows = 256, kPanelColumns = 256;
constexpr int64_t kPackRows = 64;    // of a task that packs
constexpr int64_t kLeastRows = 128;  // of a range: each packs its panel anew

template <typename T, typename Out>
class Linear {
 public:
  explicit Linear(const LinearArgs& args) : args_(args) {
    const int64_t threads = max_threads(), part_blocks = ceil_div(part_columns(), kStep);
    const int64_t wanted = ceil_div(round_up(ceil_div(args.columns, kPanelColumns), threads), args.out.count);
    panels_ = min(part_blocks, max(wanted, ceil_div(part_columns(), kPanelColumns)));
    const int64_t bytes = Engine::kBytes * kStep * round_up(args.depth, kStep);
    chunk_ = max(kSharedBytes / bytes * kStep / kBlockRows, 1) * kBlockRows;
    chunk_ = min(chunk_, round_up(args.rows, kStep));
    ranges_ = max(min(ceil_div(threads, panels_ * args.out.count), chunk_ / kLeastRows), 1);
    direct_ = sizeof(Out) == sizeof(float) && args.rows % kStep == 0 && part_columns() % kStep == 0;
  }

  // Returns whether all could be packed; if not, the output is void.
  bool run() const {
    const auto carve_left = [&](Carver& carver) { return Engine::take_left(carver, chunk_, args_.depth); };
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure(carve_left))));
    const Operand left = carve_left(shared);
    const double work =
        static_cast<double>(args_.rows) * static_cast<double>(args_.columns) * static_cast<double>(args_.depth);
    for (int64_t first = 0; first < args_.rows && packed_; first += chunk_) {
      const int64_t rows = min(chunk_, args_.rows - first);
      parallel_for(ceil_div(rows, kPackRows), work, [&](int64_t task) {
        const int64_t row = task * kPackRows;
        pack_left(left.at(row, 0), first + row, min(kPackRows, rows - row));
      });
      parallel_for(panels_ * args_.out.count * ranges_, work, [&](int64_t task) {
        const int64_t range = task % ranges_, blocks = ceil_div(rows, kStep);
        const int64_t begin = range * blocks / ranges_ * kStep, end = min((range + 1) * blocks / ranges_ * kStep, rows);
        multiply(left, first, begin, end, task / ranges_);
      });
    }
    return packed_;
  }

 private:
  using Engine = TileEngine<kPiecesOf<T>>;
  using Operand = typename Engine::Operand;
  using Result = ProductResult<Engine::kColumns>;
  static constexpr int64_t kDepth = 3072 / Engine::kBytes;  // what fills kPanelColumns to 768 KiB

  int64_t part_columns() const { return args_.columns / args_.out.count; }

  void note(bool packed) const {
    if (!packed) __atomic_store_n(&packed_, false, __ATOMIC_RELAXED);
  }

  // Rows [row, row + rows) of the left operand, all depths.
  void pack_left(const Operand& to, int64_t row, int64_t rows) const {
    const JoinedMatrix& left = args_.left;
    if (!args_.left_transposed) {
      const int64_t depth = args_.depth / left.count;
      for (int64_t part = 0; part < left.count; ++part) {
        const T* from = static_cast<const T*>(left.data[part]) + row * left.row_stride[part];
        note(Engine::pack_left(to.at(0, part * depth), from, left.row_stride[part], rows, depth));
      }
      return;
    }
    const int64_t part_rows = args_.rows / left.count;
    for (int64_t done = 0, count; done < rows; done += count) {
      const int64_t part = (row + done) / part_rows, at = (row + done) % part_rows;
      count = min(rows - done, part_rows - at);
      const T* from = static_cast<const T*>(left.data[part]) + at;
      note(Engine::pack_left_transposed(to.at(done, 0), from, left.row_stride[part], count, args_.depth));
    }
  }

  // Columns [column, column + columns) and depths [k, k + depth) of the right operand.
  void pack_right(const Operand& to, int64_t column, int64_t columns, int64_t k, int64_t depth) const {
    const T* right = static_cast<const T*>(args_.right);
    const int64_t stride = args_.right_stride;
    note(args_.right_transposed ? Engine::pack_right_transposed(to, right + column * stride + k, stride, depth, columns)
                                : Engine::pack_right(to, right + k * stride + column, stride, depth, columns));
  }

  // Rows [begin, end) of the chunk that begins with row `first`, and a panel of columns.
  void multiply(const Operand& left, int64_t first, int64_t begin, int64_t end, int64_t panel) const {
    const int64_t part = panel / panels_, blocks = ceil_div(part_columns(), kStep);
    const int64_t column = panel % panels_ * blocks / panels_ * kStep;
    const int64_t columns = min((panel % panels_ + 1) * blocks / panels_ * kStep, part_columns()) - column;
    const int64_t width = round_up(columns, kStep), height = round_up(end - begin, kStep);
    const bool deep = args_.depth > kDepth;
    Operand right{};
    Result sums{};
    const auto carve = [&](Carver& carver) {
      right = Engine::take_right(carver, min(kDepth, args_.depth), width);
      if (!direct_) sums = {carver.take<float>((deep ? height : min(height, kBlockRows)) * width), width, kStep};
    };
    const auto bytes = static_cast<size_t>(measure(carve));
    Carver carver(scratch(Scratch::kThread, bytes));
    carve(carver);
    Out* const out = static_cast<Out*>(args_.out.data[part]) + column;
    const int64_t out_stride = args_.out.row_stride[part];
    for (int64_t k = 0; k < args_.depth; k += kDepth) {
      const int64_t depth = min(kDepth, args_.depth - k);
      const Operand packed = Engine::transposed(right, depth);
      pack_right(packed, part * part_columns() + column, columns, k, depth);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t rows = min(kBlockRows, end - row);
        Out* const to = out + (first + row) * out_stride;
        Result result = deep ? sums.at(row - begin, 0) : sums;
        if constexpr (sizeof(Out) == sizeof(float)) {
          if (direct_) result = {to, out_stride, kStep};
        }
        Engine::product(rows, columns, depth, left.at(row, k), packed, result, k == 0);
        if (k + depth == args_.depth) finish(result, rows, columns, part * part_columns() + column, to, out_stride);
      }
    }
  }

  // Adds the bias to sums and writes them to where they are not.
  void finish(const Result& sums, int64_t rows, int64_t columns, int64_t column, Out* to, int64_t stride) const {
    const T* bias = static_cast<const T*>(args_.bias);
    if (direct_ && bias == nullptr) return;
    for (int64_t j = 0; j < columns; j += kStep) {
      const int64_t count = min(kStep, columns - j);
      FloatVec plus[2] = {FloatVec::zero(), FloatVec::zero()};
      if (bias != nullptr) {
        plus[0] = load_as_n<float>(bias + column + j, static_cast<int>(min(count, 16)));
        if (count > 16) plus[1] = load_as_n<float>(bias + column + j + 16, static_cast<int>(count - 16));
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float* from = sums.at(i, j).data;
        Out* row = to + i * stride + j;
        const FloatVec low = load(from) + plus[0], high = load(from + 16) + plus[1];
        if (count == kStep) {
          store(row, low);
          store(row + 16, high);
        } else {
          store_n(row, low, static_cast<int>(min(count, 16)));
          if (count > 16) store_n(row + 16, high, static_cast<int>(count - 16));
        }
      }
    }
  }

  const LinearArgs& args_;
  int64_t panels_;  // of each part of the output
  int64_t chunk_;   // rows of the left operand packed at once
  int64_t ranges_;  // of rows, each a task
  bool direct_;
  mutable bool packed_ = true;
};

}  // namespace

bool linear(const LinearArgs& args) {
  bool packed = false;
  visit(args.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float))
      packed = args.wide ? Linear<T, float>(args).run() : Linear<T, T>(args).run();
  });
  return packed;
}

}  // namespace fastattn::FASTATTN_ISA
