// Log masses of pages from key sketches: integer products of codes and queries (byte_query.h,
// nibble_query.h), logits in bits, and the logarithm of the sum of their exponentials.
#include "byte_query.h"
#include "log_mass.h"
#include "nibble_query.h"
#include "score_rows.h"

namespace psa {
namespace {

constexpr int PAGES_AHEAD = 2, AHEAD = 32;  // pages, or candidates, between prefetch and use
constexpr int STRIP_PAGES = 16;  // whose results are written together

struct Item {
  int32_t column, head;
};

struct Scorer;
// Sums of a page for the heads that q begins with; see page_sums.
using PageScore = F4 (*)(const Scorer&, const SketchQuery* q, float* base, const uint8_t* codes,
                         const uint16_t* affine, int tokens, I* totals);
inline const PageScore* choose_page_score(const Scorer& s);

struct Scorer {
  const PsaSketchScoreArgs& a;
  const PsaRows& r;
  const SketchLayout layout;
  const int group;
  const bool whole, nibbles;  // whole: columns are whole vectors of words
  const PageTotals* const byte_totals;
  const PageScore* const page_score;  // by the number of heads, from 1 on

  explicit Scorer(const PsaSketchScoreArgs& args)
      : a(args),
        r(args.rows),
        layout(r.page_size, r.head_dim, a.bits),
        group(r.num_qo_heads / r.num_kv_heads),
        whole(layout.tile % LANES == 0 && layout.width % 4 == 0),
        nibbles(whole && a.bits < 4 && HAS_NIBBLE_KERNELS),
        byte_totals(choose_byte_totals(a.bits, whole)),
        page_score(choose_page_score(*this)) {}

