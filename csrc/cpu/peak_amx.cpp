#include "amx.h"
#include "peak.h"

namespace fastattn::FASTATTN_ISA {

double tile_peak(int64_t rounds) {
  const int64_t tasks = 8 * int64_t{max_threads()};  // so that a thread that comes late costs little
  parallel_for(tasks, 1e9, [&](int64_t) {
    TileScope tiles;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    // Four accumulators in flight, as in the kernels.
    for (int64_t round = 0; round < rounds; ++round) {
      tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
      tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }
  });
  return static_cast<double>(tasks) * static_cast<double>(rounds) * 4 * (16 * 16 * 32 * 2);
}

}  // namespace fastattn::FASTATTN_ISA
