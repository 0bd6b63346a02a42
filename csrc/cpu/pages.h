// How large memory that a kernel is about to fill should be backed.
#pragma once

#include <cstdint>

namespace fastattn {

// Asks for huge pages under those of [data, data + bytes) that are whole huge pages. Memory fresh from the system costs
// a page fault for every 4 KiB at its first write, which takes several times as long as the write; with huge pages it
// is one for 2 MiB, and the memory of a process does not grow, since nothing beyond the range is touched. A system that
// gives none ignores the wish; memory that has its pages already keeps them.
void prefer_huge_pages(void* data, int64_t bytes);

// Has the system back the pages of [data, data + bytes) now, as their first writes would; their content stays.
void fault_in(void* data, int64_t bytes);

}  // namespace fastattn
