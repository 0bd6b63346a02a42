// Working memory that outlives a call, so that no kernel pays for page faults or an allocator twice.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace fastattn {

// Who asks: two buffers in use at once on one thread need two slots.
enum class Scratch : int { kShared = 0, kThread = 1, kCount = 2 };

// Returns at least `bytes` of uninitialised memory, 64-byte aligned and readable 64 bytes past its end, owned by the
// calling thread and valid until its next call with the same slot. Buffers up to a bound are kept for the life of the
// thread; a larger one is given back at the next call that asks for less. Throws std::bad_alloc.
void* scratch(Scratch slot, size_t bytes);

#if defined(FASTATTN_ISA)
namespace FASTATTN_ISA {

// Hands out pieces of one allocation, each aligned to a cache line.
class Carver {
 public:
  explicit Carver(void* base) : next_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  // Where the next piece will stand: what has been handed out ends there.
  char* next() const { return next_; }

 private:
  char* next_;
};

}  // namespace FASTATTN_ISA
#endif

}  // namespace fastattn
