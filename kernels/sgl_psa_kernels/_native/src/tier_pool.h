// The pages of one batch row in a page tier, for one task of a decode.
#pragma once

#include "pool.h"
#include "tier_crew.h"

namespace psa {

template <class T>
class TierPool {
 public:
  static constexpr bool RESIDENT = false;

  // heads: KV heads that attend a page together
  TierPool(const PsaDecodeArgs& a, DecodeFiber& fiber, int row, int heads)
      : a_(a),
        crew_(*fiber.crew),
        fiber_(fiber),
        row_(row),
        heads_(heads),
        pages_(pages_of(a.rows, row)) {}

  const T* q(int kv_head) const { return RowPool<T>(a_, row_).q(kv_head); }
  // A page is pinned for all of its heads at once.
  bool heads_apart() const { return false; }
  int64_t k_head_stride() const { return (int64_t)a_.rows.page_size * a_.rows.head_dim; }
  int64_t v_head_stride() const { return k_head_stride(); }

  void expect(const int* pages, int count, const int* then, int then_count) {
    if (!crew_.pipelined()) return;
    const int first = block_pages(a_.rows);  // those are needed at once
    for (int i = first; i < count; i += first) bring(pages + i, std::min(first, count - i));
    if (then_count) bring(then, then_count);
  }
  void need(const int* pages, int count, const int* next, int next_count) {
    PageBlock now;
    list(now, pages, count);
    crew_.need(fiber_, now, heads_);
    const std::lock_guard<std::mutex> lock(crew_.mutex());
    for (int i = 0; i < next_count; i++)
      next_[i] = crew_.frame_if_ready(crew_.record_of(pages_[next[i]]));
  }
  void done() { crew_.done(fiber_); }

  void fill(Block<T>& b, const int* logical, int count, int kv_head) const {
    fill(b, fiber_.frames, logical, count, kv_head);
  }
  // Pages that are not there are left out: nothing but prefetches depends on them.
  void fill_next(Block<T>& b, const int* logical, int count, int kv_head) const {
    fill(b, next_, logical, count, kv_head);
  }

 private:
  void list(PageBlock& to, const int* logical, int count) const {
    to.count = count;
    for (int i = 0; i < count; i++) {
      to.record[i] = crew_.record_of(pages_[logical[i]]);
      to.tokens[i] = tokens_in_page(a_.rows, row_, logical[i]);
    }
  }
  void bring(const int* logical, int count) {
    PageBlock pages;
    list(pages, logical, count);
    crew_.expect(pages);
  }
  void fill(Block<T>& b, const int* frames, const int* logical, int count, int kv_head) const {
    const int D = a_.rows.head_dim;
    PageRows<T> rows[BLOCK_TOKENS];
    int there = 0;
    for (int i = 0; i < count; i++) {
      if (frames[i] < 0) continue;
      const T* k = reinterpret_cast<const T*>(crew_.keys(frames[i])) + kv_head * k_head_stride();
      const T* v = reinterpret_cast<const T*>(crew_.values(frames[i])) + kv_head * v_head_stride();
      rows[there++] = {k, v, tokens_in_page(a_.rows, row_, logical[i])};
    }
    b.fill(rows, there, D, D);
  }

  const PsaDecodeArgs& a_;
  DecodeCrew& crew_;
  DecodeFiber& fiber_;
  const int row_, heads_;
  const int32_t* pages_;
  int next_[64];
};

}  // namespace psa
