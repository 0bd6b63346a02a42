// exp, exp2, tanh and erf over Vec<T>. Included by vec.h alone.
#pragma once

namespace fastattn::FASTATTN_ISA {

// Polynomials through Chebyshev nodes: relative error 2e-9 (float) and 2e-17 (double), far below half an ulp.
//   2^r = 1 + r * (kExp2[0] + kExp2[1] r + ...)      |r| <= 1/2
//   e^r = 1 + r + r^2 * (kExp[0] + kExp[1] r + ...)  |r| <= ln(2) / 2
template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kExp2[] = {0x1.62e4302fc626ep-1f, 0x1.ebfbe00e63baep-3f,  0x1.c6af6cdbbdcc7p-5f,
                                    0x1.3b2a53045179ap-7f, 0x1.5f0890162a90ap-10f, 0x1.4413896e1ad27p-13f};
  static constexpr float kExp[] = {0x1p-1f, 0x1.5554dd04e58bep-3f, 0x1.55551933893e6p-5f, 0x1.120b616c43f75p-7f,
                                   0x1.6d10fc65baf1cp-10f};
  static constexpr float kLn2High = 0x1.62e400p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // the high part has 12 spare bits
  static constexpr float kLowest = -110.0f, kHighest = 90.0f;                   // e^x is 0 and Inf beyond
  static constexpr float kExponentMin = -126.0f, kExponentMax = 128.0f;
};

template <>
struct ExpConstants<double> {
  static constexpr double kExp2[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c6p-5,
                                     0x1.3b2ab6fba4e79p-7,  0x1.5d87fe78a3f9cp-10, 0x1.430912f86b7dbp-13,
                                     0x1.ffcbfc6da6ed1p-17, 0x1.62c02242b879cp-20, 0x1.b524ebd13a55fp-24,
                                     0x1.e4cf10dec0f59p-28, 0x1.e9ec1fcb69a7fp-32, 0x1.c4a29324a1038p-36};
  static constexpr double kExp[] = {0x1p-1,
                                    0x1.5555555555557p-3,
                                    0x1.5555555555556p-5,
                                    0x1.11111111100dfp-7,
                                    0x1.6c16c16c162d6p-10,
                                    0x1.a01a01abe62ddp-13,
                                    0x1.a01a01a6d7808p-16,
                                    0x1.71de02375656cp-19,
                                    0x1.27e4db67b4303p-22,
                                    0x1.af4ddd84882fep-26,
                                    0x1.1f72fc730b4ffp-29};
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLowest = -760.0, kHighest = 720.0;
  static constexpr double kExponentMin = -1022.0, kExponentMax = 1024.0;
};

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// c[0] + c[1] x + ... + c[N-1] x^(N-1), by Horner's rule.
template <typename T, size_t N>
inline Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> y = Vec<T>::set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = static_cast<int>(N) - 2; i >= 0; --i) y = fma(y, x, Vec<T>::set1(c[i]));
  return y;
}

#if !defined(FASTATTN_ISA_AVX512)
// a * 2^n for integral n; two steps, so that neither power of two leaves the exponent's range.
template <typename T>
inline Vec<T> ldexp(Vec<T> a, Vec<T> n) {
  const Vec<T> half = round(n * Vec<T>::set1(T(0.5)));
  return a * pow2(half) * pow2(n - half);
}
#endif

// 2^x within 1 ulp, the softmax's inner loop: 2^-inf = 0, NaN stays NaN. Results below the smallest normal number are
// flushed to 0 where that is cheaper.
template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> one = Vec<T>::set1(T(1));
#if defined(FASTATTN_ISA_AVX512)
  // The remainder of an infinity is 0 and scalef takes infinite powers: no clamp.
  const Vec<T> r = round_remainder(x);
  return ldexp(fma(polynomial(r, C::kExp2), r, one), x - r);
#else
  const Vec<T> lowest = Vec<T>::set1(C::kExponentMin);
  const Vec<T> clamped = max(lowest, min(Vec<T>::set1(C::kExponentMax), x));
  const Vec<T> n = round(clamped);
  const Vec<T> r = clamped - n;
  const Vec<T> y = fma(polynomial(r, C::kExp2), r, one) * pow2(n);
  return select(lt(x, lowest), Vec<T>::zero(), y);
#endif
}

