// Log masses of pages from key sketches.
//
// s_i = x . (zero_i + scale_i code_i) = zero_i sum(x) + scale_i (x . code_i): one integer dot
// product per token and head; the codes are unpacked once for all heads of the group. Rotated
// sketches store no zero: it is -(2^bits - 1) / 2 scales.
#include "score_rows.h"
#include "sketch_codes.h"

namespace psa {
namespace {

struct Scorer {
  const PsaSketchScoreArgs& a;
  const PsaRows& r;
  const int group, width, vectors, pitch;

  explicit Scorer(const PsaSketchScoreArgs& args)
      : a(args),
        r(args.rows),
        group(r.num_qo_heads / r.num_kv_heads),
        width(r.head_dim * a.bits / 8),
        vectors(num_vectors(width, a.bits)),
        pitch((r.page_size + LANES - 1) / LANES * LANES + 4) {}

  const uint8_t* codes(int page, int head) const {
    return a.codes + ((int64_t)page * r.num_kv_heads + head) * r.page_size * width;
  }
  const uint16_t* affine(int page, int head) const {
    return a.affine + ((int64_t)page * r.num_kv_heads + head) * r.page_size * a.affine_width;
  }
  bool wanted(int row, int page, int head) const {
    return !a.candidates ||
           a.candidates[((int64_t)row * r.num_kv_heads + head) * r.max_pages + page];
  }
};

// dots[g][t] = query g . codes of token t, for all heads of the group. NV: vectors per key at
// compile time, or 0.
template <int BITS, Blocks KIND, int NV>
void dot_codes(const Scorer& s, const ShortQuery* q, const uint8_t* codes, int tokens,
               S* unpacked, float* dots) {
  const int vectors = NV ? NV : s.vectors;
  for (int t = 0; t < tokens; t += 4) {
    S fixed[NV ? 4 * NV : 1];
    S* v = NV ? fixed : unpacked;
    for (int u = 0; u < 4; u++) {
      const uint8_t* packed = codes + (int64_t)std::min(t + u, tokens - 1) * s.width;
      unpack<BITS, KIND>(packed, s.width, [&](int i, S x) { v[u * vectors + i] = x; });
    }
    for (int g = 0; g < s.group; g++) {
      const S* query = reinterpret_cast<const S*>(q[g].shorts);
      I sum[4] = {};
      for (int i = 0; i < vectors; i++)
        for (int u = 0; u < 4; u++) sum[u] += madd(v[u * vectors + i], query[i]);
      const I4 d = hsum4(sum[0], sum[1], sum[2], sum[3]);
      storeu(dots + g * s.pitch + t, __builtin_convertvector(d, F4));
    }
  }
}

// LANES (scale, zero) pairs; pairs behind `count` are not read.
inline void load_affine(const uint16_t* pairs, int count, F& scale, F& zero) {
  U both{};
  if (count >= LANES)
    both = loadu<U>(pairs);
  else
    std::memcpy(&both, pairs, count * 4);
  scale = half_to_float(__builtin_convertvector(both & 0xffffu, H));
  zero = half_to_float(__builtin_convertvector(both >> 16, H));
}

// LANES scales; those behind `count` are not read.
inline F load_scales(const uint16_t* scales, int count) {
  H h{};
  if (count >= LANES)
    h = loadu<H>(scales);
  else
    std::memcpy(&h, scales, count * 2);
  return half_to_float(h);
}

// top[g] and sum[g] such that the page's log mass of head g is top + log(sum).
inline void page_mass(const Scorer& s, const ShortQuery* q, const uint16_t* affine, int tokens,
                      float* dots, float* top, float* sum, int stride) {
  const float middle = -0.5f * (float)((1 << s.a.bits) - 1);
  for (int t = 0; t < tokens; t += LANES) {
    F scale, zero;
    if (s.a.affine_width == 2) {
      load_affine(affine + 2 * t, tokens - t, scale, zero);
    } else {
      scale = load_scales(affine + t, tokens - t);
      zero = scale * middle;
    }
    const I inside = iota() + t < tokens;
    for (int g = 0; g < s.group; g++) {
      float* d = dots + g * s.pitch + t;
      const F logit = loadu<F>(d) * (scale * q[g].step) + zero * q[g].sum;
      storeu(d, inside ? logit : set1(-INF));
    }
  }
  for (int g = 0; g < s.group; g += 4) {
    // Four heads share the steps across lanes; behind the last head the first one is repeated.
    const float* d[4];
    F m[4], e[4];
    for (int i = 0; i < 4; i++) {
      d[i] = dots + (g + i < s.group ? g + i : g) * s.pitch;
      m[i] = loadu<F>(d[i]);
      for (int t = LANES; t < tokens; t += LANES) m[i] = max(m[i], loadu<F>(d[i] + t));
    }
    const F4 largest = hmax4(m[0], m[1], m[2], m[3]);
    for (int i = 0; i < 4; i++) {
      e[i] = exp(loadu<F>(d[i]) - largest[i]);
      for (int t = LANES; t < tokens; t += LANES) e[i] += exp(loadu<F>(d[i] + t) - largest[i]);
    }
    const F4 total = hsum4(e[0], e[1], e[2], e[3]);
    for (int i = 0; i < 4 && g + i < s.group; i++) {
      top[(g + i) * stride] = largest[i];
      sum[(g + i) * stride] = total[i];
    }
  }
}

using DotCodes = void (*)(const Scorer&, const ShortQuery*, const uint8_t*, int, S*, float*);

template <int BITS>
DotCodes dot_codes_for(int width, int vectors) {
  switch (blocks_kind(width)) {
    case Blocks::Full: return vectors == 4 ? dot_codes<BITS, Blocks::Full, 4>
                                           : dot_codes<BITS, Blocks::Full, 0>;
    case Blocks::Half: return vectors == 2 ? dot_codes<BITS, Blocks::Half, 2>
                                           : dot_codes<BITS, Blocks::Half, 0>;
    default: return dot_codes<BITS, Blocks::Partial, 0>;
  }
}

template <class T>
void score_block(const Scorer& s, DotCodes dot, const PageBlock& block, Scratch& scratch) {
  const PsaRows& r = s.r;
  const int heads = r.num_kv_heads, D = r.head_dim;
  const size_t query_shorts = (size_t)s.vectors * SHORTS;
  const size_t cells = (size_t)r.num_qo_heads * BLOCK_PAGES;
  scratch.reset(Scratch::need<ShortQuery>(r.num_qo_heads) +
                Scratch::need<int16_t>(query_shorts * r.num_qo_heads) + Scratch::need<float>(D) +
                Scratch::need<S>(4 * s.vectors) +
                Scratch::need<float>((size_t)s.group * s.pitch) + 2 * Scratch::need<float>(cells));
  ShortQuery* q = scratch.take<ShortQuery>(r.num_qo_heads);
  int16_t* shorts = scratch.take<int16_t>(query_shorts * r.num_qo_heads);
  float* work = scratch.take<float>(D);
  S* unpacked = scratch.take<S>(4 * s.vectors);
  float* dots = scratch.take<float>((size_t)s.group * s.pitch);
  float* top = scratch.take<float>(cells);
  float* sum = scratch.take<float>(cells);

  const T* queries = static_cast<const T*>(r.q) + block.row * r.q_row_stride;
  for (int h = 0; h < r.num_qo_heads; h++) {
    q[h].shorts = shorts + h * query_shorts;
    q[h].set(queries + h * r.q_head_stride, D, s.a.bits, r.sm_scale, work);
  }
  for (size_t i = 0; i < cells; i++) sum[i] = 1;
  const int32_t* pages = pages_of(r, block.row);
  for (int p = block.begin; p < block.end; p++) {
    const int column = p - block.begin;
    if (!covered(r, s.a.watermark, block.row, p)) {
      for (int h = 0; h < r.num_qo_heads; h++) top[h * BLOCK_PAGES + column] = INF;
      continue;
    }
    const int tokens = tokens_in_page(r, block.row, p);
    for (int h = 0; h < heads; h++) {
      const int next = h + 1 == heads ? p + 1 : p, next_head = h + 1 == heads ? 0 : h + 1;
      if (next < block.end && s.wanted(block.row, next, next_head)) {
        prefetch_range(s.codes(pages[next], next_head), (int64_t)r.page_size * s.width);
        prefetch_range(s.affine(pages[next], next_head),
                       (int64_t)r.page_size * 2 * s.a.affine_width);
      }
      const int first = h * s.group;
      if (!s.wanted(block.row, p, h)) {
        for (int g = 0; g < s.group; g++) top[(first + g) * BLOCK_PAGES + column] = -INF;
        continue;
      }
      dot(s, q + first, s.codes(pages[p], h), tokens, unpacked, dots);
      page_mass(s, q + first, s.affine(pages[p], h), tokens, dots,
                top + first * BLOCK_PAGES + column, sum + first * BLOCK_PAGES + column,
                BLOCK_PAGES);
    }
  }
  for (int h = 0; h < r.num_qo_heads; h++) {
    float* m = top + h * BLOCK_PAGES;
    for (int i = 0; i < block.size(); i += LANES)
      storeu(m + i, loadu<F>(m + i) + log(loadu<F>(sum + h * BLOCK_PAGES + i)));
    const int64_t row = (int64_t)block.row * r.num_qo_heads + h;
    store_estimates(s.a.log_mass + row * r.max_pages + block.begin, m, block.size());
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
  const DotCodes dot = args->bits == 1   ? dot_codes_for<1>(scorer.width, scorer.vectors)
                       : args->bits == 2 ? dot_codes_for<2>(scorer.width, scorer.vectors)
                                         : dot_codes_for<4>(scorer.width, scorer.vectors);
  const bool known = with_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; i++) score_block<T>(scorer, dot, blocks[i], scratch);
    }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
