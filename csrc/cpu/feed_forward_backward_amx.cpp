// The feed-forward's backward on AMX: feed_forward_gradients.h over the products of feed_forward_tiles.h.
#include "feed_forward_gradients.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {

bool feed_forward_backward_takes(const FeedForwardBackwardArgs& args) { return args.problem.dtype != DType::kFloat64; }

void feed_forward_backward(const FeedForwardBackwardArgs& args) {
  bool packed = true;
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) packed = FeedForwardGradients<T, TileEngine<kPiecesOf<T>>>(args).run();
  });
  if (!packed) avx512::feed_forward_backward(args);
}

}  // namespace fastattn::FASTATTN_ISA
