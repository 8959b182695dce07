// Vectors of LANES floats or 32-bit integers on top of GCC's vector extension. Arithmetic,
// comparison and ?: work lane by lane; only what the extension lacks is written per ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace psa {

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int LANES = 16;
constexpr int HEAD_BLOCK = 4;  // query heads that share one pass over K or V (register budget)
#define PSA_WIDTH 512
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define PSA_ISA "avx512bf16"
#elif defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define PSA_ISA "avx512vbmi"
#elif defined(__AVX512VNNI__)
#define PSA_ISA "avx512vnni"
#else
#define PSA_ISA "avx512"
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int LANES = 8;
constexpr int HEAD_BLOCK = 2;
#define PSA_WIDTH 256
#define PSA_ISA "avx2"
#else
constexpr int LANES = 4;
constexpr int HEAD_BLOCK = 2;
#define PSA_WIDTH 128
#define PSA_ISA "portable"
#endif

typedef float F __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));
typedef uint16_t H __attribute__((vector_size(LANES * 2)));  // LANES halves
typedef int16_t S __attribute__((vector_size(LANES * 4)));   // 2 * LANES shorts
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

constexpr float INF = __builtin_inff();

template <class V>
inline V loadu(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void storeu(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
inline F set1(float x) { return x - F{}; }
inline I set1i(int32_t x) { return x - I{}; }
inline I iota() {
  I v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}
// b if either is NaN
#if PSA_WIDTH == 512
inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
#elif PSA_WIDTH == 256
inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
inline F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
#endif
// Bit i: lane i of a comparison's result is true.
inline uint32_t mask_of(I lanes) {
#if PSA_WIDTH == 512
  return _mm512_movepi32_mask((__m512i)lanes);
#elif PSA_WIDTH == 256
  return _mm256_movemask_ps((__m256)lanes);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)lanes);
#else
  uint32_t mask = 0;
  for (int i = 0; i < LANES; i++) mask |= (uint32_t)(lanes[i] != 0) << i;
  return mask;
#endif
}
inline bool any(I lanes) { return mask_of(lanes) != 0; }
// lanes in -128..127
inline void store_bytes(int8_t* p, I x) {
#if PSA_WIDTH == 512
  storeu(p, _mm512_cvtepi32_epi8((__m512i)x));
#elif PSA_WIDTH == 256
  const __m128i low = _mm256_castsi256_si128((__m256i)x);
  const __m128i shorts = _mm_packs_epi32(low, _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
#elif defined(__SSE2__)
  const __m128i shorts = _mm_packs_epi32((__m128i)x, (__m128i)x);
  storeu(p, _mm_cvtsi128_si32(_mm_packs_epi16(shorts, shorts)));
#else
  for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i];
#endif
}
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }
// to nearest, ties to even; |x| < 2^22
inline F round_small(F x) { return (x + 12582912.0f) - 12582912.0f; }

template <class Fn, int... INDEX>
__attribute__((always_inline)) inline void unrolled(Fn f, std::integer_sequence<int, INDEX...>) {
  (f(std::integral_constant<int, INDEX>{}), ...);
}
// f(0), ..., f(N - 1) with constant arguments: arrays so indexed can live in registers.
template <int N, class Fn>
__attribute__((always_inline)) inline void unrolled(Fn f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

// The empty statement has no use but to count as an effect: GCC drops calls of functions that do
// nothing else than prefetch.
inline void prefetch_l2(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

inline void prefetch_l1(const void* p) {
  __builtin_prefetch(p, 0, 3);
  asm volatile("");
}

// bytes at p to L2, or NEAR to L1, one request per cache line
template <bool NEAR = false>
inline void prefetch_range(const void* p, int64_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) NEAR ? prefetch_l1(c + i) : prefetch_l2(c + i);
}

#if PSA_WIDTH == 512
inline F4 fold(__m512 x) {
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return (F4)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
inline I4 fold(__m512i x) {
  __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  return (I4)_mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
// sums of the lanes of four vectors, quarter by quarter
inline __m512 hsum4_lanes(F a, F b, F c, F d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                            _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                            _mm512_unpackhi_ps((__m512)c, (__m512)d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
// sums of the lanes of four vectors
inline F4 hsum4(F a, F b, F c, F d) { return fold(hsum4_lanes(a, b, c, d)); }
inline I4 hsum4(I a, I b, I c, I d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b),
                                _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)c, (__m512i)d),
                                _mm512_unpackhi_epi32((__m512i)c, (__m512i)d));
  return fold(_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
}
// maxima of the lanes of four vectors
inline F4 hmax4(F a, F b, F c, F d) {
  __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                            _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                            _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512 x = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return (F4)_mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
inline F half_to_float(H h) { return (F)_mm512_cvtph_ps((__m256i)h); }
inline U widen(H h) { return (U)_mm512_cvtepu16_epi32((__m256i)h); }
inline U widen_bytes(const uint8_t* p) { return (U)_mm512_cvtepu8_epi32(loadu<__m128i>(p)); }
// a[2i] * b[2i] + a[2i+1] * b[2i+1]
inline I madd(S a, S b) { return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif PSA_WIDTH == 256
inline F4 fold(__m256 x) {
  return (F4)_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
inline I4 fold(__m256i x) {
  return (I4)_mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline F4 hsum4(F a, F b, F c, F d) {
  return fold(_mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b),
                             _mm256_hadd_ps((__m256)c, (__m256)d)));
}
inline I4 hsum4(I a, I b, I c, I d) {
  return fold(_mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)a, (__m256i)b),
                                _mm256_hadd_epi32((__m256i)c, (__m256i)d)));
}
inline F4 hmax4(F a, F b, F c, F d) {
  __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b),
                            _mm256_unpackhi_ps((__m256)a, (__m256)b));
  __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d),
                            _mm256_unpackhi_ps((__m256)c, (__m256)d));
  __m256 x = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return (F4)_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
