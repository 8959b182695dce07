// The paged K/V pool as one batch row sees it.
#pragma once

#include "attend.h"
#include "psa_abi.h"
#include "rows.h"

namespace psa {

// Whether a head's rows follow each other, and its memory is best read for itself.
inline bool heads_apart(const PsaDecodeArgs& a) { return a.k_head_stride > a.k_token_stride; }

// All pages lie where the arguments say. The members that do nothing are those by which a pool whose
// pages come and go (tier_pool.h) learns what is attended.
template <class T>
struct RowPool {
  static constexpr bool RESIDENT = true;
  const PsaDecodeArgs& a;
  int row;
  const int32_t* pages;

  RowPool(const PsaDecodeArgs& args, int b) : a(args), row(b), pages(pages_of(args.rows, b)) {}

  const T* q(int kv_head) const {
    const int group = a.rows.num_qo_heads / a.rows.num_kv_heads;
    return static_cast<const T*>(a.rows.q) + row * a.rows.q_row_stride +
           (int64_t)kv_head * group * a.rows.q_head_stride;
  }
  const T* k(int page, int kv_head) const {
    return static_cast<const T*>(a.k) + first_slot(page) * a.k_token_stride +
           kv_head * a.k_head_stride;
  }
  const T* v(int page, int kv_head) const {
    return static_cast<const T*>(a.v) + first_slot(page) * a.v_token_stride +
           kv_head * a.v_head_stride;
  }
  bool heads_apart() const { return psa::heads_apart(a); }
  int64_t k_head_stride() const { return a.k_head_stride; }
  int64_t v_head_stride() const { return a.v_head_stride; }
  // These pages are to be attended, those of `then` likely next.
  void expect(const int* /*pages*/, int /*count*/, const int* /*then*/, int /*then_count*/) const {}
  // Until done() the pages of one block stay where they are; `next` may be prefetched meanwhile.
  void need(const int* /*pages*/, int /*count*/, const int* /*next*/, int /*next_count*/) const {}
  void done() const {}
  // As fill(), of the pages that were `next`.
  void fill_next(Block<T>& b, const int* logical, int count, int kv_head) const {
    fill(b, logical, count, kv_head);
  }
  // The rows of pages[0 .. count), logical pages, of head `kv_head`.
  void fill(Block<T>& b, const int* logical, int count, int kv_head) const {
    PageRows<T> rows[BLOCK_TOKENS];
    for (int i = 0; i < count; i++)
      rows[i] = {k(logical[i], kv_head), v(logical[i], kv_head),
                 tokens_in_page(a.rows, row, logical[i])};
    b.fill(rows, count, a.k_token_stride, a.v_token_stride);
  }

 private:
  int64_t first_slot(int page) const { return (int64_t)pages[page] * a.rows.page_size; }
};

// Pages of one block, at least one.
inline int block_pages(const PsaRows& r) { return std::max(1, BLOCK_TOKENS / r.page_size); }

// Writes out and lse of the head with index `at` in [batch * Hq] from head g of a finished state.
template <class T>
inline void write_head(const PsaDecodeArgs& a, int64_t at, const HeadState& st, int g) {
  const int D = a.rows.head_dim;
  T* out = static_cast<T*>(a.out) + at * D;
  const float scale = 1.0f / st.l[g];
  const float* acc = st.acc + (size_t)g * D;
  int d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES)
    store_pair(out + d, {loadu<F>(acc + d) * scale, loadu<F>(acc + d + LANES) * scale});
  for (; d < D; d++) store1(out + d, acc[d] * scale);
  a.lse[at] = st.log_mass(g);
}

inline float* stats_of(const PsaDecodeArgs& a, int row, int kv_head) {
  return a.stats + ((int64_t)row * a.rows.num_kv_heads + kv_head) * PSA_NUM_STATS;
}

// Flags of the pages attended, [max_pages]; null if nobody asks.
inline uint8_t* attended_of(const PsaDecodeArgs& a, int row, int kv_head) {
  if (!a.attended) return nullptr;
  return a.attended + ((int64_t)row * a.rows.num_kv_heads + kv_head) * a.rows.max_pages;
}

// (count, sum, sum of squares) of the residuals of query head `at` in [batch * Hq]; null if nobody
// asks.
inline float* residuals_of(const PsaDecodeArgs& a, int64_t at) {
  return a.residuals ? a.residuals + 3 * at : nullptr;
}

}  // namespace psa
