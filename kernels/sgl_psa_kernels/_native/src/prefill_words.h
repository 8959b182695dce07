// Operands of the products of prefill, as the multiplications take them. A word is 32 bits of a
// row: two bf16 numbers where the CPU multiplies those and sums in float32, else one float.
#pragma once

#include <algorithm>

#include "store.h"

namespace psa {

// Rows whose sums stay in registers, and the vectors of columns of a panel.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2;
constexpr int PANEL = TILE_VECTORS * LANES;

// Elements of T in a word.
#if defined(__AVX512BF16__)
template <class T>
constexpr int PER_WORD = std::is_same_v<T, bf16> ? 2 : 1;
#else
template <class T>
constexpr int PER_WORD = 1;
#endif

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
template <class T>
inline int64_t words(int64_t elements) {
  return (elements + PER_WORD<T> - 1) / PER_WORD<T>;
}

// `count` elements of x to words; what the last word has no element for is 0.
template <class T>
inline void to_words(const T* x, int64_t count, uint32_t* out) {
  if constexpr (PER_WORD<T> == 2) {
    if (count % 2) out[count / 2] = 0;
    std::memcpy(out, x, count * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) storeu(out + i, load(x + i));
    for (; i < count; i++) {
      const float element = load_part(x + i, 1)[0];
      std::memcpy(out + i, &element, 4);
    }
  }
}

// Rows of keys, `stride` apart, to panels [keys / PANEL][words of a row][PANEL].
template <class T>
inline void pack_keys(const T* k, int64_t stride, int64_t count, int64_t dim, uint32_t* out) {
  constexpr int64_t PIECE = 128;  // elements
  const int64_t steps = words<T>(dim);
  for (int64_t key = 0; key < round_up(count, PANEL); key++) {
    uint32_t* to = out + key / PANEL * steps * PANEL + key % PANEL;
    if (key >= count) {
      for (int64_t s = 0; s < steps; s++) to[s * PANEL] = 0;
      continue;
    }
    for (int64_t d = 0; d < dim; d += PIECE) {
      const int64_t elements = std::min(PIECE, dim - d);
      uint32_t piece[PIECE];
      to_words(k + key * stride + d, elements, piece);
      for (int64_t s = 0; s < words<T>(elements); s++, to += PANEL) *to = piece[s];
    }
  }
}

// Rows of values to panels [dim / PANEL][words of `count` keys][PANEL].
template <class T>
inline void pack_values(const T* v, int64_t stride, int64_t count, int64_t dim, uint32_t* out) {
  const int64_t steps = words<T>(count);
  const auto vector = [&](int64_t key, int64_t d) {
    if (key >= count || d >= dim) return F{};
    const T* from = v + key * stride + d;
    return d + LANES <= dim ? load(from) : load_part(from, dim - d);
  };
  for (int64_t d = 0; d < round_up(dim, PANEL); d += LANES) {
    uint32_t* to = out + d / PANEL * steps * PANEL + d % PANEL;
    for (int64_t s = 0; s < steps; s++, to += PANEL) {
      const U first = (U)vector(s * PER_WORD<T>, d);
      if constexpr (PER_WORD<T> == 2)
        storeu(to, first >> 16 | (U)vector(2 * s + 1, d));
      else
        storeu(to, first);
    }
  }
}

template <int PER>
inline F multiply_add(F sum, U a, U b) {
#if defined(__AVX512BF16__)
  if constexpr (PER == 2)
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  else
#endif
    return sum + (F)a * (F)b;
}

// sum[r][v] += row r of a * columns [v * LANES, ...) of a panel; rows of a are `stride` words
// apart.
template <int PER, int VECTORS>
__attribute__((always_inline)) inline void multiply(const uint32_t* a, int64_t stride,
                                                    const uint32_t* panel, int64_t steps,
                                                    F (&sum)[TILE_ROWS][VECTORS]) {
  for (int64_t s = 0; s < steps; s++) {
    U column[VECTORS];
    unrolled<VECTORS>([&](auto v) { column[v] = loadu<U>(panel + s * PANEL + v * LANES); });
    unrolled<TILE_ROWS>([&](auto r) {
      const U element = a[r * stride + s] - U{};
      unrolled<VECTORS>(
          [&](auto v) { sum[r][v] = multiply_add<PER>(sum[r][v], element, column[v]); });
    });
  }
}

// f(vectors) with a constant argument of 1..TILE_VECTORS.
template <class Fn>
__attribute__((always_inline)) inline void with_vectors(int64_t count, Fn f) {
  unrolled<TILE_VECTORS>([&](auto v) {
    if (count == v + 1) f(std::integral_constant<int, v + 1>{});
  });
}

}  // namespace psa
