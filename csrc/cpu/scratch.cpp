#include "scratch.h"

#include <cstdlib>
#include <new>

#include "pages.h"

namespace fastattn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kKeep = size_t{64} << 20;  // per slot and thread

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }

  void* reserve(size_t wanted) {
    if (wanted <= bytes && (bytes <= kKeep || wanted > kKeep)) return data;
    std::free(data);
    data = nullptr;
    bytes = 0;
    const size_t unit = wanted >= kHugePage ? kHugePage : 4096;
    const size_t rounded = (wanted + unit - 1) / unit * unit;
    data = std::aligned_alloc(unit, rounded);
    if (data == nullptr) throw std::bad_alloc();
    bytes = rounded;
    prefer_huge_pages(data, static_cast<int64_t>(rounded));
    return data;
  }
};

thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];

}  // namespace

void* scratch(Scratch slot, size_t bytes) { return buffers[static_cast<int>(slot)].reserve(bytes + 64); }

}  // namespace fastattn
