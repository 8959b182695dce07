// Queries made ready for products with packed codes, and which kernels take these products.
#pragma once

#include "elem.h"
#include "rotation.h"
#include "sketch_layout.h"

namespace psa {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr int MAX_HEADS = 4;  // query heads that share one pass over a page

// x = sm_scale * log2(e) * q of one head. Products with the codes of a key are integers `total`, and
// the logit in bits of a key `zero + scale * code` is
//   scale * (step * total + offset) + zero * sum,
// or without the last term where the zero is a multiple of the scale (rotated sketches), which
// `offset` then holds. A query that is not finite has step NaN.
struct SketchQuery {
  void* data;  // in the form of the kernel that reads it
  float step, offset, sum;
};

// What a query says of itself before it takes a form: x in `work`, and its extremes.
struct QueryRange {
  float sum, largest;
  bool finite, tiny;  // tiny: nothing that a code could scale up to a logit
};

// signs: null, or those of a rotation, which the query then goes through.
template <class T>
inline QueryRange scale_query(const T* q, int dim, float sm_scale, const float* signs,
                              float* work) {
  for (int d = 0; d < dim; d += LANES) storeu(work + d, load(q + d) * (sm_scale * LOG2_E));
  if (signs) {
    for (int d = 0; d < dim; d += LANES)
      storeu(work + d, loadu<F>(work + d) * loadu<F>(signs + d));
    hadamard(work, dim);
  }
  F top{}, total{};
  for (int d = 0; d < dim; d += LANES) {
    const F x = loadu<F>(work + d);
    top = max(top, abs(x));
    total += x;
  }
  const float sum = hsum(total), largest = hmax(top);
  return {sum, largest, sum - sum == 0, !(largest > 1e-30f)};
}

// Totals of the min(LANES, tile) keys from each multiple of that number on: totals[key / LANES *
// heads + head], keys up to `tokens`.
using PageTotals = void (*)(const SketchLayout&, const SketchQuery*, const uint8_t* codes,
                            int tokens, I* totals);

}  // namespace psa
