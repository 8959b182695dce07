// Storage of page summaries: bf16, or 8-bit codes with a bf16 scale and zero of each vector, as
// page_summary/storage.py defines them.
#pragma once

#include <algorithm>

#include "elem.h"

namespace psa {

// Makes up for the rounding of a few operations on floats.
constexpr float MARGIN = 1 + 0x1p-20f;
constexpr float TOP_CODE = 255;

inline float from_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// The smallest bf16 that is no less than x; x is not negative.
inline uint16_t to_bf16_up(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? to_bf16(x) : (u + 0xffff) >> 16;
}
// The largest bf16 that is no more than x.
inline uint16_t to_bf16_down(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? to_bf16(x) : (x < 0 ? u + 0xffff : u) >> 16;
}

// The vectors of one record, LANES elements at a time.
template <int VECTORS>
struct WordVectors {
  const bf16* words;
  int dim;
  WordVectors(const void* summary, const uint16_t*, int64_t record, int dim)
      : words(static_cast<const bf16*>(summary) + record * VECTORS * dim), dim(dim) {}
  static constexpr int64_t bytes(int dim) { return (int64_t)VECTORS * dim * 2; }
  const void* data() const { return words; }
  F at(int vector, int d) const { return load(words + vector * dim + d); }
};
template <int VECTORS>
struct ByteVectors {
  const uint8_t* codes;
  int dim;
  float scale[VECTORS], zero[VECTORS];
  ByteVectors(const void* summary, const uint16_t* affine, int64_t record, int dim)
      : codes(static_cast<const uint8_t*>(summary) + record * VECTORS * dim), dim(dim) {
    for (int v = 0; v < VECTORS; v++) {
      scale[v] = from_bf16(affine[(record * VECTORS + v) * 2]);
      zero[v] = from_bf16(affine[(record * VECTORS + v) * 2 + 1]);
    }
  }
  static constexpr int64_t bytes(int dim) { return (int64_t)VECTORS * dim; }
  const void* data() const { return codes; }
  F at(int vector, int d) const {
    const I code = (I)widen_bytes(codes + vector * dim + d);
    return __builtin_convertvector(code, F) * scale[vector] + zero[vector];
  }
};

inline void store_words(const float* x, int dim, uint16_t* words) {
  for (int d = 0; d < dim; d++) words[d] = to_bf16(x[d]);
}
// Box centre and half width, rounded outward, of the low and high ends.
inline void store_box_words(const float* low, const float* high, int dim, uint16_t* words) {
  for (int d = 0; d < dim; d++) {
    words[d] = to_bf16((low[d] + high[d]) * 0.5f);
    const float centre = from_bf16(words[d]);
    words[dim + d] = to_bf16_up(std::max(high[d] - centre, centre - low[d]) * MARGIN);
  }
}

// Codes of x and its (scale, zero); a vector with an element that is no finite number has scale NaN.
template <bool UP>
inline void store_bytes(const float* x, int dim, uint8_t* codes, uint16_t* affine) {
  F low = loadu<F>(x), high = low, finite{};
  for (int d = 0; d < dim; d += LANES) {
    const F v = loadu<F>(x + d);
    low = min(low, v);
    high = max(high, v);
    finite += v - v;  // 0, or NaN
  }
  affine[1] = to_bf16_down(-hmax(-low));
  const float zero = from_bf16(affine[1]);
  const float span = hmax(high) + hsum(finite) - zero;
  affine[0] = to_bf16_up(std::max(span / TOP_CODE * MARGIN, 0x1p-126f));
  if ((affine[0] & 0x7f80) == 0x7f80) affine[0] = 0x7fc0;
  const float scale = from_bf16(affine[0]);
  for (int d = 0; d < dim; d += LANES) {
    F position = (loadu<F>(x + d) - zero) / scale;
    position = position > 0.0f ? position : F{};  // NaN becomes 0
    position = min(position, set1(TOP_CODE));
    I code = __builtin_convertvector(UP ? position : round_small(position), I);
    if (UP) code -= (I)(__builtin_convertvector(code, F) < position);
    for (int i = 0; i < LANES; i++) codes[d + i] = (uint8_t)code[i];
  }
}
// As store_box_words; `high` is overwritten.
inline void store_box_bytes(const float* low, float* high, int dim, float* centre, uint8_t* codes,
                            uint16_t* affine) {
  for (int d = 0; d < dim; d += LANES)
    storeu(centre + d, (loadu<F>(low + d) + loadu<F>(high + d)) * 0.5f);
  store_bytes<false>(centre, dim, codes, affine);
  const ByteVectors<1> stored(codes, affine, 0, dim);
  for (int d = 0; d < dim; d += LANES) {
    const F middle = stored.at(0, d);
    storeu(high + d, max(loadu<F>(high + d) - middle, middle - loadu<F>(low + d)) * MARGIN);
  }
  store_bytes<true>(high, dim, codes + dim, affine + 2);
}

}  // namespace psa
