// Long bfloat16 products on AMX tiles whose results are worked on while the next ones are computed.
//
// Operands are packed in blocks of 32 rows of the left one or 32 columns of the right one, [block][step][2 tiles], as
// TileEngine<1> (feed_forward_tiles.h) packs them. A result is made in squares of 32 x 32 sums.
//
// Measured on a core that takes 5.0 ns for a product in registers alone: 5.1 where one of the two tiles it wants per
// product comes from the first-level cache, 6.9 where both come from the second; and of two operands that are larger
// than the first-level cache, loads must say which one is not to stay there. So a chunk of one right panel (32 columns,
// 512 deep: 32 KiB) stays in the first-level cache while all blocks of the left operand pass by it, past that cache;
// sums of a chunk wait in float32 for the next. That takes 6.0 to 6.5 ns a product, whatever the depth.
#pragma once

#include <type_traits>

#include "amx.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kBlockStep = 2 * kTileBytes;     // bytes of a step of a block
constexpr int64_t kSquare = kStep * kStep;         // sums of a square
constexpr int kSlices = 16;                        // what finish() takes of a square at once: two rows
constexpr int64_t kLag = 4;                        // steps before a square is worked on
constexpr int64_t kChunkSteps = 16;                // of a right panel: 32 KiB
constexpr int64_t kBlockCache = int64_t{5} << 18;  // bytes of a left operand that stay in the second-level cache

// A left operand, a right one, and room for the sums of their product: [blocks][kSquare].
struct Factors {
  const char* left;
  int64_t left_block;  // bytes from 32 rows to the next
  const char* right;
  int64_t right_panel;  // bytes from 32 columns to the next
  int64_t steps;
  float* sums;
};

// Multiplies `blocks` blocks by `panels` panels of each of `count` pairs of factors. finish(panel, block, square,
// slice) is called for each slice of each square when the sums of all factors are known: `square` is the last factor's,
// and the others' are at sums + block * kSquare; row r stands at square + r * kStep. The calling thread's tiles must be
// configured.
template <typename Finish>
inline void multiply_blocks(const Factors* factors, int count, int64_t blocks, int64_t panels, const Finish& finish) {
  struct {
    int64_t panel, block;
    float* square;
  } done{};
  bool waiting = false;     // whether `done` has to be finished
  char* pending = nullptr;  // where the sums belong that are still in registers
  const auto exchange = [&](auto tile, char* to, bool accumulate) {
    constexpr int kTile = decltype(tile)::value;
    constexpr int64_t kOffset = kTile / 2 * 16 * kStep * 4 + kTile % 2 * 64;
    // A tile store waits for its product and holds up the next one: each is stored when its register is wanted again.
    if (pending != nullptr) tile_store<kTile>(pending + kOffset, kStep * 4);
    accumulate ? tile_load<kTile>(to + kOffset, kStep * 4) : tile_zero<kTile>();
  };
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int k = 0; k < count; ++k) {
      const Factors& f = factors[k];
      const int64_t chunks = blocks > 1 ? ceil_div(f.steps, kChunkSteps) : 1;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * f.steps / chunks, steps = (chunk + 1) * f.steps / chunks - begin;
        const char* const right = f.right + panel * f.right_panel + begin * kBlockStep;
        const bool last = k == count - 1 && chunk == chunks - 1;
        const int64_t share = panel + 1 < panels ? ceil_div(kBlockStep / 64, blocks) : 0;
        const int per_step = static_cast<int>(ceil_div(kSlices, max(steps - kLag, 1)));
        for (int64_t block = 0; block < blocks; ++block) {
          const char *a = f.left + block * f.left_block + begin * kBlockStep, *b = right;
          // The next panel comes from afar, each block fetching its share.
          const char* next = right + f.right_panel + block * share * 64;
          const int64_t lines = min(share, kBlockStep / 64 - block * share);
          float* square = f.sums + (last && chunks == 1 ? block % 2 : block) * kSquare;
          char* const to = reinterpret_cast<char*>(square);
          tile_stream<4>(a, 64);
          tile_load<6>(b, 64);
          exchange(std::integral_constant<int, 0>(), to, chunk != 0);
          tile_multiply<0, 4, 6>();
          tile_load<7>(b + kTileBytes, 64);
          exchange(std::integral_constant<int, 1>(), to, chunk != 0);
          tile_multiply<1, 4, 7>();
          tile_stream<5>(a + kTileBytes, 64);
          exchange(std::integral_constant<int, 2>(), to, chunk != 0);
          tile_multiply<2, 5, 6>();
          exchange(std::integral_constant<int, 3>(), to, chunk != 0);
          tile_multiply<3, 5, 7>();
          pending = to;
          int64_t step = 1;
          const auto advance = [&] {
            for (int64_t l = 0; l < lines; ++l) _mm_prefetch(next + l * 64, _MM_HINT_T1);
            a += kBlockStep, b += kBlockStep, next += kBlockStep;
            tile_stream<4>(a, 64);
            tile_load<6>(b, 64);
            tile_multiply<0, 4, 6>();
            tile_load<7>(b + kTileBytes, 64);
            tile_multiply<1, 4, 7>();
            tile_stream<5>(a + kTileBytes, 64);
            tile_multiply<2, 5, 6>();
            tile_multiply<3, 5, 7>();
            ++step;
          };
          if (waiting) {
            // The square is stored only when its last product is done, and no load is served before that.
            while (step < min(kLag, steps)) advance();
            // A slice goes between two steps: tiles and vectors have units of their own.
            for (int slice = 0; slice < kSlices;) {
              finish(done.panel, done.block, done.square, slice++);
              if (slice % per_step == 0 && step < steps) advance();
            }
          }
          while (step < steps) advance();
          waiting = last;
          done = {panel, block, square};
        }
      }
    }
  }
  if (!waiting) return;
  tile_store<0>(pending, kStep * 4);
  tile_store<1>(pending + 64, kStep * 4);
  tile_store<2>(pending + 16 * kStep * 4, kStep * 4);
  tile_store<3>(pending + 16 * kStep * 4 + 64, kStep * 4);
  for (int slice = 0; slice < kSlices; ++slice) finish(done.panel, done.block, done.square, slice);
}

}  // namespace fastattn::FASTATTN_ISA
