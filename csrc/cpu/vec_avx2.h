// Vec<T> on AVX2 with FMA and F16C. Included by vec.h alone.

template <>
struct Vec<float> {
  static constexpr int kWidth = 8;
  using Scalar = float;
  using Mask = __m256;
  __m256 v;
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }
};

template <>
struct Vec<double> {
  static constexpr int kWidth = 4;
  using Scalar = double;
  using Mask = __m256d;
  __m256d v;
  static Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static Vec zero() { return {_mm256_setzero_pd()}; }
};

inline __m256i first_lanes8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes4(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline FloatVec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline FloatVec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes8(n))}; }
inline void store(float* p, FloatVec a) { _mm256_storeu_ps(p, a.v); }
inline void store_n(float* p, FloatVec a, int n) { _mm256_maskstore_ps(p, first_lanes8(n), a.v); }
inline DoubleVec load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline DoubleVec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, first_lanes4(n))}; }
inline void store(double* p, DoubleVec a) { _mm256_storeu_pd(p, a.v); }
inline void store_n(double* p, DoubleVec a, int n) { _mm256_maskstore_pd(p, first_lanes4(n), a.v); }

// AVX2 has no masked load or store of 16-bit lanes: a tail goes through a buffer.
inline __m128i load_tail16(const void* p, int n) {
  alignas(16) uint16_t lanes[8] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return _mm_load_si128((const __m128i*)lanes);
}
inline void store_tail16(void* p, __m128i x, int n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128((__m128i*)lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * 2);
}

inline FloatVec widen_bfloat16(__m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline FloatVec load(const BFloat16* p) { return widen_bfloat16(_mm_loadu_si128((const __m128i*)p)); }
inline FloatVec load_n(const BFloat16* p, int n) { return widen_bfloat16(load_tail16(p, n)); }
inline FloatVec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline FloatVec load_n(const Float16* p, int n) { return {_mm256_cvtph_ps(load_tail16(p, n))}; }

inline __m128i narrow_bfloat16(FloatVec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // rounding could turn a NaN into Inf
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline __m128i narrow_float16(FloatVec a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(BFloat16* p, FloatVec a) { _mm_storeu_si128((__m128i*)p, narrow_bfloat16(a)); }
inline void store_n(BFloat16* p, FloatVec a, int n) { store_tail16(p, narrow_bfloat16(a), n); }
inline void store(Float16* p, FloatVec a) { _mm_storeu_si128((__m128i*)p, narrow_float16(a)); }
inline void store_n(Float16* p, FloatVec a, int n) { store_tail16(p, narrow_float16(a), n); }

inline DoubleVec to_double(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }

inline FloatVec operator+(FloatVec a, FloatVec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline FloatVec operator-(FloatVec a, FloatVec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline FloatVec operator*(FloatVec a, FloatVec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline FloatVec operator/(FloatVec a, FloatVec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline FloatVec fnma(FloatVec a, FloatVec b, FloatVec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline FloatVec max(FloatVec a, FloatVec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline FloatVec min(FloatVec a, FloatVec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline FloatVec sqrt(FloatVec a) { return {_mm256_sqrt_ps(a.v)}; }
inline FloatVec round(FloatVec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline FloatVec abs(FloatVec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline FloatVec copysign(FloatVec a, FloatVec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v))};
}
// 2^n for integral n in [-127, 128]: 0 and Inf at the ends.
inline FloatVec pow2(FloatVec n) {
  const __m256 shifted = _mm256_add_ps(n.v, _mm256_set1_ps(0x1.8p23f + 127.0f));  // n + 127 in the low bits
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23))};
}

inline DoubleVec operator+(DoubleVec a, DoubleVec b) { return {_mm256_add_pd(a.v, b.v)}; }
inline DoubleVec operator-(DoubleVec a, DoubleVec b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline DoubleVec operator*(DoubleVec a, DoubleVec b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline DoubleVec operator/(DoubleVec a, DoubleVec b) { return {_mm256_div_pd(a.v, b.v)}; }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline DoubleVec fnma(DoubleVec a, DoubleVec b, DoubleVec c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
inline DoubleVec max(DoubleVec a, DoubleVec b) { return {_mm256_max_pd(a.v, b.v)}; }
inline DoubleVec min(DoubleVec a, DoubleVec b) { return {_mm256_min_pd(a.v, b.v)}; }
inline DoubleVec sqrt(DoubleVec a) { return {_mm256_sqrt_pd(a.v)}; }
inline DoubleVec round(DoubleVec a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline DoubleVec abs(DoubleVec a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline DoubleVec copysign(DoubleVec a, DoubleVec sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(bit, a.v), _mm256_and_pd(bit, sign.v))};
}
// 2^n for integral n in [-1023, 1024]: 0 and Inf at the ends.
inline DoubleVec pow2(DoubleVec n) {
  const __m256d shifted = _mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52 + 1023.0));
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52))};
}

inline __m256 lt(FloatVec a, FloatVec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline __m256 eq(FloatVec a, FloatVec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline __m256d lt(DoubleVec a, DoubleVec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ); }
inline __m256d eq(DoubleVec a, DoubleVec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ); }
inline FloatVec select(__m256 m, FloatVec a, FloatVec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
inline DoubleVec select(__m256d m, DoubleVec a, DoubleVec b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
template <typename T>
inline typename Vec<T>::Mask mask_from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane));
  } else {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(bits));
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane));
  }
}
inline uint64_t mask_bits(__m256 m) { return static_cast<uint64_t>(_mm256_movemask_ps(m)); }
inline uint64_t mask_bits(__m256d m) { return static_cast<uint64_t>(_mm256_movemask_pd(m)); }

