// Attention weights, each head's or their mean, on vectors.
#include "attention_weights_heads.h"

namespace fastattn::FASTATTN_ISA {

void attention_weights(const AttentionWeightsArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Weights<double, WeightTiles<double>>(args).run();
  } else {
    Weights<float, WeightTiles<float>>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