inline F half_to_float(H h) { return (F)_mm256_cvtph_ps((__m128i)h); }
inline U widen(H h) { return (U)_mm256_cvtepu16_epi32((__m128i)h); }
inline U widen_bytes(const uint8_t* p) {
  return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline I madd(S a, S b) { return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
#if defined(__SSE2__)
inline F4 hsum4(F a, F b, F c, F d) {
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps((__m128)a, (__m128)b),
                         _mm_unpackhi_ps((__m128)a, (__m128)b));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps((__m128)c, (__m128)d),
                         _mm_unpackhi_ps((__m128)c, (__m128)d));
  return (F4)_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
inline I madd(S a, S b) { return (I)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline F4 hsum4(F a, F b, F c, F d) {
  return F4{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
            (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
}
inline I madd(S a, S b) {
  I r;
  for (int i = 0; i < LANES; i++) r[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return r;
}
#endif
inline I4 hsum4(I a, I b, I c, I d) {
  return I4{a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3],
            d[0] + d[1] + d[2] + d[3]};
}
inline U widen(H h) { return __builtin_convertvector(h, U); }
inline U widen_bytes(const uint8_t* p) { return U{p[0], p[1], p[2], p[3]}; }
// IEEE half by exponent shift: the multiplication makes subnormals right, the test inf and NaN
inline F half_to_float(H h) {
  U u = __builtin_convertvector(h, U);
  U sign = (u & 0x8000u) << 16;
  F f = (F)((u & 0x7fffu) << 13) * 0x1p112f;
  I bits = (I)f | ((f >= 65536.0f) & 0x7f800000);
  return (F)(bits | (I)sign);
}
#endif

#if PSA_WIDTH == 128
inline F4 hmax4(F a, F b, F c, F d) {
  F4 r;
  for (int i = 0; i < 4; i++) {
    const F& x = i == 0 ? a : i == 1 ? b : i == 2 ? c : d;
    r[i] = std::fmax(std::fmax(x[0], x[1]), std::fmax(x[2], x[3]));
  }
  return r;
}
#endif
// sums[g]: those of the lanes of x[g][0 .. 4)
template <int N>
inline void hsum4(const F (&x)[N][4], F4 (&sums)[N]) {
#if PSA_WIDTH == 512
  if constexpr (N == 4) {
    // The last steps of four at once.
    __m512 four[4];
    for (int g = 0; g < 4; g++) four[g] = hsum4_lanes(x[g][0], x[g][1], x[g][2], x[g][3]);
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44),
                                     _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44),
                                      _mm512_shuffle_f32x4(four[2], four[3], 0xee));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                                     _mm512_shuffle_f32x4(low, high, 0xdd));
    std::memcpy(sums, &all, sizeof(all));
    return;
  }
#endif
  for (int g = 0; g < N; g++) sums[g] = hsum4(x[g][0], x[g][1], x[g][2], x[g][3]);
}
// to[g][i] = from[i * stride][g] for g < rows and i < LANES
inline void store_columns(const F4* from, int64_t stride, float* const (&to)[4], int rows) {
#if PSA_WIDTH == 512
  __m512 x[4];  // quarter b of x[j]: from[(4 * b + j) * stride]
  for (int j = 0; j < 4; j++) {
    const auto quarter = [&](int b) { return (__m128)from[(4 * b + j) * stride]; };
    x[j] = _mm512_castps128_ps512(quarter(0));
    x[j] = _mm512_insertf32x4(x[j], quarter(1), 1);
    x[j] = _mm512_insertf32x4(x[j], quarter(2), 2);
    x[j] = _mm512_insertf32x4(x[j], quarter(3), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  const __m512d column[4] = {_mm512_unpacklo_pd(a, c), _mm512_unpackhi_pd(a, c),
                             _mm512_unpacklo_pd(b, d), _mm512_unpackhi_pd(b, d)};
  for (int g = 0; g < rows; g++) storeu(to[g], column[g]);
#else
  for (int g = 0; g < rows; g++)
    for (int i = 0; i < LANES; i++) to[g][i] = from[i * stride][g];
#endif
}
inline float hmax(F a) { return hmax4(a, a, a, a)[0]; }
inline float hsum(F a) { return hsum4(a, a, a, a)[0]; }

}  // namespace psa