inline float reduce_add(FloatVec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(FloatVec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline double reduce_add(DoubleVec a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
inline double reduce_max(DoubleVec a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}

// a0 b0 a1 b1 ...: the first and the second half.
inline void interleave(FloatVec a, FloatVec b, FloatVec* low, FloatVec* high) {
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  *low = {_mm256_permute2f128_ps(even, odd, 0x20)};
  *high = {_mm256_permute2f128_ps(even, odd, 0x31)};
}
inline void interleave(DoubleVec a, DoubleVec b, DoubleVec* low, DoubleVec* high) {
  const __m256d even = _mm256_unpacklo_pd(a.v, b.v), odd = _mm256_unpackhi_pd(a.v, b.v);
  *low = {_mm256_permute2f128_pd(even, odd, 0x20)};
  *high = {_mm256_permute2f128_pd(even, odd, 0x31)};
}

// Bit j says whether p[j] == x, for j < n <= 64.
inline uint64_t bits_equal(const int32_t* p, int32_t x, int n) {
  uint64_t bits = 0;
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256i same = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)(p + j)), _mm256_set1_epi32(x));
    bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) << j;
  }
  for (; j < n; ++j) bits |= uint64_t{p[j] == x} << j;
  return bits;
}

// Bit j says whether p[j] != 0, for j < n <= 64.
inline uint64_t bits_nonzero(const uint8_t* p, int n) {
  uint64_t bits = 0;
  int j = 0;
  for (; j + 32 <= n; j += 32) {
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(p + j)), _mm256_setzero_si256());
    bits |= uint64_t{~static_cast<uint32_t>(_mm256_movemask_epi8(zero))} << j;
  }
  for (; j < n; ++j) bits |= uint64_t{p[j] != 0} << j;
  return bits;
}

// Four lanes of 64 bits, for the counters of philox.h.
struct U64Vec {
  static constexpr int kWidth = 4;
  __m256i v;
  static U64Vec set1(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
  static U64Vec iota(uint64_t start) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(start)), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
};
inline U64Vec mul_low32(U64Vec a, U64Vec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline U64Vec high32(U64Vec a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline U64Vec xor3(U64Vec a, U64Vec b, U64Vec c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
// Bit k says whether the low 32 bits of lane k are below x's.
inline uint32_t lt_low32(U64Vec a, U64Vec x) {
  const __m256i low = _mm256_set1_epi64x(0xffffffff);
  const __m256i less = _mm256_cmpgt_epi64(_mm256_and_si256(x.v, low), _mm256_and_si256(a.v, low));
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(less)));
}
