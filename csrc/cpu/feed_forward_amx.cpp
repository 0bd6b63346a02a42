// The feed-forward on AMX, forward: the products of feed_forward_tiles.h, cut as feed_forward_groups.h says.
//
// A task is a group of hidden units against a range of tokens. It packs its part of the weights once; into the output
// the tasks of a range add in turn, in the order of their units. The hidden activation is never held for more than a
// block of tokens and a group of units. Memory: the output in float32 where that is not its dtype, and each thread's
// group.
#include "activation.h"
#include "feed_forward.h"
#include "feed_forward_bfloat16_few_tokens.h"
#include "feed_forward_bfloat16_forward.h"
#include "feed_forward_groups.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Up to so many tokens, packing the weights costs more than their products.
constexpr int64_t kFewTokens = 32, kFewTokensBFloat16 = 4;
constexpr int64_t kRangeTokens = 512;  // least tokens of a range: each range packs all weights

template <typename T, int kPieces>
class ForwardAmx {
 public:
  explicit ForwardAmx(const FeedForwardArgs& args)
      : args_(args),
        p_(args.problem),
        ranges_(max(min(max_threads(), p_.tokens / kRangeTokens), 1)),
        blocks_(token_blocks<Engine>(p_.tokens, p_.model_dim, max_threads() > 1 ? 4 * max_threads() : 1)),
        out_(args.out, p_.tokens, p_.out_dim, blocks_) {}

  // Returns whether all could be packed; if not, the output is void.
  bool run() {
    const auto bytes = [&](int64_t subblocks) { return measure([&](Carver& carver) { carve(carver, subblocks); }); };
    const int64_t helpers = ceil_div(max_threads(), ranges_);
    const UnitGroups groups = unit_groups<Engine>(p_.ff_dim, p_.tokens, helpers, bytes);
    Carver shared(scratch(Scratch::kShared, static_cast<size_t>(measure([&](Carver& carver) { out_.carve(carver); }))));
    out_.carve(shared);
    out_.start();
    const double work = static_cast<double>(p_.tokens) * static_cast<double>(p_.ff_dim) *
                        static_cast<double>(p_.model_dim + p_.out_dim);
    const auto prepare = [&] {
      Carver carver(scratch(Scratch::kThread, static_cast<size_t>(bytes(groups.group))));
      return carve(carver, groups.group);
    };
    parallel_in_order(groups.tasks * ranges_, work, prepare, [&](const Task& task, int64_t index) {
      run_task(task, groups, index / ranges_, index % ranges_);
    });
    return packed_;
  }

 private:
  using Engine = TileEngine<kPieces>;
  using Operand = typename Engine::Operand;
  using Result = ProductResult<Engine::kColumns>;
  static constexpr int64_t kUnits = Engine::kUnits;

  struct Task {
    int64_t group;                // hidden units there is room for
    Operand in_t, gate_t, out_t;  // W_in^T, W_gate^T and W_out^T of the group
    Operand x, hidden;            // of a block of tokens
    Result before, gate_sum;      // [block, group]; `before` is later hidden
    uint64_t* keep;               // [block]: of 64 units, those that dropout spares
  };

  bool gated() const { return p_.weight_gate.data != nullptr; }

  Task carve(Carver& carver, int64_t subblocks) const {
    Task task;
    const int64_t group = subblocks * kUnits;
    const auto sums = [&] { return Result{carver.take<float>(blocks_.size * group), group, Engine::kColumns}; };
    task.group = group;
    task.in_t = Engine::take_right(carver, p_.model_dim, group);
    task.out_t = Engine::take_right(carver, group, p_.out_dim);
    task.x = Engine::take_left(carver, blocks_.size, p_.model_dim);
    task.hidden = Engine::take_left(carver, blocks_.size, group);
    task.before = sums();
    task.keep = carver.take<uint64_t>(blocks_.size);
    if (gated()) {
      task.gate_t = Engine::take_right(carver, p_.model_dim, group);
      task.gate_sum = sums();
    }
    return task;
  }

