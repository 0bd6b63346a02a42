// Vec<T> on the compiler's own 16-byte vectors: SSE2, NEON or whatever the target has. Included by vec.h alone.

typedef float NativeFloat __attribute__((vector_size(16)));
typedef double NativeDouble __attribute__((vector_size(16)));
typedef int32_t NativeInt32 __attribute__((vector_size(16)));
typedef int64_t NativeInt64 __attribute__((vector_size(16)));

template <>
struct Vec<float> {
  static constexpr int kWidth = 4;
  using Scalar = float;
  using Mask = NativeInt32;
  NativeFloat v;
  static Vec set1(float x) { return {NativeFloat{x, x, x, x}}; }
  static Vec zero() { return set1(0.0f); }
};

template <>
struct Vec<double> {
  static constexpr int kWidth = 2;
  using Scalar = double;
  using Mask = NativeInt64;
  NativeDouble v;
  static Vec set1(double x) { return {NativeDouble{x, x}}; }
  static Vec zero() { return set1(0.0); }
};

inline FloatVec load_n(const float* p, int n) {
  FloatVec a = FloatVec::zero();
  __builtin_memcpy(&a.v, p, static_cast<size_t>(n) * 4);
  return a;
}
inline FloatVec load(const float* p) { return load_n(p, 4); }
inline void store_n(float* p, FloatVec a, int n) { __builtin_memcpy(p, &a.v, static_cast<size_t>(n) * 4); }
inline void store(float* p, FloatVec a) { store_n(p, a, 4); }
inline DoubleVec load_n(const double* p, int n) {
  DoubleVec a = DoubleVec::zero();
  __builtin_memcpy(&a.v, p, static_cast<size_t>(n) * 8);
  return a;
}
inline DoubleVec load(const double* p) { return load_n(p, 2); }
inline void store_n(double* p, DoubleVec a, int n) { __builtin_memcpy(p, &a.v, static_cast<size_t>(n) * 8); }
inline void store(double* p, DoubleVec a) { store_n(p, a, 2); }

