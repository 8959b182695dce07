// Products of codes with queries as tables: four bits of a key, which are four codes of one bit or
// two of two, have 16 possible products with a query; a byte shuffle looks up those of 64 nibbles at
// once, as the fast scan of product quantisation does (arXiv 1704.07355). One rounding serves several
// elements, so entries of a byte lose no more than query elements of a byte do. Needs AVX512-VBMI.
#pragma once

#include "sketch_query.h"

namespace psa {

constexpr int NIBBLE_VALUES = 16, TABLE_BYTES = 4 * NIBBLE_VALUES;

#if PSA_WIDTH == 512 && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr bool HAS_NIBBLE_KERNELS = true;

// Tables [columns][2][4][16]: the low and the high nibbles of a column, each of its four bytes.
inline size_t nibble_query_size(const SketchLayout& layout) {
  return (size_t)layout.columns * 2 * TABLE_BYTES;
}

// An entry is (product - least product of its table) / step as an unsigned byte; the least products
// of all tables are in the offset.
template <int BITS>
void set_nibble_query(SketchQuery& q, const float* x, QueryRange range,
                      const SketchLayout& layout) {
  constexpr int PLANES = 4 / BITS;  // codes in a nibble
  constexpr float TOP = (1 << BITS) - 1;
  const int width = layout.width;
  float widest = 0, least = 0;
  for (int half = 0; half < 2; half++)
    for (int j = 0; j < width; j++) {
      float reach = 0;
      for (int p = 0; p < PLANES; p++) {
        const float e = TOP * x[(half * PLANES + p) * width + j];
        reach += std::fabs(e);
        least += std::min(e, 0.0f);
      }
      widest = std::max(widest, reach);
    }
  const bool none = range.tiny || !range.finite;
  const float inverse = none ? 0.0f : 255.0f / widest;
  q.step = none ? 0.0f : widest / 255.0f;
  q.offset = least;
  F value[PLANES];  // of a nibble's codes
  for (int p = 0; p < PLANES; p++)
    value[p] = __builtin_convertvector((iota() >> (BITS * p)) & ((1 << BITS) - 1), F);
  uint8_t* table = static_cast<uint8_t*>(q.data);
  for (int j = 0; j < width; j++)
    for (int half = 0; half < 2; half++) {
      F entry{};
      float lowest = 0;
      for (int p = 0; p < PLANES; p++) {
        const float e = none ? 0.0f : x[(half * PLANES + p) * width + j] * inverse;
        lowest += std::min(TOP * e, 0.0f);
        entry += value[p] * e;
      }
      const __m512i rounded = _mm512_cvtps_epi32((__m512)(entry - lowest));
      const int at = (j / 4 * 2 + half) * TABLE_BYTES + j % 4 * NIBBLE_VALUES;
      storeu(table + at, _mm512_cvtusepi32_epi8(rounded));
    }
}

// See PageTotals. codes: of whole tiles of 16 keys, COLUMNS of four bytes; 0: any number.
template <int HEADS, int COLUMNS>
inline void nibble_totals(const SketchLayout& layout, const SketchQuery* q, const uint8_t* codes,
                          int tokens, I* totals) {
  const __m512i low_bits = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const __m512i byte = _mm512_set1_epi32(0x30201000);  // whose table, in bits 4 and 5 of an index
  const int columns = COLUMNS ? COLUMNS : layout.columns;
  for (int t = 0; t < tokens; t += LANES, totals += HEADS, codes += LANES * layout.width) {
    __m512i low_sum[HEADS], high_sum[HEADS];
    for (int g = 0; g < HEADS; g++) low_sum[g] = high_sum[g] = _mm512_setzero_si512();
    for (int c = 0; c < columns; c++) {
      const __m512i packed = _mm512_loadu_si512(codes + 64 * c);
      const __m512i low = _mm512_ternarylogic_epi32(low_bits, packed, byte, 0xca);
      const __m512i high =
          _mm512_ternarylogic_epi32(low_bits, _mm512_srli_epi32(packed, 4), byte, 0xca);
      for (int g = 0; g < HEADS; g++) {
        const uint8_t* table = static_cast<const uint8_t*>(q[g].data) + c * 2 * TABLE_BYTES;
        const __m512i of_low = _mm512_permutexvar_epi8(low, _mm512_loadu_si512(table));
        const __m512i of_high =
            _mm512_permutexvar_epi8(high, _mm512_loadu_si512(table + TABLE_BYTES));
        low_sum[g] = _mm512_dpbusd_epi32(low_sum[g], of_low, ones);
        high_sum[g] = _mm512_dpbusd_epi32(high_sum[g], of_high, ones);
      }
    }
    for (int g = 0; g < HEADS; g++)
      totals[g] = (I)_mm512_add_epi32(low_sum[g], high_sum[g]);
  }
}
#else
constexpr bool HAS_NIBBLE_KERNELS = false;
inline size_t nibble_query_size(const SketchLayout&) { return 0; }
template <int BITS>
void set_nibble_query(SketchQuery&, const float*, QueryRange, const SketchLayout&) {}
template <int HEADS, int COLUMNS>
void nibble_totals(const SketchLayout&, const SketchQuery*, const uint8_t*, int, I*) {}
#endif

}  // namespace psa
