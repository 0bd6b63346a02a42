// What the machine does at best, for a benchmark to hold its figures against.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastattn {

// Memory for read_memory and copy_memory: it begins at a multiple of 64, and `bytes` is a multiple of 1024.
struct StreamArgs {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t bytes = 0;
};

// Runs `rounds` rounds of independent float32 multiply-adds in each of several tasks a thread, in registers alone;
// returns how many floating point operations that was.
FASTATTN_DECLARE(double multiply_add_peak(int64_t rounds))
FASTATTN_DECLARE(void read_memory(const StreamArgs& args))
FASTATTN_DECLARE(void copy_memory(const StreamArgs& args))
#if defined(FASTATTN_HAS_AMX)
namespace amx {
double tile_peak(int64_t rounds);  // the same for products of bfloat16 tiles
}
#endif

}  // namespace fastattn