  const uint8_t* codes(int page, int head) const {
    return a.codes + ((int64_t)page * r.num_kv_heads + head) * layout.page_bytes();
  }
  const uint16_t* affine(int page, int head) const {
    return a.affine + ((int64_t)page * r.num_kv_heads + head) * r.page_size * a.affine_width;
  }
  void prefetch(int page, int head, int heads) const {
    prefetch_range(codes(page, head), (int64_t)heads * layout.page_bytes());
    prefetch_range(affine(page, head), (int64_t)heads * r.page_size * 2 * a.affine_width);
  }
  size_t query_size() const {
    return nibbles ? nibble_query_size(layout) : byte_query_size(layout, a.bits);
  }
  template <class T>
  void set_query(SketchQuery& q, const T* x, float* work, int8_t* bytes) const {
    const QueryRange range = scale_query(x, r.head_dim, r.sm_scale, a.signs, work);
    if (!nibbles)
      set_byte_query(q, work, range, r.head_dim, a.bits, layout, bytes);
    else if (a.bits == 1)
      set_nibble_query<1>(q, work, range, layout);
    else
      set_nibble_query<2>(q, work, range, layout);
    q.sum = range.sum;
    if (a.affine_width == 1) q.offset -= 0.5f * (float)((1 << a.bits) - 1) * range.sum;
    if (!range.finite) q.step = __builtin_nanf("");
  }
};

// (scale, zero) of min(LANES, count) keys. Not a number where no sketch exists.
inline void load_affine(const uint16_t* affine, int width, int count, F& scale, F& zero) {
  if (width == 2) {
    U both{};
    if (count >= LANES)
      both = loadu<U>(affine);
    else
      std::memcpy(&both, affine, count * 4);
    scale = half_to_float(__builtin_convertvector(both & 0xffffu, H));
    zero = half_to_float(__builtin_convertvector(both >> 16, H));
    zero += (scale + zero) * 0.0f;  // an infinite pair may not look like a small logit
  } else {
    H h{};
    if (count >= LANES)
      h = loadu<H>(affine);
    else
      std::memcpy(&h, affine, count * 2);
    scale = half_to_float(h);
  }
}

// Of a page's logits, less their head's base: the sum of 2^logit, or the largest. `step` tokens are
// one vector of totals, `width` numbers a token's affine pair.
template <int HEADS>
__attribute__((always_inline)) inline F4 reduce(const SketchQuery* q, const float* base,
                                                const I* totals, const uint16_t* affine, int tokens,
                                                int step, int width, bool largest) {
  F e[4];
  unrolled<HEADS>([&](auto g) { e[g] = largest ? set1(-INF) : F{}; });
  for (int t = 0; t < tokens; t += step, totals += HEADS) {
    F scale, zero, logit[HEADS];
    load_affine(affine + t * width, width, step, scale, zero);
    unrolled<HEADS>([&](auto g) __attribute__((always_inline)) {
      const F dot = __builtin_convertvector(totals[g], F) * q[g].step + q[g].offset;
      logit[g] = scale * dot - base[g];
    });
    if (width == 2) unrolled<HEADS>([&](auto g) { logit[g] += zero * q[g].sum; });
    if (tokens - t < LANES) {
      const I inside = iota() + t < tokens;
      unrolled<HEADS>([&](auto g) { logit[g] = inside ? logit[g] : set1(-INF); });
    }
    if (largest)
      unrolled<HEADS>([&](auto g) { e[g] = max(e[g], logit[g]); });
    else
      unrolled<HEADS>([&](auto g) { e[g] += pow2(logit[g]); });
  }
  unrolled<4 - HEADS>([&](auto g) { e[HEADS + g] = e[0]; });
  return largest ? hmax4(e[0], e[1], e[2], e[3]) : hsum4(e[0], e[1], e[2], e[3]);
}

template <int HEADS>
inline F4 reduce_page(const Scorer& s, const SketchQuery* q, const float* base, const I* totals,
                      const uint16_t* affine, int tokens, bool largest) {
  const int step = std::min(s.layout.tile, LANES), width = s.a.affine_width;
  // A page of 16 tokens: all numbers are known.
  if (tokens == LANES && step == LANES && width == 2)
    return reduce<HEADS>(q, base, totals, affine, LANES, LANES, 2, largest);
  return reduce<HEADS>(q, base, totals, affine, tokens, step, width, largest);
}

// The same by another base, for the pages that follow too.
template <int HEADS>
__attribute__((noinline)) F4 rebased_sums(const Scorer& s, const SketchQuery* q, float* base,
                                          const I* totals, const uint16_t* affine, int tokens) {
  const float zero[HEADS] = {};
  const F4 largest = reduce_page<HEADS>(s, q, zero, totals, affine, tokens, true);
  for (int g = 0; g < HEADS; g++) base[g] = largest[g] - largest[g] == 0 ? largest[g] : 0;
  const F4 again = reduce_page<HEADS>(s, q, base, totals, affine, tokens, false);
  return again < INF ? again : F4{} + __builtin_nanf("");
}

// The log mass of a page is log(sum) + LN_2 * base. A base that does not serve is changed.
template <int HEADS>
inline F4 page_sums(const Scorer& s, const SketchQuery* q, float* base, const I* totals,
                    const uint16_t* affine, int tokens) {
  const F4 sums = reduce_page<HEADS>(s, q, base, totals, affine, tokens, false);
  if (__builtin_expect(trusted(sums), 1)) return sums;
  return rebased_sums<HEADS>(s, q, base, totals, affine, tokens);
}

template <int HEADS>
F4 byte_page(const Scorer& s, const SketchQuery* q, float* base, const uint8_t* codes,
             const uint16_t* affine, int tokens, I* totals) {
  s.byte_totals[HEADS - 1](s.layout, q, codes, tokens, totals);
  return page_sums<HEADS>(s, q, base, totals, affine, tokens);
}
template <int HEADS, int COLUMNS>
F4 nibble_page(const Scorer& s, const SketchQuery* q, float* base, const uint8_t* codes,
               const uint16_t* affine, int tokens, I* totals) {
  nibble_totals<HEADS, COLUMNS>(s.layout, q, codes, tokens, totals);
  return page_sums<HEADS>(s, q, base, totals, affine, tokens);
}
constexpr PageScore byte_pages[MAX_HEADS] = {byte_page<1>, byte_page<2>, byte_page<3>,
                                             byte_page<4>};
template <int COLUMNS>
constexpr PageScore nibble_pages[MAX_HEADS] = {nibble_page<1, COLUMNS>, nibble_page<2, COLUMNS>,
                                               nibble_page<3, COLUMNS>, nibble_page<4, COLUMNS>};

// Common numbers of columns, of heads of 64 and 128 in 1 and 2 bits, have instances of their own.
inline const PageScore* choose_page_score(const Scorer& s) {
  if (!s.nibbles) return byte_pages;
  switch (s.layout.columns) {
    case 2: return nibble_pages<2>;
    case 4: return nibble_pages<4>;
    case 8: return nibble_pages<8>;
  }
  return nibble_pages<0>;
}

// A thread's part of the work: its queries are those of the row of its newest block.
template <class T>
class Worker {
 public:
  Worker(const Scorer& scorer, Scratch& scratch)
      : s_(scorer), r_(scorer.r), parts_((scorer.group + MAX_HEADS - 1) / MAX_HEADS) {
    const int heads = r_.num_qo_heads;
    const size_t most = (size_t)r_.num_kv_heads * (s_.a.candidates ? BLOCK_PAGES : STRIP_PAGES);
    const size_t vectors = (r_.page_size + LANES - 1) / LANES + LANES;
    const size_t query = (s_.query_size() + 63) / 64 * 64;
    scratch.reset(Scratch::need<SketchQuery>(heads) + query * heads +
                  Scratch::need<float>(r_.head_dim) + Scratch::need<int8_t>(r_.head_dim) +
                  Scratch::need<I>(vectors * MAX_HEADS) + Scratch::need<float>(heads + 3) +
                  2 * Scratch::need<F4>(most * parts_ + LANES) + Scratch::need<Item>(most));
    queries_ = scratch.take<SketchQuery>(heads);
    uint8_t* data = scratch.take<uint8_t>(query * heads);
    for (int h = 0; h < heads; h++) queries_[h].data = data + h * query;
    work_ = scratch.take<float>(r_.head_dim);
    bytes_ = scratch.take<int8_t>(r_.head_dim);
    totals_ = scratch.take<I>(vectors * MAX_HEADS);
    base_ = scratch.take<float>(heads + 3);  // read by fours
    sums_ = scratch.take<F4>(most * parts_ + LANES);
    bases_ = scratch.take<F4>(most * parts_ + LANES);
    items_ = scratch.take<Item>(most);
  }

