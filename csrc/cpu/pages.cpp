#include "pages.h"

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace fastattn {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes <= 0) return;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

void fault_in(void* data, int64_t bytes) {
#if defined(__linux__)
#  if !defined(MADV_POPULATE_WRITE)
#    define MADV_POPULATE_WRITE 23  // of Linux 5.14; older systems refuse, and each first write faults as it always did
#  endif
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  unsigned char present[1];
  if (mincore(reinterpret_cast<void*>(start), kPage, present) == 0 && (present[0] & 1) != 0) return;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_POPULATE_WRITE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace fastattn
