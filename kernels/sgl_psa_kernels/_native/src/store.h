// Vector stores with rounding to the storage type, and vectors shorter than LANES at a row's end.
#pragma once

#include "elem.h"

namespace psa {

inline H to_bf16(F x) {
  const U u = (U)x;
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((U)(x == x ? (I)rounded : (I)((u >> 16) | 0x40u)), H);
}
inline H to_fp16(F x) {
#if PSA_WIDTH == 512
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif PSA_WIDTH == 256
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  H h;
  for (int i = 0; i < LANES; i++) h[i] = to_fp16(x[i]);
  return h;
#endif
}

inline void store(float* p, F x) { storeu(p, x); }
inline void store(bf16* p, F x) { storeu(p, to_bf16(x)); }
inline void store(fp16* p, F x) { storeu(p, to_fp16(x)); }

// x as it would read after a store to T.
template <class T>
inline F rounded(F x) {
  if constexpr (std::is_same_v<T, bf16>) return (F)(widen(to_bf16(x)) << 16);
  if constexpr (std::is_same_v<T, fp16>) return half_to_float(to_fp16(x));
  return x;
}

// The first n < LANES elements; the other lanes are 0.
template <class T>
inline F load_part(const T* p, int64_t n) {
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_part(T* p, F x, int64_t n) {
  T part[LANES];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

// f(i, load, store) for each LANES elements of 0 .. n - 1 from element i on, the last ones in part.
template <class Fn>
__attribute__((always_inline)) inline void each_vector(int64_t n, Fn f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    f(i, [](const auto* p) { return load(p); }, [](auto* p, F x) { store(p, x); });
  if (const int64_t rest = n - i; rest > 0)
    f(i, [rest](const auto* p) { return load_part(p, rest); },
      [rest](auto* p, F x) { store_part(p, x, rest); });
}

}  // namespace psa
