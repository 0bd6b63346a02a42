// Attention weights on AMX: attention_weights_heads.h over the products of feed_forward_tiles.h, a float32 as three
// bfloat16.
#include "attention_weights_heads.h"
#include "feed_forward_groups.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// WeightTiles whose products run on AMX. Half precision is multiplied as it is and scaled afterwards.
template <typename T>
class AmxWeightTiles : public WeightTiles<float> {
 public:
  static constexpr int64_t kRows = 32;  // two tiles of scores then fit the first-level cache, almost

  AmxWeightTiles(const AttentionProblem& p, const View& lse)
      : WeightTiles(p, lse, kScaled ? ScoreUnit::kLog2 : ScoreUnit::kRaw) {}

  // In floats.
  int64_t queries_size() const { return operand_size(kRows) + kRows * p_.head_dim; }
  int64_t keys_size() const { return operand_size(kKeys); }

  void pack(float* k, int64_t batch, int64_t head_kv, Range columns) const {
    note(Engine::pack_right_transposed(operand(k), row_of<const T>(p_.k, batch, head_kv, columns.begin), p_.k.stride[2],
                                       p_.head_dim, columns.end - columns.begin));
  }

  bool weigh(float* s, float* q, const float* k, int64_t batch, int64_t head, Range rows, Range columns) const {
    const Mask mask(p_, batch, head);
    const Coverage coverage = mask.coverage(rows, columns);
    if (coverage == Coverage::kNone) return false;
    const int64_t width = columns.end - columns.begin, height = rows.end - rows.begin;
    if constexpr (kScaled) {
      float* scaled = q + operand_size(kRows);
      scores_.load_queries(scaled, batch, head, rows);
      note(Engine::pack_left(operand(q), scaled, p_.head_dim, height, p_.head_dim));
    } else {
      const T* from = row_of<const T>(p_.q, batch, head, rows.begin);
      note(Engine::pack_left(operand(q), from, p_.q.stride[2], height, p_.head_dim));
    }
    Engine::product(height, width, p_.head_dim, operand(q), operand(const_cast<float*>(k)),
                    ProductResult<Engine::kColumns>{s, kKeys, Engine::kColumns}, true);
    scores_.finish(s, kKeys, batch, head, rows, columns, coverage != Coverage::kAll || width % FloatVec::kWidth != 0,
                   mask);
    exponentiate(s, s, batch, head, rows, columns);
    return true;
  }

  bool exact() const { return exact_; }

 private:
  using Engine = TileEngine<kPiecesOf<T>>;
  static constexpr bool kScaled = sizeof(T) == sizeof(float);

  // Carver's pieces are whole lines, and so are operands.
  int64_t operand_size(int64_t n) const { return n * round_up(p_.head_dim, kStep) * Engine::kBytes / 4; }
  typename Engine::Operand operand(float* memory) const {
    return Engine::transposed({reinterpret_cast<char*>(memory), 0}, p_.head_dim);
  }
  void note(bool packed) const {
    if (!packed) __atomic_store_n(&exact_, false, __ATOMIC_RELAXED);
  }

  mutable bool exact_ = true;
};

}  // namespace

bool attention_weights_takes(const AttentionWeightsArgs& args) {
  // Packing a few queries' keys costs more than their products.
  constexpr int64_t kFewQueries = 16;
  return args.problem.q.dtype != DType::kFloat64 && args.problem.seq_len_q > kFewQueries;
}

void attention_weights(const AttentionWeightsArgs& args) {
  bool exact = true;
  visit(args.problem.q.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) exact = Weights<float, AmxWeightTiles<T>>(args).run();
  });
  if (!exact) avx512::attention_weights(args);
}

}  // namespace fastattn::FASTATTN_ISA
