// Low-bit codes as vectors of shorts, and queries in the same order of elements.
//
// A packed key of W bytes is cut into blocks of bytes; each byte becomes one short, and each plane
// of the block (shift by plane * bits, mask) is one vector. When W is half a vector, two planes
// share one vector. Bytes behind W are zero, and so are the query elements that meet them.
#pragma once

#include "elem.h"

namespace psa {

constexpr int SHORTS = 2 * LANES;

enum class Blocks { Full, Half, Partial };  // W a multiple of SHORTS; W == SHORTS / 2; the rest

inline Blocks blocks_kind(int width) {
  if (width % SHORTS == 0) return Blocks::Full;
  return width * 2 == SHORTS ? Blocks::Half : Blocks::Partial;
}
// Vectors per key.
inline int num_vectors(int width, int bits) {
  const int planes = 8 / bits;
  if (blocks_kind(width) == Blocks::Half) return planes / 2;
  return (width + SHORTS - 1) / SHORTS * planes;
}

typedef uint8_t HalfBytes __attribute__((vector_size(SHORTS / 2)));
typedef int16_t HalfShorts __attribute__((vector_size(SHORTS)));

// Both halves of the result are the widened bytes.
inline S widen_twice(HalfBytes b) {
  const HalfShorts w = __builtin_convertvector(b, HalfShorts);
#if PSA_WIDTH == 512
  return (S)_mm512_broadcast_i64x4((__m256i)w);
#elif PSA_WIDTH == 256
  return (S)_mm256_broadcastsi128_si256((__m128i)w);
#else
  S r;
  std::memcpy(&r, &w, sizeof w);
  std::memcpy((char*)&r + sizeof w, &w, sizeof w);
  return r;
#endif
}

// Shift counts: `low` in the lower half, `high` in the upper.
inline S halves(int low, int high) {
  S r;
  for (int i = 0; i < SHORTS; i++) r[i] = (int16_t)(i < LANES ? low : high);
  return r;
}

// The vectors of one packed key, handed to f(index, vector).
template <int BITS, Blocks KIND, class Fn>
inline void unpack(const uint8_t* packed, int width, Fn f) {
  constexpr int PLANES = 8 / BITS;
  constexpr int16_t MASK = (1 << BITS) - 1;
  if constexpr (KIND == Blocks::Half) {
    const S w = widen_twice(loadu<HalfBytes>(packed));
    for (int i = 0; i < PLANES / 2; i++)
      f(i, (w >> halves(2 * i * BITS, (2 * i + 1) * BITS)) & MASK);
  } else {
    for (int at = 0, i = 0; at < width; at += SHORTS) {
      S w;
      if (KIND == Blocks::Full || at + SHORTS <= width) {
        w = widen(loadu<Bytes>(packed + at));
      } else {
        Bytes part{};
        std::memcpy(&part, packed + at, width - at);
        w = widen(part);
      }
      for (int16_t p = 0; p < PLANES; p++, i++) f(i, (w >> (int16_t)(p * BITS)) & MASK);
    }
  }
}

// Place of element e among the shorts of the unpacked vectors.
inline int place_of(int e, int width, int bits) {
  const int plane = e / width, byte = e % width;
  if (blocks_kind(width) == Blocks::Half) return plane / 2 * SHORTS + plane % 2 * width + byte;
  return (byte / SHORTS * (8 / bits) + plane) * SHORTS + byte % SHORTS;
}

// A query in 16 bits per element, in the order of the unpacked codes: x ~ step * shorts, with
// sm_scale in x. sum: of the x themselves.
struct ShortQuery {
  int16_t* shorts;
  float step, sum;

  template <class T>
  void set(const T* q, int dim, int bits, float sm_scale, float* work) {
    const int width = dim * bits / 8;
    F top{}, total{};
    for (int d = 0; d < dim; d += LANES) {
      const F x = load(q + d) * sm_scale;
      storeu(work + d, x);
      top = max(top, abs(x));
      total += x;
    }
    sum = hsum(total);
    const float largest = hmax(top);
    // NaN and inf reach the estimate through sum.
    const bool usable = largest > 0 && largest < INF;
    step = usable ? largest / 32767.0f : 0.0f;
    const float inverse = usable ? 32767.0f / largest : 0.0f;
    std::memset(shorts, 0, (size_t)num_vectors(width, bits) * sizeof(S));
    for (int e = 0; e < dim; e++)
      shorts[place_of(e, width, bits)] = usable ? (int16_t)std::lrintf(work[e] * inverse) : 0;
  }
};

}  // namespace psa
