// Log masses of pages from key sketches.
//
// A vector holds the same four bytes of LANES keys, so that one product-and-add meets LANES tokens
// and their dot products need no sum across lanes. Codes are taken out of a column once for the
// (up to four) query heads of a block. Rotated sketches store no zero: it is -(2^bits - 1) / 2
// scales. Logits are in bits, see byte_query.h.
#include "byte_query.h"
#include "score_rows.h"

namespace psa {
namespace {

constexpr float LN_2 = 0.693147180559945309f;
constexpr int MAX_HEADS = 4;  // query heads that share one pass over a page
constexpr int AHEAD = 16;     // how many (page, head) earlier codes are prefetched

struct Scorer {
  const PsaSketchScoreArgs& a;
  const PsaRows& r;
  const SketchLayout layout;
  const int group;

  explicit Scorer(const PsaSketchScoreArgs& args)
      : a(args),
        r(args.rows),
        layout(r.page_size, r.head_dim, a.bits),
        group(r.num_qo_heads / r.num_kv_heads) {}

  const uint8_t* codes(int page, int head) const {
    return a.codes + ((int64_t)page * r.num_kv_heads + head) * layout.page_bytes();
  }
  const uint16_t* affine(int page, int head) const {
    return a.affine + ((int64_t)page * r.num_kv_heads + head) * r.page_size * a.affine_width;
  }
  void prefetch(int page, int head) const {
    prefetch_range(codes(page, head), layout.page_bytes());
    prefetch_range(affine(page, head), (int64_t)r.page_size * 2 * a.affine_width);
  }
  // Whether columns are whole vectors of words.
  bool whole() const { return layout.tile % LANES == 0 && layout.width % 4 == 0; }
};

// (scale, zero) of min(LANES, count) keys. Not a number where no sketch exists.
inline void load_affine(const uint16_t* affine, int width, int count, float middle, F& scale,
                        F& zero) {
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
    zero = scale * -middle;
  }
}

template <bool WHOLE>
inline U load_column(const uint8_t* column, int bytes, int tokens) {
  if constexpr (WHOLE) return loadu<U>(column);
  uint32_t words[LANES] = {};
  for (int t = 0; t < tokens; t++) std::memcpy(words + t, column + t * bytes, bytes);
  return loadu<U>(words);
}

// One page for HEADS query heads: its log mass is top[g * BLOCK_PAGES] + log(sum[g * BLOCK_PAGES]).
// spilled: HEADS vectors for every LANES tokens of a page. WHOLE: Scorer::whole().
template <int BITS, int HEADS, bool WHOLE>
void page_mass(const Scorer& s, const ByteQuery* q, const uint8_t* codes, const uint16_t* affine,
               int tokens, F* spilled, float* top, float* sum) {
  using Dot = ByteDot<BITS>;
  constexpr int PLANES = 8 / BITS;
  const SketchLayout& layout = s.layout;
  const int columns = layout.columns, step = std::min(layout.tile, LANES);

  const auto logits = [&](int t, F* logit) __attribute__((always_inline)) {
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
          dots[g * Dot::CHAINS + p % Dot::CHAINS].add(four, q[g].words + at);
        });
      });
      if (Dot::STEPS && (c + 1) % std::max(Dot::STEPS, 1) == 0)
        unrolled<HEADS>([&](auto g) { dots[g * Dot::CHAINS].settle(); });
    }
    unrolled<HEADS>([&](auto g) { dots[g * Dot::CHAINS].settle(); });
    F scale, zero;
    const float middle = 0.5f * (float)((1 << BITS) - 1);
    load_affine(affine + t * s.a.affine_width, s.a.affine_width, step, middle, scale, zero);
    unrolled<HEADS>([&](auto g) __attribute__((always_inline)) {
      I total = dots[g * Dot::CHAINS].total;
      unrolled<Dot::CHAINS - 1>([&](auto i) { total += dots[g * Dot::CHAINS + i + 1].total; });
      const F dot = __builtin_convertvector(total, F) * q[g].step + q[g].bias;
      logit[g] = scale * dot + zero * q[g].sum;
    });
    if (tokens - t < LANES) {
      const I inside = iota() + t < tokens;
      unrolled<HEADS>([&](auto g) { logit[g] = inside ? logit[g] : set1(-INF); });
    }
  };

  F x[HEADS], m[4], e[4];
  logits(0, x);
  unrolled<HEADS>([&](auto g) { m[g] = x[g]; });
  for (int t = step; t < tokens; t += step) {
    F more[HEADS];
    logits(t, more);
    unrolled<HEADS>([&](auto g) {
      spilled[t / step * HEADS + g] = more[g];
      m[g] = max(m[g], more[g]);
    });
  }
  unrolled<4 - HEADS>([&](auto g) { m[HEADS + g] = m[0]; });
  const F4 largest = hmax4(m[0], m[1], m[2], m[3]);
  unrolled<HEADS>([&](auto g) { e[g] = exp2(x[g] - largest[g()]); });
  for (int t = step; t < tokens; t += step)
    unrolled<HEADS>([&](auto g) { e[g] += exp2(spilled[t / step * HEADS + g] - largest[g()]); });
  unrolled<4 - HEADS>([&](auto g) { e[HEADS + g] = e[0]; });
  const F4 total = hsum4(e[0], e[1], e[2], e[3]), nats = largest * LN_2;
  unrolled<HEADS>([&](auto g) {
    top[g * BLOCK_PAGES] = nats[g()];
    sum[g * BLOCK_PAGES] = total[g()];
  });
}

using PageMass = void (*)(const Scorer&, const ByteQuery*, const uint8_t*, const uint16_t*, int,
                          F*, float*, float*);

