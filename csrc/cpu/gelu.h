// GELU, exact and by tanh, and its derivative.
#pragma once

#include <cmath>

#include "matrix.h"

namespace modafill {
namespace {

template <class C>
struct Gelu {
  Vector<C> value, slope;
};

// By the Gaussian tail(|x|) = erfcx(|x| / sqrt 2) exp(-x^2 / 2) / 2, exact to a few units in the last place on both
// sides; erfcx is a polynomial in 1 / (1 + 0.4 z) (fitted minimax, relative error 3e-8).
MODAFILL_INLINE Gelu<float> gelu_exact(Vector<float> x) {
  constexpr float kErfcx[] = {2.6405141e-5f, 0.22508258f, 0.23135515f,   0.17741635f,   0.26863757f,
                              -0.068566583f, 0.27578783f, -0.063685805f, -0.074749276f, 0.028695822f};
  const Vector<float> size = x < 0.0f ? -x : x;
  const Vector<float> t = 1.0f / (1.0f + size * 0.282842712f);
  Vector<float> p = Vector<float>{} + kErfcx[9];
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i)
    p = p * t + kErfcx[i];
  const Vector<float> density = exponential(size * size * -0.5f);
  const Vector<float> tail = 0.5f * p * density;
  const Vector<float> below = x < 0.0f ? tail : 1.0f - tail; // x - x * tail would be NaN at infinity
  return {x * below, below + x * density * 0.39894228f};
}

MODAFILL_INLINE Gelu<double> gelu_exact(Vector<double> x) {
  Vector<double> below = x;
  for (int lane = 0; lane < kWidth<double>; ++lane)
    below[lane] = 0.5 * std::erfc(-x[lane] * 0.70710678118654752);
  return {x * below, below + x * exponential(x * x * -0.5) * 0.39894228040143268};
}

// x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class C>
MODAFILL_INLINE Gelu<C> gelu_tanh(Vector<C> x) {
  const Vector<C> u = x * (C(1.5957691216057308) + C(0.071354816272600247) * x * x);
  const Vector<C> size = u < C(0) ? -u : u;
  const Vector<C> e = exponential(-size); // at most 1
  const Vector<C> share = (u < C(0) ? e : Vector<C>{} + C(1)) / (C(1) + e);
  const Vector<C> rest = (u < C(0) ? Vector<C>{} + C(1) : e) / (C(1) + e);
  const Vector<C> change = x * share * rest * (C(1.5957691216057308) + C(0.21406444881780074) * x * x);
  return {x * share, share + (e > C(0) ? change : Vector<C>{})}; // far out, 0 times infinity
}

template <class C>
MODAFILL_INLINE Gelu<C> gelu(Vector<C> x, bool tanh) {
  return tanh ? gelu_tanh<C>(x) : gelu_exact(x);
}

} // namespace
} // namespace modafill