  void score(const PageBlock& block) {
    row_ = block.row, first_ = block.begin;
    pages_ = pages_of(r_, row_) + first_;
    log_mass_ = s_.a.log_mass + (int64_t)row_ * r_.num_qo_heads * r_.max_pages + first_;
    // A block's result depends on nothing but its own pages.
    std::fill(base_, base_ + r_.num_qo_heads + 3, 0.0f);
    if (s_.a.candidates) {
      score_candidates(collect(block.size()));
    } else {
      set_queries();
      for (int i = 0; i < block.size(); i += STRIP_PAGES)
        score_strip(i, std::min(block.size(), i + STRIP_PAGES), block.size());
    }
  }

 private:
  // Every page of begin .. end; those up to `last` are fetched.
  void score_strip(int begin, int end, int last) {
    const int heads = r_.num_kv_heads;
    if (begin == 0)
      for (int i = 0; i < std::min(PAGES_AHEAD, last); i++) prefetch_page(i);
    Item item;
    int cell = 0;
    for (item.column = begin; item.column < end; item.column++) {
      const int ahead = item.column + PAGES_AHEAD;
      const bool known = has_sketch(item.column);
      for (item.head = 0; item.head < heads; item.head++, cell += parts_) {
        // A little at a time: requests that come in bunches fill the buffers that loads need.
        if (ahead < last) prefetch({ahead, item.head});
        if (known)
          score_page(item, cell);
        else
          std::fill(sums_ + cell, sums_ + cell + parts_, F4{} + __builtin_nanf(""));
      }
    }
    finish(cell);
    for (int h = 0; h < heads; h++)
      for (int part = 0; part < parts_; part++) write_strip(h, part, begin, end);
  }

  // The log masses of up to MAX_HEADS query heads of a KV head.
  void write_strip(int head, int part, int begin, int end) {
    const int first = part * MAX_HEADS, rows = std::min(MAX_HEADS, s_.group - first);
    const F4* from = sums_ + head * parts_ + part;
    const int64_t stride = (int64_t)r_.num_kv_heads * parts_;
    float* to[4] = {};
    for (int g = 0; g < rows; g++) to[g] = out(head, first + g) + begin;
    int i = 0;
    for (; i + LANES <= end - begin; i += LANES) {
      store_columns(from + i * stride, stride, to, rows);
      for (int g = 0; g < rows; g++) to[g] += LANES;
    }
    for (; i < end - begin; i++)
      for (int g = 0; g < rows; g++) *to[g]++ = from[i * stride][g];
  }

