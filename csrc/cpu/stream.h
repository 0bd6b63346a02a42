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
inline void stream(T* p, Vec<Compute<T> > a) {
  store(p, a);
}
inline void stream_end() {}
#endif

}  // namespace fastattn::FASTATTN_ISA
