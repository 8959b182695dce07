// Log masses from logits in bits: sums of 2^(logit - base) for a few heads at once. The base is a
// guess, 0 to begin with; only where a sum shows that it was no good is the largest logit looked up.
#pragma once

#include "vecmath.h"

namespace psa {

constexpr float LN_2 = 0.693147180559945309f;

// 2^x; at most 2^-125 for small x, at least 2^126 for large x; NaN stays NaN. Coefficients: least
// largest relative error on [0, 1], 8e-8.
inline F pow2(F x) {
#if PSA_WIDTH == 512
  const F r = (F)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = r * 1.87757667e-3f + 8.98934034e-3f;
  p = p * r + 5.58263176e-2f;
  p = p * r + 2.40153617e-1f;
  p = p * r + 6.93153073e-1f;
  p = p * r + 9.99999925e-1f;
  return (F)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return exp2(min(set1(126.0f), x));
#endif
}

// Whether 2^(logit - base) summed up to a number to be trusted: nothing that matters was lost below
// the least float, and nothing reached the largest one.
constexpr float LEAST_SUM = 0x1p-100f, MOST_SUM = 0x1p126f;
inline bool trusted(F4 sums) {
  const I4 good = (sums >= LEAST_SUM) & (sums < MOST_SUM);
  return (good[0] & good[1] & good[2] & good[3]) != 0;
}

}  // namespace psa
