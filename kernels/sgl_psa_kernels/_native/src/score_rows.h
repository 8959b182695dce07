// What the scorers share: rows cut into blocks of pages, and a block's log masses from the maximum
// and the sum of exponentials of each (head, page).
#pragma once

#include <vector>

#include "rows.h"
#include "scratch.h"
#include "vecmath.h"

namespace psa {

constexpr int BLOCK_PAGES = 128;

struct PageBlock {
  int row, begin, end;
  int size() const { return end - begin; }
};

inline std::vector<PageBlock> page_blocks(const PsaRows& r, const uint8_t* active) {
  std::vector<PageBlock> blocks;
  for (int b = 0; b < r.batch; b++) {
    if (!active[b]) continue;
    const int n = num_pages(r, b);
    for (int p = 0; p < n; p += BLOCK_PAGES)
      blocks.push_back({b, p, std::min(n, p + BLOCK_PAGES)});
  }
  return blocks;
}

// Whether the page's summary or sketches cover all of its tokens in this row.
inline bool covered(const PsaRows& r, const int32_t* watermark, int row, int page) {
  return watermark[pages_of(r, row)[page]] >= tokens_in_page(r, row, page);
}

// Estimates that are not below +inf (NaN included) become +inf.
inline F checked(F estimate) { return estimate < INF ? estimate : set1(INF); }

// out[0 .. count) = checked(x); x is padded to whole vectors, out is not.
inline void store_estimates(float* out, const float* x, int count) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) storeu(out + i, checked(loadu<F>(x + i)));
  if (i < count) {
    const F last = checked(loadu<F>(x + i));
    for (int j = 0; i + j < count; j++) out[i + j] = last[j];
  }
}

}  // namespace psa
