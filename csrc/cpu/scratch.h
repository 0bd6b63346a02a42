// Working memory that outlives a call, so that no kernel pays for page faults or an allocator twice.
#pragma once

#include <cstddef>

namespace fastattn {

// Who asks: two buffers in use at once on one thread need two slots.
enum class Scratch : int { kShared = 0, kThread = 1, kCount = 2 };

// Returns at least `bytes` of uninitialised memory, 64-byte aligned and readable 64 bytes past its end, owned by the
// calling thread and valid until its next call with the same slot. Buffers up to a bound are kept for the life of the
// thread; a larger one is given back at the next call that asks for less. Throws std::bad_alloc.
void* scratch(Scratch slot, size_t bytes);

}  // namespace fastattn
