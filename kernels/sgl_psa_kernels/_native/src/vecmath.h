// exp and log on vectors. Coefficients unless stated otherwise: Cephes expf / logf (S. Moshier);
// relative error about 2e-7.
#pragma once

#include "simd.h"

namespace psa {

// x <= 88; below -87.3 the result is exactly 0; NaN stays NaN.
inline F exp(F x) {
  constexpr float LOW = -87.3f;
  F y = x < set1(LOW) ? set1(LOW) : x;
  F shifted = y * 1.44269504088896341f + 12582912.0f;  // integer part in the low mantissa bits
  F n = shifted - 12582912.0f;
  F r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I exponent = ((I)shifted - 0x4b400000 + 127) << 23;
  F e = p * (F)exponent;
  return x < set1(LOW) ? F{} : e;
}

// 2^x for x <= 0; below -125 the result is 2^-125; NaN stays NaN. Coefficients: least largest
// relative error on [-1/2, 1/2], 1e-7.
inline F exp2(F x) {
  const F y = max(set1(-125.0f), x);
  const F shifted = y + 12582912.0f;  // integer part in the low mantissa bits
  const F r = y - (shifted - 12582912.0f);
  F p = r * 1.3264727214e-3f + 9.6715128125e-3f;
  p = p * r + 5.5507337448e-2f;
  p = p * r + 2.4022242083e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
  return p * (F)(((I)shifted - 0x4b400000 + 127) << 23);
}

// x positive and normal; NaN stays NaN.
inline F log(F x) {
  I bits = (I)x;
  I exponent = (bits >> 23) - 126;
  F m = (F)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  I small = m < 0.70710678f;
  F e = __builtin_convertvector(exponent + small, F);  // small is -1 where true
  m = m + (F)((I)m & small) - 1.0f;
  F z = m * m;
  F p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  F r = p * m * z + e * -2.12194440e-4f - 0.5f * z;
  r = m + r + e * 0.693359375f;
  return x == x ? r : x;
}

inline float exp1(float x) { return exp(set1(x))[0]; }

// log(exp(a) + exp(b)), exact for -inf
inline float log_add_exp(float a, float b) {
  float m = a > b ? a : b;
  if (!(m > -INF)) return m;
  return m + std::log(std::exp(a - m) + std::exp(b - m));
}

}  // namespace psa