// 2^(x - n) within 1 ulp for integral n: x - n itself would be rounded. 0 for x = -inf, NaN stays NaN.
template <typename T>
inline Vec<T> exp2_less(Vec<T> x, Vec<T> n) {
  using C = ExpConstants<T>;
  const Vec<T> one = Vec<T>::set1(T(1));
#if defined(FASTATTN_ISA_AVX512)
  const Vec<T> r = round_remainder(x);
  return ldexp(fma(polynomial(r, C::kExp2), r, one), (x - r) - n);
#else
  const Vec<T> lowest = Vec<T>::set1(C::kExponentMin), whole = round(x), power = whole - n, r = x - whole;
  const Vec<T> scale = pow2(max(lowest, min(Vec<T>::set1(C::kExponentMax), power)));
  return select(lt(power, lowest), Vec<T>::zero(), fma(polynomial(r, C::kExp2), r, one) * scale);
#endif
}

// e^x within 1 ulp, subnormal results included; e^-inf = 0, e^inf = inf, NaN stays NaN.
template <typename T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> clamped = max(Vec<T>::set1(C::kLowest), min(Vec<T>::set1(C::kHighest), x));
  const Vec<T> n = round(clamped * Vec<T>::set1(static_cast<T>(kLog2E)));
  Vec<T> r = fnma(n, Vec<T>::set1(C::kLn2High), clamped);
  r = fnma(n, Vec<T>::set1(C::kLn2Low), r);
  const Vec<T> y = fma(r * r, polynomial(r, C::kExp), r) + Vec<T>::set1(T(1));
  return ldexp(y, n);
}

// tanh(x) = x + x^3 (kTanh[0] + kTanh[1] x^2 + ...) for |x| <= 5/8, relative error 2e-9 and 4e-18.
template <typename T>
struct TanhConstants;
template <>
struct TanhConstants<float> {
  static constexpr float kTanh[] = {-0x1.55555539a3fddp-2f, 0x1.1110e919f7ad3p-3f,  -0x1.ba08c4e66a3c8p-5f,
                                    0x1.64a9766b3a952p-6f,  -0x1.116a168e18e77p-7f, 0x1.2c83c001d2709p-9f};
};
template <>
struct TanhConstants<double> {
  static constexpr double kTanh[] = {-0x1.5555555555555p-2,  0x1.11111111110a8p-3,   -0x1.ba1ba1ba0f126p-5,
                                     0x1.664f487e0a749p-6,   -0x1.226e3473dce5cp-7,  0x1.d6d39ae3905e2p-9,
                                     -0x1.7d9f6f23e8682p-10, 0x1.3526e9ed54da1p-11,  -0x1.f243823c8c981p-13,
                                     0x1.8445870f6fe41p-14,  -0x1.05bbdae896297p-15, 0x1.b33642a122cddp-18};
};

// tanh(x) within 2 ulp.
template <typename T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> one = Vec<T>::set1(T(1)), two = Vec<T>::set1(T(2));
  const Vec<T> a = abs(x);
  const Vec<T> square = x * x;
  const Vec<T> near_zero = fma(x * square, polynomial(square, TanhConstants<T>::kTanh), x);
  const Vec<T> far = copysign(one - two / (exp(a + a) + one), x);
  return select(lt(a, Vec<T>::set1(T(0.625))), near_zero, far);
}

// erf(x) within 2 ulp: a polynomial near 0, 1 - e^-g(|x|) with a polynomial g = -log(erfc) from 0.9 to 4, where erf
// rounds to 1.
inline FloatVec erf(FloatVec x) {
  constexpr float kNear[] = {0x1.06eba812c6776p-3f,  -0x1.81274369e03dfp-2f, 0x1.ce2e29ce936d4p-4f,
                             -0x1.b8114722bbf09p-6f, 0x1.54e1f4d0486bcp-8f,  -0x1.ab244590dc9b9p-11f,
                             0x1.5fc786fee87b3p-14f};
  constexpr float kFar[] = {-0x1.4e0356ebae8f4p-12f, 0x1.2156d28b1b6edp+0f,  0x1.437e6cb2308c2p-1f,
                            0x1.c2eac2bceb716p-4f,   -0x1.b0fd8b523cdf5p-6f, 0x1.381f9a319829cp-8f,
                            -0x1.394e9ab7b164fp-11f, 0x1.834021abb515fp-15f, -0x1.b90e798383a72p-20f};
  const FloatVec a = abs(x);
  const FloatVec near_zero = fma(x, polynomial(x * x, kNear), x);
  const FloatVec g = polynomial(min(FloatVec::set1(4.0f), a), kFar);
  const FloatVec far = copysign(FloatVec::set1(1.0f) - exp(FloatVec::zero() - g), x);
  return select(lt(a, FloatVec::set1(0.92f)), near_zero, far);
}

}  // namespace fastattn::FASTATTN_ISA
