// Attention weights in bfloat16 on AMX: attention_weights_heads.h over the products of feed_forward_tiles.h.
//
// bfloat16 alone. In pieces, a key that is not finite would send the whole call to AVX-512, and where that key is
// masked it must change no bit; and float16's two pieces are too few beside huge scores, whose lse comes from another
// kernel.
#include "attention_weights_heads.h"
#include "feed_forward_groups.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// WeightTiles whose products run on AMX: queries are multiplied as they are and scores scaled afterwards.
class AmxWeightTiles : public WeightTiles<float> {
 public:
  static constexpr int64_t kRows = 32;  // two tiles of scores then fit the first-level cache, almost

  AmxWeightTiles(const AttentionProblem& p, const View& lse) : WeightTiles(p, lse, ScoreUnit::kRaw) {}

  // In floats.
  int64_t queries_size() const { return operand_size(kRows); }
  int64_t keys_size() const { return operand_size(kKeys); }

  void pack(float* k, int64_t batch, int64_t head_kv, Range columns) const {
    Engine::pack_right_transposed(operand(k), row_of<const BFloat16>(p_.k, batch, head_kv, columns.begin),
                                  p_.k.stride[2], p_.head_dim, columns.end - columns.begin);
  }

  bool weigh(float* s, float* q, const float* k, int64_t batch, int64_t head, Range rows, Range columns) const {
    const Mask mask(p_, batch, head);
    const Coverage coverage = mask.coverage(rows, columns);
    if (coverage == Coverage::kNone) return false;
    const int64_t width = columns.end - columns.begin, height = rows.end - rows.begin;
    const BFloat16* from = row_of<const BFloat16>(p_.q, batch, head, rows.begin);
    Engine::pack_left(operand(q), from, p_.q.stride[2], height, p_.head_dim);
    Engine::product(height, width, p_.head_dim, operand(q), operand(const_cast<float*>(k)),
                    ProductResult<Engine::kColumns>{s, kKeys, Engine::kColumns}, true);
    scores_.finish(s, kKeys, batch, head, rows, columns, coverage != Coverage::kAll || width % FloatVec::kWidth != 0,
                   mask);
    exponentiate(s, s, batch, head, rows, columns);
    return true;
  }

 private:
  using Engine = TileEngine<1>;

  int64_t operand_size(int64_t n) const { return n * round_up(p_.head_dim, kStep) * Engine::kBytes / 4; }
  Engine::Operand operand(float* memory) const {
    return Engine::transposed({reinterpret_cast<char*>(memory), 0}, p_.head_dim);
  }
};

}  // namespace

bool attention_weights_takes(const AttentionWeightsArgs& args) {
  constexpr int64_t kFewQueries = 16;  // packing their keys costs more than their products
  return args.problem.q.dtype == DType::kBFloat16 && args.problem.seq_len_q > kFewQueries;
}

void attention_weights(const AttentionWeightsArgs& args) { Weights<float, AmxWeightTiles>(args).run(); }

}  // namespace fastattn::FASTATTN_ISA
