// Vec<T>: one register of T, and the arithmetic the kernels write their algorithms in.
//
// Everything here lives in the namespace of the instruction set the file is compiled for. Loads and stores convert:
// load(const BFloat16*) gives a Vec<float>, store(BFloat16*, v) rounds to nearest even and keeps NaN a NaN.
// `_n` variants touch only the first n lanes; a load fills the others with 0.
// max(a, b) and min(a, b) return b when either is NaN, so max(limit, x) lets a NaN in x through.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

#if defined(FASTATTN_ISA_AVX512) || defined(FASTATTN_ISA_AVX2)
#  include <immintrin.h>
#endif

namespace fastattn::FASTATTN_ISA {

template <typename T>
struct Vec;
using FloatVec = Vec<float>;
using DoubleVec = Vec<double>;

// The type arithmetic happens in for a storage type.
template <typename T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::Type;

template <typename To, typename From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

// Scalar conversions.
inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The half's bits moved into a float's places are its value times 2^-112, subnormals included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}
inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more round to Inf
  if (magnitude < 0x38800000) {                                                // below 2^-14: the result is subnormal
    // Adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded to nearest even by the addition itself.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}
inline double to_double(double x) { return x; }
template <typename T>
inline double to_double(T x) {
  return static_cast<double>(to_float(x));
}
template <typename C, typename T>
inline C to_compute(T x) {
  if constexpr (sizeof(C) == 8) {
    return to_double(x);
  } else {
    return to_float(x);
  }
}

#if defined(FASTATTN_ISA_AVX512)
#  include "vec_avx512.h"
#elif defined(FASTATTN_ISA_AVX2)
#  include "vec_avx2.h"
#else
#  include "vec_portable.h"
#endif

// Calls visitor(TypeTag<T>()) with the storage type of a dtype.
template <typename T>
struct TypeTag {
  using Type = T;
};
template <typename Visitor>
inline void visit(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(TypeTag<float>());
    case DType::kBFloat16:
      return visitor(TypeTag<BFloat16>());
    case DType::kFloat16:
      return visitor(TypeTag<Float16>());
    case DType::kFloat64:
      return visitor(TypeTag<double>());
  }
}

// The row (batch, head, row) of a view, whose dtype the caller knows to be T.
template <typename T>
inline T* row_of(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}

// Loads n <= kWidth values of any storage type into any compute type; the lanes beyond are 0.
template <typename C, typename T>
inline Vec<C> load_as_n(const T* p, int n) {
  if constexpr (sizeof(C) == sizeof(Compute<T>)) {
    return load_n(p, n);
  } else {
    C lanes[Vec<C>::kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_compute<C>(p[i]);
    return load(lanes);
  }
}
template <typename C, typename T>
inline Vec<C> load_as(const T* p) {
  if constexpr (sizeof(C) == sizeof(Compute<T>)) {
    return load(p);
  } else if constexpr (sizeof(C) == 8 && sizeof(T) == 4) {
    return to_double(p);
  } else {
    return load_as_n<C>(p, Vec<C>::kWidth);
  }
}

// A whole vector's n, for the compiler to see: the `_n` functions then are the plain ones.
template <typename C>
struct AllLanes {
  constexpr operator int() const { return Vec<C>::kWidth; }
};
template <typename T>
inline Vec<Compute<T>> load_n(const T* p, AllLanes<Compute<T>>) {
  return load(p);
}
template <typename C, typename T>
inline Vec<C> load_as_n(const T* p, AllLanes<C>) {
  return load_as<C>(p);
}
template <typename T>
inline void store_n(T* p, Vec<Compute<T>> a, AllLanes<Compute<T>>) {
  store(p, a);
}

// Calls body(offset, n) for each vector of a row of `length`; n is an int at the tail and AllLanes before it.
template <typename C, typename Body>
inline void for_each_vec(int64_t length, const Body& body) {
  constexpr int W = Vec<C>::kWidth;
  int64_t i = 0;
  for (; i + W <= length; i += W) body(i, AllLanes<C>());
  if (i < length) body(i, static_cast<int>(length - i));
}

}  // namespace fastattn::FASTATTN_ISA

#include "vec_math.h"
