// Dot products of unsigned codes below 16 with signed bytes in -127 .. 127: every 32-bit lane holds
// four codes of one token and meets the same four query elements.
#pragma once

#include "simd.h"

namespace psa {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "columns are read as 32-bit words");

#if PSA_WIDTH >= 256
using Codes = U;
constexpr int QUERY_WORDS = 1;  // 32-bit words that hold four query elements

// Four codes of every lane: plane `p` of packed bytes.
template <int BITS>
inline Codes plane(U packed, int p) {
  constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u;
  return (packed >> (uint32_t)(p * BITS)) & MASK;
}
inline void set_query(int32_t* words, const int8_t* four) { std::memcpy(words, four, 4); }
#else
// Elements 0 and 2, and 1 and 3, as shorts.
struct Codes {
  U even, odd;
};
constexpr int QUERY_WORDS = 2;

template <int BITS>
inline Codes plane(U packed, int p) {
  constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x00010001u;
  return {(packed >> (uint32_t)(p * BITS)) & MASK, (packed >> (uint32_t)(p * BITS + 8)) & MASK};
}
inline void set_query(int32_t* words, const int8_t* four) {
  for (int i = 0; i < 2; i++) {
    const int16_t pair[2] = {four[i], four[i + 2]};
    std::memcpy(words + i, pair, 4);
  }
}
#endif

// Sums of products. Not more than STEPS columns may be added between two calls of settle().
#if defined(__AVX512VNNI__)
template <int BITS>
struct ByteDot {
  static constexpr int CHAINS = 2;  // independent sums that hide the latency of an addition
  static constexpr int STEPS = 0;
  I total{};
  void add(Codes codes, const int32_t* query) {
    total = (I)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)set1i(*query));
  }
  void settle() {}
};
#elif PSA_WIDTH >= 256
template <int BITS>
struct ByteDot {
  static constexpr int CHAINS = 1;
  // A column adds 8 / BITS pairs of products to a short: 2 * 127 * (2^BITS - 1) each.
  static constexpr int STEPS = 32767 / (8 / BITS * 2 * 127 * ((1 << BITS) - 1));
  I total{};
  S part{};
  void add(Codes codes, const int32_t* query) {
#if PSA_WIDTH == 512
    part += (S)_mm512_maddubs_epi16((__m512i)codes, (__m512i)set1i(*query));
#else
    part += (S)_mm256_maddubs_epi16((__m256i)codes, (__m256i)set1i(*query));
#endif
  }
  void settle() {
    total += madd(part, (S)set1i(0x00010001));
    part = S{};
  }
};
#else
template <int BITS>
struct ByteDot {
  static constexpr int CHAINS = 1;
  static constexpr int STEPS = 0;
  I total{};
  void add(Codes codes, const int32_t* query) {
    total += madd((S)codes.even, (S)set1i(query[0]));
    total += madd((S)codes.odd, (S)set1i(query[1]));
  }
  void settle() {}
};
#endif

}  // namespace psa