  void score_candidates(int count) {
    if (!count) return;
    set_queries();
    for (int i = 0; i < std::min(AHEAD, count); i++) prefetch(items_[i]);
    for (int i = 0; i < count; i++) {
      if (i + AHEAD < count) prefetch(items_[i + AHEAD]);
      score_page(items_[i], i * parts_);
    }
    finish(count * parts_);
    for (int i = 0; i < count; i++)
      for (int g = 0; g < s_.group; g++)
        out(items_[i].head, g)[items_[i].column] = value(i * parts_, g);
  }

  // The candidates of a block that have sketches, page by page: heads of a page are neighbours in
  // memory. Those without get their infinity.
  int collect(int size) {
    const int heads = r_.num_kv_heads;
    const uint8_t* flags = s_.a.candidates + (int64_t)row_ * heads * r_.max_pages + first_;
    int count = 0;
    for (int i = 0; i < size; i++)
      for (int h = 0; h < heads; h++) {
        if (!flags[(int64_t)h * r_.max_pages + i]) continue;
        if (has_sketch(i))
          items_[count++] = {i, h};
        else
          for (int g = 0; g < s_.group; g++) out(h, g)[i] = INF;
      }
    return count;
  }

  // Sums and bases of the query heads of one KV head, to the cells from `cell` on.
  void score_page(Item item, int cell) {
    const int page = pages_[item.column];
    const int tokens = tokens_in_page(r_, row_, first_ + item.column);
    const uint8_t* codes = s_.codes(page, item.head);
    const uint16_t* affine = s_.affine(page, item.head);
    for (int g = 0; g < s_.group; g += MAX_HEADS, cell++) {
      const int head = item.head * s_.group + g, n = std::min(MAX_HEADS, s_.group - g) - 1;
      sums_[cell] =
          s_.page_score[n](s_, queries_ + head, base_ + head, codes, affine, tokens, totals_);
      bases_[cell] = loadu<F4>(base_ + head);
    }
  }

  // Log masses in place of the sums.
  void finish(int cells) {
    float* x = reinterpret_cast<float*>(sums_);
    const float* base = reinterpret_cast<const float*>(bases_);
    for (int i = 0; i < 4 * cells; i += LANES)
      storeu(x + i, checked(log(loadu<F>(x + i)) + loadu<F>(base + i) * LN_2));
  }
  float value(int cell, int g) const {
    return reinterpret_cast<const float*>(sums_)[4 * cell + g];
  }

  bool has_sketch(int column) const { return covered(r_, s_.a.watermark, row_, first_ + column); }
  void prefetch(Item item) const { s_.prefetch(pages_[item.column], item.head, 1); }
  void prefetch_page(int column) const { s_.prefetch(pages_[column], 0, r_.num_kv_heads); }

  void set_queries() {
    if (row_ == ready_) return;
    ready_ = row_;
    const T* queries = static_cast<const T*>(r_.q) + row_ * r_.q_row_stride;
    for (int h = 0; h < r_.num_qo_heads; h++)
      s_.set_query(queries_[h], queries + h * r_.q_head_stride, work_, bytes_);
  }

  float* out(int head, int g) const {
    return log_mass_ + (int64_t)(head * s_.group + g) * r_.max_pages;
  }

  const Scorer& s_;
  const PsaRows& r_;
  const int parts_;  // groups of MAX_HEADS query heads that a KV head has
  SketchQuery* queries_;
  float *work_, *base_;
  int8_t* bytes_;
  I* totals_;
  F4 *sums_, *bases_;
  Item* items_;
  const int32_t* pages_;
  float* log_mass_;
  int row_ = 0, first_ = 0, ready_ = -1;
};

}  // namespace
}  // namespace psa

extern "C" int psa_sketch_score(PsaSketchScoreArgs* args) {
  using namespace psa;
  PsaRows& r = args->rows;
  if (const int status = check_rows(r, args->active)) return status;
  const std::vector<PageBlock> blocks = page_blocks(r, args->active);
  const int count = (int)blocks.size();
  const Scorer scorer(*args);
  const bool known = with_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
    {
      static thread_local Scratch scratch;
      Worker<T> worker(scorer, scratch);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; i++) worker.score(blocks[i]);
    }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
