// Loops over a row that add up in several accumulators: in one, each step would wait for the step before it.
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// As for_each_vec of vec.h, but body(chain, offset, n), in turn with each of the chains.
template <typename C, typename Chain, int kChains, typename Body>
inline void for_each_vec(int64_t length, Chain (&chains)[kChains], const Body& body) {
  constexpr int W = Vec<C>::kWidth;
  int64_t i = 0;
  for (; i + kChains * W <= length; i += kChains * W) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) body(chains[k], i + k * W, AllLanes<C>());
  }
  for (; i + W <= length; i += W) body(chains[0], i, AllLanes<C>());
  if (i < length) body(chains[0], i, static_cast<int>(length - i));
}

// The first n lanes of a, the others 0.
template <typename C>
inline Vec<C> first_lanes(Vec<C> a, AllLanes<C>) {
  return a;
}
template <typename C>
inline Vec<C> first_lanes(Vec<C> a, int n) {
  return select(mask_from_bits<C>((uint64_t{1} << n) - 1), a, Vec<C>::zero());
}

}  // namespace fastattn::FASTATTN_ISA
