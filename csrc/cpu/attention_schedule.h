// Who does what in attention forward: packing the keys and values of each key-value head, and its blocks of queries.
#pragma once

#include "attention.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

// The pieces of work of one group: a key-value head with the query heads that share it, or all heads of a batch entry.
struct GroupWork {
  int64_t groups;
  int64_t tiles;         // pieces of keys to pack
  int64_t packed_bytes;  // of all tiles
  int64_t blocks;        // of queries, of all heads of the group
  int64_t block_bytes;   // working memory of a block
};

// Runs pack(packed, group, tile) for all tiles of a group before run(packed, memory, group, block) for its blocks.
template <typename Pack, typename Run>
inline void for_each_block(const AttentionProblem& p, const GroupWork& work, const Pack& pack, const Run& run) {
  constexpr int64_t kSharedBytes = int64_t{64} << 20;
  const int64_t groups = work.groups, threads = max_threads();
  const double cost = static_cast<double>(p.batch * p.num_heads_q) * static_cast<double>(p.seq_len_q) *
                      static_cast<double>(p.seq_len_k) * static_cast<double>(p.head_dim + p.head_dim_v);
  // A thread a group needs no barrier and keeps the packed tiles in its own cache; worth at most 1 / 8 of idling.
  if (ceil_div(groups, threads) * threads * 8 <= groups * 9) {
    parallel_for(groups, cost, [&](int64_t group) {
      Carver carver(scratch(Scratch::kThread, work.packed_bytes + work.block_bytes));
      char* packed = carver.take<char>(work.packed_bytes);
      char* memory = carver.take<char>(work.block_bytes);
      for (int64_t tile = 0; tile < work.tiles; ++tile) pack(packed, group, tile);
      for (int64_t block = 0; block < work.blocks; ++block) run(packed, memory, group, block);
    });
    return;
  }
  // Otherwise all threads share one group after the other, or all groups at once where they are small.
  const int64_t together = max(1, min(groups, kSharedBytes / work.packed_bytes));
  for (int64_t first = 0; first < groups; first += together) {
    const int64_t count = min(together, groups - first);
    char* base = static_cast<char*>(scratch(Scratch::kShared, count * work.packed_bytes));
    parallel_for(count * work.tiles, cost, [&](int64_t task) {
      pack(base + task / work.tiles * work.packed_bytes, first + task / work.tiles, task % work.tiles);
    });
    // Late blocks see more keys where the mask is causal: they go first.
    parallel_for(count * work.blocks, cost, [&](int64_t task) {
      char* memory = static_cast<char*>(scratch(Scratch::kThread, work.block_bytes));
      run(base + task % count * work.packed_bytes, memory, first + task % count, work.blocks - 1 - task / count);
    });
  }
}

}  // namespace fastattn::FASTATTN_ISA
