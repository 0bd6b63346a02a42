// The feed-forward's backward on AMX: feed_forward_gradients.h over the products of feed_forward_tiles.h.
#include "feed_forward_gradients.h"
#include "feed_forward_tiles.h"

namespace fastattn::FASTATTN_ISA {

bool feed_forward_backward_takes(const FeedForwardBackwardArgs& args) { return args.problem.dtype != DType::kFloat64; }

void feed_forward_backward(const FeedForwardBackwardArgs& args) {
  bool finite = true;
  visit(args.problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      constexpr int kPieces = sizeof(T) == sizeof(float) ? 3 : std::is_same_v<T, Float16> ? 2 : 1;
      finite = FeedForwardGradients<T, TileEngine<kPieces>>(args).run();
    }
  });
  if (!finite) avx512::feed_forward_backward(args);
}

}  // namespace fastattn::FASTATTN_ISA
