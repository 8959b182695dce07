// Batch rows: lengths, page numbers and their validation.
#pragma once

#include <algorithm>

#include "psa_abi.h"

namespace psa {

inline int num_pages(const PsaRows& r, int row) {
  return (int)(((int64_t)r.seq_lens[row] + r.page_size - 1) / r.page_size);
}
inline int tokens_in_page(const PsaRows& r, int row, int page) {
  return (int)std::min<int64_t>(r.page_size, r.seq_lens[row] - (int64_t)page * r.page_size);
}
inline const int32_t* pages_of(const PsaRows& r, int row) {
  return r.page_table + row * r.page_table_stride;
}

// Every page number that the kernels will use lies in the pool. Entries behind a row's last page
// are not looked at.
inline int check_rows(PsaRows& r, const uint8_t* active) {
  for (int b = 0; b < r.batch; b++) {
    if (active && !active[b]) continue;
    r.error_index = b;
    if (r.seq_lens[b] < 0 || num_pages(r, b) > r.max_pages) return PSA_BAD_SEQ_LEN;
    const int32_t* pages = pages_of(r, b);
    const int n = num_pages(r, b);
    bool bad = false;
    for (int j = 0; j < n; j++) bad |= (uint32_t)pages[j] >= (uint32_t)r.num_pages;
    if (bad) return PSA_BAD_PAGE;
  }
  return PSA_OK;
}

}  // namespace psa
