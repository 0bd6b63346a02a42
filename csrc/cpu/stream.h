// Stores that go past the caches, for results too large to stay there: the line is not read first, which saves a third
// of the memory traffic of a copy. Included by kernels alone.
#pragma once

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

// Writes value(j, lanes) to out[j, ...] for j in [begin, end), a register at a time; at the ends `lanes` is less than a
// register's and value must not touch what lies beyond. `past_caches` chooses stream().
template <typename T, typename Value>
inline void write_line(T* out, int64_t begin, int64_t end, bool past_caches, const Value& value) {
  constexpr int kWidth = Vec<Compute<T>>::kWidth;
  constexpr uintptr_t kRegister = kWidth * sizeof(T);
  int64_t j = begin;
  if (past_caches) {
    const uintptr_t over = reinterpret_cast<uintptr_t>(out + j) % kRegister;
    const int64_t head = min(static_cast<int64_t>((kRegister - over) % kRegister / sizeof(T)), end - j);
    if (head > 0) store_n(out + j, value(j, static_cast<int>(head)), static_cast<int>(head));
    for (j += head; j + kWidth <= end; j += kWidth) stream(out + j, value(j, kWidth));
  }
  for (; j + kWidth <= end; j += kWidth) store(out + j, value(j, kWidth));
  if (j < end) store_n(out + j, value(j, static_cast<int>(end - j)), static_cast<int>(end - j));
}

}  // namespace fastattn::FASTATTN_ISA