inline FloatVec load_n(const BFloat16* p, int n) {
  FloatVec a = FloatVec::zero();
  for (int i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
inline FloatVec load(const BFloat16* p) { return load_n(p, 4); }
inline FloatVec load_n(const Float16* p, int n) {
  FloatVec a = FloatVec::zero();
  for (int i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
inline FloatVec load(const Float16* p) { return load_n(p, 4); }
inline void store_n(BFloat16* p, FloatVec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = to_bfloat16(a.v[i]);
}
inline void store(BFloat16* p, FloatVec a) { store_n(p, a, 4); }
inline void store_n(Float16* p, FloatVec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = to_float16(a.v[i]);
}
inline void store(Float16* p, FloatVec a) { store_n(p, a, 4); }

inline DoubleVec to_double(const float* p) { return {NativeDouble{p[0], p[1]}}; }

inline FloatVec operator+(FloatVec a, FloatVec b) { return {a.v + b.v}; }
inline FloatVec operator-(FloatVec a, FloatVec b) { return {a.v - b.v}; }
inline FloatVec operator*(FloatVec a, FloatVec b) { return {a.v * b.v}; }
inline FloatVec operator/(FloatVec a, FloatVec b) { return {a.v / b.v}; }
inline FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return {a.v * b.v + c.v}; }
inline FloatVec fnma(FloatVec a, FloatVec b, FloatVec c) { return {c.v - a.v * b.v}; }
inline FloatVec max(FloatVec a, FloatVec b) { return {a.v > b.v ? a.v : b.v}; }
inline FloatVec min(FloatVec a, FloatVec b) { return {a.v < b.v ? a.v : b.v}; }
inline FloatVec sqrt(FloatVec a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
inline FloatVec abs(FloatVec a) { return {(NativeFloat)((NativeInt32)a.v & INT32_MAX)}; }
inline FloatVec round(FloatVec a) {
  const FloatVec magic = FloatVec::set1(0x1.8p23f);
  return {abs(a).v < 0x1p22f ? ((a + magic) - magic).v : a.v};  // nearly all floats beyond are whole
}
inline FloatVec copysign(FloatVec a, FloatVec sign) {
  return {(NativeFloat)(((NativeInt32)a.v & INT32_MAX) | ((NativeInt32)sign.v & INT32_MIN))};
}
// 2^n for integral n in [-127, 128]: 0 and Inf at the ends.
inline FloatVec pow2(FloatVec n) {
  const FloatVec shifted = n + FloatVec::set1(0x1.8p23f + 127.0f);  // n + 127 in the low bits
  return {(NativeFloat)((NativeInt32)shifted.v << 23)};
}

inline DoubleVec operator+(DoubleVec a, DoubleVec b) { return {a.v + b.v}; }
inline DoubleVec operator-(DoubleVec a, DoubleVec b) { return {a.v - b.v}; }
inline DoubleVec operator*(DoubleVec a, DoubleVec b) { return {a.v * b.v}; }
inline DoubleVec operator/(DoubleVec a, DoubleVec b) { return {a.v / b.v}; }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return {a.v * b.v + c.v}; }
inline DoubleVec fnma(DoubleVec a, DoubleVec b, DoubleVec c) { return {c.v - a.v * b.v}; }
inline DoubleVec max(DoubleVec a, DoubleVec b) { return {a.v > b.v ? a.v : b.v}; }
inline DoubleVec min(DoubleVec a, DoubleVec b) { return {a.v < b.v ? a.v : b.v}; }
inline DoubleVec sqrt(DoubleVec a) { return {NativeDouble{__builtin_sqrt(a.v[0]), __builtin_sqrt(a.v[1])}}; }
inline DoubleVec abs(DoubleVec a) { return {(NativeDouble)((NativeInt64)a.v & INT64_MAX)}; }
inline DoubleVec round(DoubleVec a) {
  const DoubleVec magic = DoubleVec::set1(0x1.8p52);
  return {abs(a).v < 0x1p51 ? ((a + magic) - magic).v : a.v};
}
inline DoubleVec copysign(DoubleVec a, DoubleVec sign) {
  return {(NativeDouble)(((NativeInt64)a.v & INT64_MAX) | ((NativeInt64)sign.v & INT64_MIN))};
}
// 2^n for integral n in [-1023, 1024]: 0 and Inf at the ends.
inline DoubleVec pow2(DoubleVec n) {
  const DoubleVec shifted = n + DoubleVec::set1(0x1.8p52 + 1023.0);
  return {(NativeDouble)((NativeInt64)shifted.v << 52)};
}

inline NativeInt32 lt(FloatVec a, FloatVec b) { return a.v < b.v; }
inline NativeInt32 eq(FloatVec a, FloatVec b) { return a.v == b.v; }
inline NativeInt64 lt(DoubleVec a, DoubleVec b) { return a.v < b.v; }
inline NativeInt64 eq(DoubleVec a, DoubleVec b) { return a.v == b.v; }
inline FloatVec select(NativeInt32 m, FloatVec a, FloatVec b) { return {m ? a.v : b.v}; }
inline DoubleVec select(NativeInt64 m, DoubleVec a, DoubleVec b) { return {m ? a.v : b.v}; }
template <typename T>
inline typename Vec<T>::Mask mask_from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) {
    const int32_t b = static_cast<int32_t>(bits & 15);
    const NativeInt32 lane = {1, 2, 4, 8};
    return (NativeInt32{b, b, b, b} & lane) == lane;
  } else {
    const int64_t b = static_cast<int64_t>(bits & 3);
    const NativeInt64 lane = {1, 2};
    return (NativeInt64{b, b} & lane) == lane;
  }
}
inline uint64_t mask_bits(NativeInt32 m) {
  return uint64_t{m[0] != 0} | uint64_t{m[1] != 0} << 1 | uint64_t{m[2] != 0} << 2 | uint64_t{m[3] != 0} << 3;
}
inline uint64_t mask_bits(NativeInt64 m) { return uint64_t{m[0] != 0} | uint64_t{m[1] != 0} << 1; }

inline float reduce_add(FloatVec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(FloatVec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
inline double reduce_add(DoubleVec a) { return a.v[0] + a.v[1]; }
inline double reduce_max(DoubleVec a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }

// a0 b0 a1 b1 ...: the first and the second half.
inline void interleave(FloatVec a, FloatVec b, FloatVec* low, FloatVec* high) {
  *low = {NativeFloat{a.v[0], b.v[0], a.v[1], b.v[1]}};
  *high = {NativeFloat{a.v[2], b.v[2], a.v[3], b.v[3]}};
}
inline void interleave(DoubleVec a, DoubleVec b, DoubleVec* low, DoubleVec* high) {
  *low = {NativeDouble{a.v[0], b.v[0]}};
  *high = {NativeDouble{a.v[1], b.v[1]}};
}

// Bit j says whether p[j] == x, for j < n <= 64.
inline uint64_t bits_equal(const int32_t* p, int32_t x, int n) {
  uint64_t bits = 0;
  for (int j = 0; j < n; ++j) bits |= uint64_t{p[j] == x} << j;
  return bits;
}

// Bit j says whether p[j] != 0, for j < n <= 64.
inline uint64_t bits_nonzero(const uint8_t* p, int n) {
  uint64_t bits = 0;
  for (int j = 0; j < n; ++j) bits |= uint64_t{p[j] != 0} << j;
  return bits;
}

// Two lanes of 64 bits, for the counters of philox.h.
struct U64Vec {
  typedef uint64_t Native __attribute__((vector_size(16)));
  static constexpr int kWidth = 2;
  Native v;
  static U64Vec set1(uint64_t x) { return {Native{x, x}}; }
  static U64Vec iota(uint64_t start) { return {Native{start, start + 1}}; }
};
inline U64Vec mul_low32(U64Vec a, U64Vec b) { return {(a.v & 0xffffffffu) * (b.v & 0xffffffffu)}; }
inline U64Vec high32(U64Vec a) { return {a.v >> 32}; }
inline U64Vec xor3(U64Vec a, U64Vec b, U64Vec c) { return {a.v ^ b.v ^ c.v}; }
// Bit k says whether the low 32 bits of lane k are below x's.
inline uint32_t lt_low32(U64Vec a, U64Vec x) {
  return uint32_t{static_cast<uint32_t>(a.v[0]) < static_cast<uint32_t>(x.v[0])} |
         uint32_t{static_cast<uint32_t>(a.v[1]) < static_cast<uint32_t>(x.v[1])} << 1;
}
