// The three storage types of queries, keys and values, and their conversion to and from float.
#pragma once

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
inline F load(const bf16* p) {
  return (F)(__builtin_convertvector(loadu<H>(p), U) << 16);
}
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

inline void store1(float* p, float x) { *p = x; }
inline void store1(bf16* p, float x) { p->bits = to_bf16(x); }
inline void store1(fp16* p, float x) { p->bits = to_fp16(x); }

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
