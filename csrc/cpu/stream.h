// Stores that go past the caches, for results too large to stay there: the line is not read first, which saves a third
// of the memory traffic of a copy. Included by kernels alone.
#pragma once

#include "pages.h"
#include "parallel.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

#if defined(FASTATTN_ISA_AVX512)
inline void stream(float* p, FloatVec a) { _mm512_stream_ps(p, a.v); }
inline void stream(double* p, DoubleVec a) { _mm512_stream_pd(p, a.v); }
inline void stream(BFloat16* p, FloatVec a) { _mm256_stream_si256((__m256i*)p, narrow_bfloat16(a)); }
inline void stream(Float16* p, FloatVec a) { _mm256_stream_si256((__m256i*)p, narrow_float16(a)); }
inline void stream_end() { _mm_sfence(); }
#elif defined(FASTATTN_ISA_AVX2)
inline void stream(float* p, FloatVec a) { _mm256_stream_ps(p, a.v); }
inline void stream(double* p, DoubleVec a) { _mm256_stream_pd(p, a.v); }
inline void stream(BFloat16* p, FloatVec a) { _mm_stream_si128((__m128i*)p, narrow_bfloat16(a)); }
inline void stream(Float16* p, FloatVec a) { _mm_stream_si128((__m128i*)p, narrow_float16(a)); }
inline void stream_end() { _mm_sfence(); }
#else
template <typename T>
inline void stream(T* p, Vec<Compute<T>> a) {
  store(p, a);
}
inline void stream_end() {}
#endif

// Stores n lanes, whole registers past the caches if kPast.
template <bool kPast, typename T>
inline void put_n(T* p, Vec<Compute<T>> a, int n) {
  store_n(p, a, n);
}
template <bool kPast, typename T>
inline void put_n(T* p, Vec<Compute<T>> a, AllLanes<Compute<T>>) {
  kPast ? stream(p, a) : store(p, a);
}

// How many lines of `bytes` lie between one that is computed and the one that is fetched meanwhile: 4 KiB are as long
// under way as they take to be worked on.
inline int64_t lines_ahead(int64_t bytes) { return ceil_div(4096, max(1, bytes)); }

// Whether a result of `bytes`, in rows of `row_bytes`, is to be streamed: where it is larger than caches and its
// registers are aligned. Then all threads first fault its pages in. What the system has just zeroed is still in the
// caches, where a streamed line is slow to replace it; by the time its turn comes it has left them.
inline bool prepare_stream(void* out, int64_t bytes, int64_t row_bytes) {
  constexpr int64_t kLarge = int64_t{16} << 20, kPages = int64_t{2} << 20;
  const int64_t address = reinterpret_cast<intptr_t>(out), before = address % kPages;
  if (bytes < kLarge || (address | row_bytes) % 64 != 0) return false;
  parallel_for(ceil_div(before + bytes, kPages), static_cast<double>(bytes), [&](int64_t task) {
    const int64_t begin = max(0, task * kPages - before), end = min(bytes, (task + 1) * kPages - before);
    fault_in(static_cast<char*>(out) + begin, end - begin);
  });
  return true;
}

}  // namespace fastattn::FASTATTN_ISA
