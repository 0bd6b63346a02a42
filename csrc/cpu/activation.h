// The feed-forward's activations and their derivatives over vectors of float.
#pragma once

#include "feed_forward.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// The standard normal distribution: its integral up to x, and its density at x.
struct Normal {
  FloatVec cdf, density;
};

// The functions activations are made of, as exact as float32. BFloat16Math (feed_forward_bfloat16.h) is as exact as
// bfloat16 wants them.
struct FloatMath {
  // 1 / (1 + e^-x)
  static FloatVec sigmoid(FloatVec x) {
    const FloatVec one = FloatVec::set1(1.0f);
    return one / (one + exp(FloatVec::zero() - x));
  }
  static Normal normal(FloatVec x) {
    const FloatVec half = FloatVec::set1(0.5f);
    return {fma(erf(x * FloatVec::set1(0.70710678118654752f)), half, half),
            exp(x * x * FloatVec::set1(-0.5f)) * FloatVec::set1(0.39894228040143268f)};
  }
};

// Returns the activation and sets its derivative; relu's at 0 is 0, and 1 at NaN, as PyTorch's.
template <Activation A, typename Math = FloatMath>
inline FloatVec activate(FloatVec x, FloatVec* slope) {
  const FloatVec one = FloatVec::set1(1.0f);
  if constexpr (A == Activation::kRelu) {
    const FloatVec y = max(FloatVec::zero(), x);
    *slope = select(eq(y, FloatVec::zero()), FloatVec::zero(), one);
    return y;
  }
  if constexpr (A == Activation::kGelu) {
    const Normal normal = Math::normal(x);
    *slope = fma(x, normal.density, normal.cdf);
    return x * normal.cdf;
  }
  if constexpr (A == Activation::kGeluTanh) {
    // The sigmoid's argument, 2 sqrt(2 / pi) (x + 0.044715 x^3), over x.
    constexpr float kFirst = 1.5957691216057308f, kThird = 0.071354816272600303f;
    const FloatVec square = x * x;
    const FloatVec s = Math::sigmoid(x * fma(square, FloatVec::set1(kThird), FloatVec::set1(kFirst)));
    const FloatVec inner = fma(square, FloatVec::set1(3.0f * kThird), FloatVec::set1(kFirst));
    const FloatVec y = x * s;
    *slope = fma(y * (one - s), inner, s);
    return y;
  }
  if constexpr (A == Activation::kSilu) {
    const FloatVec s = Math::sigmoid(x);
    const FloatVec y = x * s;
    *slope = fma(y, one - s, s);
    return y;
  }
}
template <Activation A, typename Math = FloatMath>
inline FloatVec activate(FloatVec x) {
  FloatVec slope;  // nobody's: the compiler leaves out what it alone needs
  return activate<A, Math>(x, &slope);
}

// A vector of hidden units and its gradients: H = drop(act(B) * G), dB and dG, for dH before it is dropped.
struct HiddenGradients {
  FloatVec hidden, dbefore, dgate;
};
// `gate` counts where the call is gated, and `kept`, whose lowest bits say which units dropout spares, where it drops.
template <Activation A, typename Math = FloatMath>
inline HiddenGradients differentiate_hidden(FloatVec before, FloatVec dhidden, bool gated, FloatVec gate, bool drops,
                                            uint64_t kept, FloatVec rescale) {
  const FloatVec zero = FloatVec::zero();
  FloatVec slope;
  const FloatVec y = activate<A, Math>(before, &slope);
  HiddenGradients result{gated ? y * gate : y, dhidden, zero};
  if (drops) {
    const auto mask = mask_from_bits<float>(kept);
    result.hidden = select(mask, result.hidden * rescale, zero);
    result.dbefore = select(mask, dhidden * rescale, zero);
  }
  if (gated) {
    result.dgate = result.dbefore * y;
    result.dbefore = result.dbefore * gate;
  }
  result.dbefore = result.dbefore * slope;
  // A gradient of NaN does not pass where relu is flat.
  if constexpr (A == Activation::kRelu) result.dbefore = select(eq(slope, zero), zero, result.dbefore);
  return result;
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
