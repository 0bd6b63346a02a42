// The feed-forward's activations and their derivatives over vectors of float.
#pragma once

#include "feed_forward.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// 1 / (1 + e^-x)
inline FloatVec sigmoid(FloatVec x) {
  const FloatVec one = FloatVec::set1(1.0f);
  return one / (one + exp(FloatVec::zero() - x));
}

// The standard normal distribution: its integral up to x, and its density at x.
inline FloatVec normal_cdf(FloatVec x) {
  const FloatVec half = FloatVec::set1(0.5f);
  return fma(erf(x * FloatVec::set1(0.70710678118654752f)), half, half);
}
inline FloatVec normal_density(FloatVec x) {
  return exp(x * x * FloatVec::set1(-0.5f)) * FloatVec::set1(0.39894228040143268f);
}

// The argument of gelu_tanh's sigmoid, 2 sqrt(2 / pi) (x + 0.044715 x^3), over x.
constexpr float kGeluTanh1 = 1.5957691216057308f, kGeluTanh3 = 0.071354816272600303f;

template <Activation A>
inline FloatVec activate(FloatVec x) {
  if constexpr (A == Activation::kRelu) return max(FloatVec::zero(), x);
  if constexpr (A == Activation::kGelu) return x * normal_cdf(x);
  if constexpr (A == Activation::kGeluTanh) {
    return x * sigmoid(x * fma(x * x, FloatVec::set1(kGeluTanh3), FloatVec::set1(kGeluTanh1)));
  }
  if constexpr (A == Activation::kSilu) return x * sigmoid(x);
}

// Returns the activation and sets its derivative; relu's at 0 is 0, and 1 at NaN, as PyTorch's.
template <Activation A>
inline FloatVec activate(FloatVec x, FloatVec* slope) {
  const FloatVec one = FloatVec::set1(1.0f);
  if constexpr (A == Activation::kRelu) {
    const FloatVec y = max(FloatVec::zero(), x);
    *slope = select(eq(y, FloatVec::zero()), FloatVec::zero(), one);
    return y;
  }
  if constexpr (A == Activation::kGelu) {
    const FloatVec cdf = normal_cdf(x);
    *slope = fma(x, normal_density(x), cdf);
    return x * cdf;
  }
  if constexpr (A == Activation::kGeluTanh) {
    const FloatVec square = x * x;
    const FloatVec s = sigmoid(x * fma(square, FloatVec::set1(kGeluTanh3), FloatVec::set1(kGeluTanh1)));
    const FloatVec inner = fma(square, FloatVec::set1(3.0f * kGeluTanh3), FloatVec::set1(kGeluTanh1));
    const FloatVec y = x * s;
    *slope = fma(y * (one - s), inner, s);
    return y;
  }
  if constexpr (A == Activation::kSilu) {
    const FloatVec s = sigmoid(x);
    const FloatVec y = x * s;
    *slope = fma(y, one - s, s);
    return y;
  }
}

// Elements [i, i + n) of a bias of type T; 0 where there is none.
template <typename T, typename Count>
inline FloatVec bias_at(const void* bias, int64_t i, Count n) {
  return bias == nullptr ? FloatVec::zero() : load_as_n<float>(static_cast<const T*>(bias) + i, n);
}

// Calls visitor(ActivationTag<A>()) for an activation known at run time.
template <Activation A>
struct ActivationTag {
  static constexpr Activation kValue = A;
};
template <typename Visitor>
inline void visit_activation(Activation activation, const Visitor& visitor) {
  switch (activation) {
    case Activation::kRelu:
      return visitor(ActivationTag<Activation::kRelu>());
    case Activation::kGelu:
      return visitor(ActivationTag<Activation::kGelu>());
    case Activation::kGeluTanh:
      return visitor(ActivationTag<Activation::kGeluTanh>());
    case Activation::kSilu:
      return visitor(ActivationTag<Activation::kSilu>());
  }
}

}  // namespace fastattn::FASTATTN_ISA
