// Vec<T> on AVX-512 (F, BW, DQ, VL). Included by vec.h alone.

template <>
struct Vec<float> {
  static constexpr int kWidth = 16;
  using Scalar = float;
  using Mask = __mmask16;
  __m512 v;
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
};

template <>
struct Vec<double> {
  static constexpr int kWidth = 8;
  using Scalar = double;
  using Mask = __mmask8;
  __m512d v;
  static Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static Vec zero() { return {_mm512_setzero_pd()}; }
};

inline __mmask16 first_lanes16(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __mmask8 first_lanes8(int n) { return static_cast<__mmask8>((1u << n) - 1); }

inline FloatVec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline FloatVec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes16(n), p)}; }
inline void store(float* p, FloatVec a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, FloatVec a, int n) { _mm512_mask_storeu_ps(p, first_lanes16(n), a.v); }
inline DoubleVec load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline DoubleVec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(first_lanes8(n), p)}; }
inline void store(double* p, DoubleVec a) { _mm512_storeu_pd(p, a.v); }
inline void store_n(double* p, DoubleVec a, int n) { _mm512_mask_storeu_pd(p, first_lanes8(n), a.v); }

inline FloatVec widen_bfloat16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline FloatVec load(const BFloat16* p) { return widen_bfloat16(_mm256_loadu_si256((const __m256i*)p)); }
inline FloatVec load_n(const BFloat16* p, int n) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes16(n), p));
}
inline FloatVec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline FloatVec load_n(const Float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes16(n), p))};
}

inline __m256i narrow_bfloat16(FloatVec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // rounding could turn a NaN into Inf
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
inline __m256i narrow_float16(FloatVec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(BFloat16* p, FloatVec a) { _mm256_storeu_si256((__m256i*)p, narrow_bfloat16(a)); }
inline void store_n(BFloat16* p, FloatVec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes16(n), narrow_bfloat16(a));
}
inline void store(Float16* p, FloatVec a) { _mm256_storeu_si256((__m256i*)p, narrow_float16(a)); }
inline void store_n(Float16* p, FloatVec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes16(n), narrow_float16(a)); }

inline DoubleVec to_double(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }

inline FloatVec operator+(FloatVec a, FloatVec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline FloatVec operator-(FloatVec a, FloatVec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline FloatVec operator*(FloatVec a, FloatVec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline FloatVec operator/(FloatVec a, FloatVec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline FloatVec fnma(FloatVec a, FloatVec b, FloatVec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline FloatVec max(FloatVec a, FloatVec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline FloatVec min(FloatVec a, FloatVec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline FloatVec sqrt(FloatVec a) { return {_mm512_sqrt_ps(a.v)}; }
inline FloatVec round(FloatVec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline FloatVec abs(FloatVec a) { return {_mm512_abs_ps(a.v)}; }
inline FloatVec copysign(FloatVec a, FloatVec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  // imm 0xd8: where bit is set take sign, else a
  return {
      _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(a.v), 0xca))};
}
inline FloatVec ldexp(FloatVec a, FloatVec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline FloatVec round_remainder(FloatVec a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

inline DoubleVec operator+(DoubleVec a, DoubleVec b) { return {_mm512_add_pd(a.v, b.v)}; }
inline DoubleVec operator-(DoubleVec a, DoubleVec b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline DoubleVec operator*(DoubleVec a, DoubleVec b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline DoubleVec operator/(DoubleVec a, DoubleVec b) { return {_mm512_div_pd(a.v, b.v)}; }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline DoubleVec fnma(DoubleVec a, DoubleVec b, DoubleVec c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
inline DoubleVec max(DoubleVec a, DoubleVec b) { return {_mm512_max_pd(a.v, b.v)}; }
inline DoubleVec min(DoubleVec a, DoubleVec b) { return {_mm512_min_pd(a.v, b.v)}; }
inline DoubleVec sqrt(DoubleVec a) { return {_mm512_sqrt_pd(a.v)}; }
inline DoubleVec round(DoubleVec a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline DoubleVec abs(DoubleVec a) { return {_mm512_abs_pd(a.v)}; }
inline DoubleVec copysign(DoubleVec a, DoubleVec sign) {
  const __m512i bit = _mm512_set1_epi64(INT64_MIN);
  return {
      _mm512_castsi512_pd(_mm512_ternarylogic_epi64(bit, _mm512_castpd_si512(sign.v), _mm512_castpd_si512(a.v), 0xca))};
}
inline DoubleVec ldexp(DoubleVec a, DoubleVec n) { return {_mm512_scalef_pd(a.v, n.v)}; }
inline DoubleVec round_remainder(DoubleVec a) { return {_mm512_reduce_pd(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

inline __mmask16 lt(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline __mmask16 eq(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline __mmask8 lt(DoubleVec a, DoubleVec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
inline __mmask8 eq(DoubleVec a, DoubleVec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
inline FloatVec select(__mmask16 m, FloatVec a, FloatVec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline DoubleVec select(__mmask8 m, DoubleVec a, DoubleVec b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
template <typename T>
inline typename Vec<T>::Mask mask_from_bits(uint64_t bits) {
  return static_cast<typename Vec<T>::Mask>(bits);
}
inline uint64_t mask_bits(__mmask16 m) { return m; }
inline uint64_t mask_bits(__mmask8 m) { return m; }

inline float reduce_add(FloatVec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(FloatVec a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_add(DoubleVec a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(DoubleVec a) { return _mm512_reduce_max_pd(a.v); }

// a0 b0 a1 b1 ...: the first and the second half.
inline void interleave(FloatVec a, FloatVec b, FloatVec* low, FloatVec* high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *low = {_mm512_permutex2var_ps(a.v, first, b.v)};
  *high = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v)};
}
inline void interleave(DoubleVec a, DoubleVec b, DoubleVec* low, DoubleVec* high) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  *low = {_mm512_permutex2var_pd(a.v, first, b.v)};
  *high = {_mm512_permutex2var_pd(a.v, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b.v)};
}

// Bit j says whether p[j] == x, for j < n <= 64.
inline uint64_t bits_equal(const int32_t* p, int32_t x, int n) {
  uint64_t bits = 0;
  for (int j = 0; j < n; j += 16) {
    const __mmask16 lanes = n - j >= 16 ? __mmask16(0xffff) : first_lanes16(n - j);
    const __m512i values = _mm512_maskz_loadu_epi32(lanes, p + j);
    bits |= uint64_t{_mm512_mask_cmpeq_epi32_mask(lanes, values, _mm512_set1_epi32(x))} << j;
  }
  return bits;
}

// Bit j says whether p[j] != 0, for j < n <= 64.
inline uint64_t bits_nonzero(const uint8_t* p, int n) {
  const __mmask64 lanes = n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  const __m512i bytes = _mm512_maskz_loadu_epi8(lanes, p);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// Eight lanes of 64 bits, for the counters of philox.h.
struct U64Vec {
  static constexpr int kWidth = 8;
  __m512i v;
  static U64Vec set1(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
  static U64Vec iota(uint64_t start) {
    return {
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(start)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};
inline U64Vec mul_low32(U64Vec a, U64Vec b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline U64Vec high32(U64Vec a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline U64Vec xor3(U64Vec a, U64Vec b, U64Vec c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
// Bit k says whether the low 32 bits of lane k are below x's.
inline uint32_t lt_low32(U64Vec a, U64Vec x) {
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  return _mm512_cmplt_epu64_mask(_mm512_and_si512(a.v, low), _mm512_and_si512(x.v, low));
}
