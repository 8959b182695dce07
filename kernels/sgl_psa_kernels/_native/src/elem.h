// The three storage types of queries, keys and values, and their conversion to and from float.
#pragma once

#include <type_traits>

#include "psa_abi.h"
#include "simd.h"

namespace psa {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline F load(const float* p) { return loadu<F>(p); }
inline F load(const bf16* p) { return (F)(widen(loadu<H>(p)) << 16); }
inline F load(const fp16* p) { return half_to_float(loadu<H>(p)); }

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return (u >> 16) | 0x40;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline uint16_t to_fp16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;   // NaN
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or above: inf
  if (u < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    float a;
    std::memcpy(&a, &u, 4);
    return sign | (uint16_t)std::nearbyint(a * 0x1p24f);
  }
  return sign | (uint16_t)((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}
inline float from_fp16(uint16_t h) {
  H v{};
  v[0] = h;
  return half_to_float(v)[0];
}

// A pair is 2 * LANES elements as two vectors, in an order of the type's choice that load_pair and
// store_pair share: bf16 takes the even and the odd elements, which needs no shuffles.
struct Pair {
  F first, second;
};
inline Pair load_pair(const float* p) { return {load(p), load(p + LANES)}; }
inline Pair load_pair(const fp16* p) { return {load(p), load(p + LANES)}; }
inline Pair load_pair(const bf16* p) {
  const U both = loadu<U>(p);
  return {(F)(both << 16), (F)(both & 0xffff0000u)};
}

inline void store1(float* p, float x) { *p = x; }
inline void store1(bf16* p, float x) { p->bits = to_bf16(x); }
inline void store1(fp16* p, float x) { p->bits = to_fp16(x); }

inline void store_pair(float* p, Pair x) {
  storeu(p, x.first);
  storeu(p + LANES, x.second);
}
template <class T>
inline void store_pair(T* p, Pair x) {
  constexpr bool even_odd = std::is_same_v<T, bf16>;
  for (int i = 0; i < LANES; i++) {
    store1(p + (even_odd ? 2 * i : i), x.first[i]);
    store1(p + (even_odd ? 2 * i + 1 : LANES + i), x.second[i]);
  }
}

// Calls f with a null pointer of the element type; false for an unknown dtype.
template <class Fn>
inline bool with_dtype(int dtype, Fn f) {
  switch (dtype) {
    case PSA_BF16: f((bf16*)nullptr); return true;
    case PSA_FP16: f((fp16*)nullptr); return true;
    case PSA_FP32: f((float*)nullptr); return true;
  }
  return false;
}

}  // namespace psa
