// Products of codes with queries in 8 bits an element.
#pragma once

#include "byte_dot.h"
#include "sketch_query.h"

namespace psa {

inline size_t byte_query_size(const SketchLayout& layout, int bits) {
  return (size_t)8 / bits * layout.columns * QUERY_WORDS * 4;
}

// x ~ step * bytes with step = max |x| / 127, in the order in which packed codes meet them: words
// [8 / bits][columns][QUERY_WORDS]. The rounding of the query meets code - middle only, middle =
// (2^bits - 1) / 2: what it takes from the sum of x is put back into the offset.
inline void set_byte_query(SketchQuery& q, const float* x, QueryRange range, int dim, int bits,
                           const SketchLayout& layout, int8_t* bytes) {
  const float inverse = range.tiny ? 0.0f : 127.0f / range.largest;
  const float step = range.tiny ? 0.0f : range.largest / 127.0f;
  typedef int8_t Int8 __attribute__((vector_size(LANES)));
  I of_bytes{};
  for (int d = 0; d < dim; d += LANES) {
    const F y = loadu<F>(x + d) * inverse;
    const I rounded = __builtin_convertvector(round_small(abs(y) <= 127.5f ? y : F{}), I);
    of_bytes += rounded;
    storeu(bytes + d, __builtin_convertvector(rounded, Int8));
  }
  const float sum_of_bytes = (float)hsum4(of_bytes, I{}, I{}, I{})[0];
  q.step = step;
  q.offset = 0.5f * (float)((1 << bits) - 1) * (range.sum - step * sum_of_bytes);
  if (QUERY_WORDS == 1 && layout.width % 4 == 0) {  // already in order
    std::memcpy(q.data, bytes, dim);
    return;
  }
  int32_t* word = static_cast<int32_t*>(q.data);
  for (int p = 0; p < 8 / bits; p++)
    for (int c = 0; c < layout.columns; c++, word += QUERY_WORDS) {
      int8_t four[4] = {};
      std::memcpy(four, bytes + p * layout.width + 4 * c, layout.column_bytes(c));
      set_query(word, four);
    }
}

template <bool WHOLE>
inline U load_column(const uint8_t* column, int bytes, int tokens) {
  if constexpr (WHOLE) return loadu<U>(column);
  uint32_t words[LANES] = {};
  for (int t = 0; t < tokens; t++) std::memcpy(words + t, column + t * bytes, bytes);
  return loadu<U>(words);
}

// A vector holds the same four bytes of LANES keys, so that one product-and-add meets LANES tokens
// and their dot products need no sum across lanes. Codes are taken out of a column once for all
// HEADS query heads. WHOLE: columns are whole vectors of words.
template <int BITS, int HEADS, bool WHOLE>
void byte_totals(const SketchLayout& layout, const SketchQuery* q, const uint8_t* codes, int tokens,
                 I* totals) {
  using Dot = ByteDot<BITS>;
  constexpr int PLANES = 8 / BITS;
  const int columns = layout.columns, step = std::min(layout.tile, LANES);
  const int32_t* words[HEADS];
  for (int g = 0; g < HEADS; g++) words[g] = static_cast<const int32_t*>(q[g].data);
  for (int t = 0; t < tokens; t += step, totals += HEADS) {
    Dot dots[HEADS * Dot::CHAINS];
    const uint8_t* column = codes + t / layout.tile * layout.tile * layout.width;
    const int lane = t % layout.tile;
    for (int c = 0; c < columns; c++) {
      const int bytes = WHOLE ? 4 : layout.column_bytes(c);
      const U packed = load_column<WHOLE>(column + lane * bytes, bytes, step);
      column += bytes * layout.tile;
      unrolled<PLANES>([&](auto p) __attribute__((always_inline)) {
        const Codes four = plane<BITS>(packed, p);
        const int at = (p * columns + c) * QUERY_WORDS;
        unrolled<HEADS>([&](auto g) __attribute__((always_inline)) {
          dots[g * Dot::CHAINS + p % Dot::CHAINS].add(four, words[g] + at);
        });
      });
      if (Dot::STEPS && (c + 1) % std::max(Dot::STEPS, 1) == 0)
        unrolled<HEADS>([&](auto g) { dots[g * Dot::CHAINS].settle(); });
    }
    unrolled<HEADS>([&](auto g) __attribute__((always_inline)) {
      dots[g * Dot::CHAINS].settle();
      I total = dots[g * Dot::CHAINS].total;
      unrolled<Dot::CHAINS - 1>([&](auto i) { total += dots[g * Dot::CHAINS + i + 1].total; });
      totals[g] = total;
    });
  }
}

template <int BITS, bool WHOLE>
constexpr PageTotals byte_totals_by_heads[MAX_HEADS] = {
    byte_totals<BITS, 1, WHOLE>, byte_totals<BITS, 2, WHOLE>, byte_totals<BITS, 3, WHOLE>,
    byte_totals<BITS, 4, WHOLE>};

// For 1 .. MAX_HEADS query heads.
inline const PageTotals* choose_byte_totals(int bits, bool whole) {
  switch (bits) {
    case 1: return whole ? byte_totals_by_heads<1, true> : byte_totals_by_heads<1, false>;
    case 2: return whole ? byte_totals_by_heads<2, true> : byte_totals_by_heads<2, false>;
    default: return whole ? byte_totals_by_heads<4, true> : byte_totals_by_heads<4, false>;
  }
}

}  // namespace psa
