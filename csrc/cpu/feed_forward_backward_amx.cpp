// The feed-forward's backward on AMX: feed_forward_gradients.h over the products of feed_forward_tiles.h.
#include "feed_forward_bfloat16_backward.h"
#include "feed_forward_bfloat16_few_tokens_backward.h"
#include "feed_forward_gradients.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {

// Up to so many tokens, packing the weights costs more than their products.
constexpr int64_t kFewTokens = 64, kFewTokensBFloat16 = 4;

bool feed_forward_backward_takes(const FeedForwardBackwardArgs& args) {
  return args.problem.tokens > (args.problem.dtype == DType::kBFloat16 ? kFewTokensBFloat16 : kFewTokens);
}

void feed_forward_backward(const FeedForwardBackwardArgs& args) {
  bool packed = true;
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (std::is_same_v<T, BFloat16>) {
      is_few_tokens_bfloat16(args.problem) ? FewTokensBackwardBFloat16(args).run() : BackwardBFloat16(args).run();
    } else if constexpr (sizeof(T) <= sizeof(float)) {
      packed = FeedForwardGradients<T, TileEngine<kPiecesOf<T>>>(args).run();
    }
  });
  if (!packed) avx512::feed_forward_backward(args);
}

}  // namespace fastattn::FASTATTN_ISA
