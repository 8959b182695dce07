// Queries in 8 bits an element, in the order in which packed codes meet them.
#pragma once

#include "byte_dot.h"
#include "elem.h"
#include "sketch_layout.h"

namespace psa {

constexpr float LOG2_E = 1.44269504088896341f;

// x ~ step * bytes, x = sm_scale * log2(e) * q, with step = max |x| / 127. The logit in bits of a
// key `zero + scale * code` is
//   scale * (step * (bytes . code) + bias) + zero * sum,
// where sum is that of x itself and bias = middle * (sum - step * sum of bytes): the rounding of
// the query meets code - middle only, middle = (2^bits - 1) / 2.
// A query that is not finite has step NaN.
struct ByteQuery {
  int32_t* words;  // [8 / bits][columns][QUERY_WORDS]
  float step, bias, sum;

  static size_t num_words(const SketchLayout& layout, int bits) {
    return (size_t)8 / bits * layout.columns * QUERY_WORDS;
  }

  // work: dim floats; bytes: dim.
  template <class T>
  void set(const T* q, int dim, int bits, const SketchLayout& layout, float sm_scale, float* work,
           int8_t* bytes) {
    F top{}, total{};
    for (int d = 0; d < dim; d += LANES) {
      const F x = load(q + d) * (sm_scale * LOG2_E);
      storeu(work + d, x);
      top = max(top, abs(x));
      total += x;
    }
    sum = hsum(total);
    const float largest = hmax(top);
    const bool tiny = !(largest > 1e-30f);  // nothing that a code could scale up to a logit
    const float inverse = tiny ? 0.0f : 127.0f / largest;
    step = sum - sum == 0 ? (tiny ? 0.0f : largest / 127.0f) : __builtin_nanf("");
    typedef int8_t Int8 __attribute__((vector_size(LANES)));
    I of_bytes{};
    for (int d = 0; d < dim; d += LANES) {
      const F x = loadu<F>(work + d) * inverse;
      const I rounded = __builtin_convertvector(round_small(abs(x) <= 127.5f ? x : F{}), I);
      of_bytes += rounded;
      storeu(bytes + d, __builtin_convertvector(rounded, Int8));
    }
    bias = 0.5f * (float)((1 << bits) - 1) * (sum - step * (float)hsum4(of_bytes, I{}, I{}, I{})[0]);
    if (QUERY_WORDS == 1 && layout.width % 4 == 0) {  // already in order
      std::memcpy(words, bytes, dim);
      return;
    }
    int32_t* word = words;
    for (int p = 0; p < 8 / bits; p++)
      for (int c = 0; c < layout.columns; c++, word += QUERY_WORDS) {
        int8_t four[4] = {};
        std::memcpy(four, bytes + p * layout.width + 4 * c, layout.column_bytes(c));
        set_query(word, four);
      }
  }
};

}  // namespace psa