// page_mass for 1 .. MAX_HEADS query heads.
template <int BITS, bool WHOLE>
constexpr PageMass by_heads[MAX_HEADS] = {page_mass<BITS, 1, WHOLE>, page_mass<BITS, 2, WHOLE>,
                                          page_mass<BITS, 3, WHOLE>, page_mass<BITS, 4, WHOLE>};

const PageMass* choose(const Scorer& s) {
  const bool whole = s.whole();
  switch (s.a.bits) {
    case 1: return whole ? by_heads<1, true> : by_heads<1, false>;
    case 2: return whole ? by_heads<2, true> : by_heads<2, false>;
    default: return whole ? by_heads<4, true> : by_heads<4, false>;
  }
}

struct Item {
  int32_t column, head;
};

template <class T>
void score_block(const Scorer& s, const PageMass* mass, const PageBlock& block, Scratch& scratch) {
  const PsaRows& r = s.r;
  const int heads = r.num_kv_heads, D = r.head_dim;
  const size_t words = ByteQuery::num_words(s.layout, s.a.bits);
  const size_t cells = (size_t)r.num_qo_heads * BLOCK_PAGES;
  const size_t most = (size_t)heads * BLOCK_PAGES, vectors = (size_t)(r.page_size + LANES - 1);
  scratch.reset(Scratch::need<ByteQuery>(r.num_qo_heads) +
                Scratch::need<int32_t>(words * r.num_qo_heads) + Scratch::need<float>(D) +
                Scratch::need<int8_t>(D) + Scratch::need<F>(vectors / LANES * MAX_HEADS) +
                2 * Scratch::need<float>(cells) + Scratch::need<Item>(most));
  ByteQuery* q = scratch.take<ByteQuery>(r.num_qo_heads);
  int32_t* query_words = scratch.take<int32_t>(words * r.num_qo_heads);
  float* work = scratch.take<float>(D);
  int8_t* bytes = scratch.take<int8_t>(D);
  F* spilled = scratch.take<F>(vectors / LANES * MAX_HEADS);
  float* top = scratch.take<float>(cells);
  float* sum = scratch.take<float>(cells);
  Item* items = scratch.take<Item>(most);

  float* log_mass = s.a.log_mass + (int64_t)block.row * r.num_qo_heads * r.max_pages + block.begin;
  for (size_t i = 0; i < cells; i++) sum[i] = 1;
  if (s.a.candidates)
    for (int h = 0; h < r.num_qo_heads; h++)
      std::memcpy(top + h * BLOCK_PAGES, log_mass + (int64_t)h * r.max_pages, block.size() * 4);
  int count = 0;
  bool changed = false;
  const auto add = [&](int column, int head) {
    changed = true;
    if (covered(r, s.a.watermark, block.row, block.begin + column))
      items[count++] = {column, head};
    else
      for (int g = 0; g < s.group; g++) top[(head * s.group + g) * BLOCK_PAGES + column] = INF;
  };
  if (s.a.candidates) {
    for (int h = 0; h < heads; h++) {
      const uint8_t* wanted =
          s.a.candidates + ((int64_t)block.row * heads + h) * r.max_pages + block.begin;
      for (int i = 0; i < block.size(); i++)
        if (wanted[i]) add(i, h);
    }
  } else {
    for (int i = 0; i < block.size(); i++)
      for (int h = 0; h < heads; h++) add(i, h);
  }
  if (!changed) return;

  const int32_t* pages = pages_of(r, block.row) + block.begin;
  for (int i = 0; i < std::min(AHEAD, count); i++)
    s.prefetch(pages[items[i].column], items[i].head);
  const T* queries = static_cast<const T*>(r.q) + block.row * r.q_row_stride;
  for (int h = 0; h < r.num_qo_heads; h++) {
    q[h].words = query_words + h * words;
    q[h].set(queries + h * r.q_head_stride, D, s.a.bits, s.layout, r.sm_scale, work, bytes);
  }
  for (int i = 0; i < count; i++) {
    if (i + AHEAD < count) s.prefetch(pages[items[i + AHEAD].column], items[i + AHEAD].head);
    const int column = items[i].column, head = items[i].head, page = pages[column];
    const int tokens = tokens_in_page(r, block.row, block.begin + column);
    for (int g = 0; g < s.group; g += MAX_HEADS) {
      const int first = head * s.group + g, cell = first * BLOCK_PAGES + column;
      mass[std::min(MAX_HEADS, s.group - g) - 1](s, q + first, s.codes(page, head),
                                                 s.affine(page, head), tokens, spilled, top + cell,
                                                 sum + cell);
    }
  }
  for (int h = 0; h < r.num_qo_heads; h++) {
    float* m = top + h * BLOCK_PAGES;
    // log(1) is 0: what was not scored stays what it is.
    for (int i = 0; i < block.size(); i += LANES)
      storeu(m + i, loadu<F>(m + i) + log(loadu<F>(sum + h * BLOCK_PAGES + i)));
    store_estimates(log_mass + (int64_t)h * r.max_pages, m, block.size());
  }
}

}  // namespace
}  // namespace psa

extern "C" int psa_sketch_score(PsaSketchScoreArgs* args) {
  using namespace psa;
  PsaRows& r = args->rows;
  if (const int status = check_rows(r, args->active)) return status;
  const std::vector<PageBlock> blocks = page_blocks(r, args->active);
  const int count = (int)blocks.size();
  const Scorer scorer(*args);
  const PageMass* mass = choose(scorer);
  const bool known = with_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; i++) score_block<T>(scorer, mass, blocks[i], scratch);
    }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
