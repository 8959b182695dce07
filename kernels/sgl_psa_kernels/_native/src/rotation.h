// Walsh-Hadamard transform of a key in place, in the order of key_sketch/rotation.py: every sum and
// difference is rounded alike there and here.
#pragma once

#include "simd.h"

namespace psa {

// Step of the transform within each vector: element i meets element i ^ HALF.
template <int HALF>
inline F butterfly(F x) {
  F r;
  for (int i = 0; i < LANES; i++) r[i] = i & HALF ? x[i ^ HALF] - x[i] : x[i] + x[i ^ HALF];
  return r;
}

// Blocks of the largest power of two that divides dim (a multiple of 16).
inline void hadamard(float* x, int dim) {
  const int block = dim & -dim;
  for (int d = 0; d < dim; d += LANES) {
    F v = butterfly<2>(butterfly<1>(loadu<F>(x + d)));
    if constexpr (LANES > 4) v = butterfly<4>(v);
    if constexpr (LANES > 8) v = butterfly<8>(v);
    storeu(x + d, v);
  }
  for (int half = LANES; half < block; half *= 2)
    for (int begin = 0; begin < dim; begin += 2 * half)
      for (int d = begin; d < begin + half; d += LANES) {
        const F a = loadu<F>(x + d), b = loadu<F>(x + d + half);
        storeu(x + d, a + b);
        storeu(x + d + half, a - b);
      }
  const float norm = (float)(1 / std::sqrt((double)block));
  for (int d = 0; d < dim; d += LANES) storeu(x + d, loadu<F>(x + d) * norm);
}

}  // namespace psa