  void run_task(const Task& task, const UnitGroups& groups, int64_t turn, int64_t range) const {
    const int64_t first = groups.begin(turn) * kUnits;
    const int64_t units = min(groups.begin(turn + 1) * kUnits, p_.ff_dim) - first;
    const auto pack_transposed = [&](const Operand& to, const Matrix& weight) {
      note(Engine::pack_right_transposed(to, at(weight, first, 0), weight.row_stride, p_.model_dim, units));
    };
    pack_transposed(task.in_t, p_.weight_in);
    if (gated()) pack_transposed(task.gate_t, p_.weight_gate);
    note(Engine::pack_right_transposed(task.out_t, at(p_.weight_out, 0, first), p_.weight_out.row_stride, units,
                                       p_.out_dim));
    const int64_t end = (range + 1) * blocks_.count / ranges_;
    for (int64_t block = range * blocks_.count / ranges_; block < end; ++block) {
      const int64_t token = block * blocks_.size, tokens = min(blocks_.size, p_.tokens - token);
      note(Engine::pack_left(task.x, at(p_.input, token, 0), p_.input.row_stride, tokens, p_.model_dim));
      Engine::product(tokens, units, p_.model_dim, task.x, task.in_t, task.before, true);
      if (gated()) Engine::product(tokens, units, p_.model_dim, task.x, task.gate_t, task.gate_sum, true);
      visit_activation(p_.activation,
                       [&](auto tag) { apply<decltype(tag)::kValue>(task, first, units, token, tokens); });
      note(Engine::pack_left(task.hidden, task.before.data, task.group, tokens, units));
      out_.add(block, turn, turn == groups.tasks - 1, p_.bias_out, [&](const Result& out) {
        Engine::product(tokens, p_.out_dim, units, task.hidden, task.out_t, out, turn == 0);
      });
    }
  }

  void note(bool packed) const {
    if (!packed) __atomic_store_n(&packed_, false, __ATOMIC_RELAXED);
  }
  static const T* at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  }

  // Turns sums into hidden activations, in place.
  template <Activation A>
  void apply(const Task& task, int64_t first, int64_t units, int64_t token, int64_t tokens) const {
    const bool drops = p_.dropout.threshold != 0;
    const FloatVec rescale = FloatVec::set1(static_cast<float>(p_.dropout.rescale)), zero = FloatVec::zero();
    for_each_vec<float>(units, [&](int64_t i, auto n) {
      if (drops && i % 64 == 0) draw_kept_units(p_.dropout, token, tokens, first + i, task.keep);
      const FloatVec bias = bias_at<T>(p_.bias_in, first + i, n), gate_bias = bias_at<T>(p_.bias_gate, first + i, n);
      for (int64_t t = 0; t < tokens; ++t) {
        float* before = task.before.data + t * task.group + i;
        FloatVec hidden = activate<A>(load(before) + bias);
        if (gated()) hidden = hidden * (load(task.gate_sum.data + t * task.group + i) + gate_bias);
        if (drops) hidden = select(mask_from_bits<float>(task.keep[t] >> (i % 64)), hidden * rescale, zero);
        store(before, hidden);
      }
    });
  }

  const FeedForwardArgs& args_;
  const FeedForwardProblem& p_;
  const int64_t ranges_;  // of tokens
  const TokenBlocks blocks_;
  TurnSum<T, Engine> out_;
  mutable bool packed_ = true;
};

}  // namespace

bool feed_forward_takes(const FeedForwardArgs& args) {
  return args.problem.tokens > (args.problem.dtype == DType::kBFloat16 ? kFewTokensBFloat16 : kFewTokens);
}

void feed_forward(const FeedForwardArgs& args) {
  bool packed = true;
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (is_few_tokens_bfloat16(args.problem)) return FewTokensBFloat16(args).run();
      if (ForwardBFloat16::takes(args.problem)) return ForwardBFloat16(args).run();
    }
    if constexpr (sizeof(T) <= sizeof(float)) packed = ForwardAmx<T, kPiecesOf<T>>(args).run();
  });
  if (!packed) avx512::feed_forward(args);
}

}  // namespace fastattn::FASTATTN_ISA
