// Exact attention of query heads over a block of tokens, as an online softmax.
#pragma once

#include "block.h"
#include "elem.h"
#include "vecmath.h"

namespace psa {

// Softmax state of G query heads: what was attended so far is sum(p v) = acc, sum(p) = l, with
// p = exp(logit - m). q is scaled by sm_scale. q and acc hold the elements of a head in the order
// of load_pair; what does not fill a pair follows in plain order.
struct HeadState {
  float *q, *acc, *m, *l;  // [G][D], [G][D], [G], [G]

  static size_t bytes(int group, int dim) {
    return 2 * Scratch::need<float>((size_t)group * dim) + 2 * Scratch::need<float>(group);
  }
  void take(Scratch& s, int group, int dim) {
    q = s.take<float>((size_t)group * dim);
    acc = s.take<float>((size_t)group * dim);
    m = s.take<float>(group);
    l = s.take<float>(group);
  }
  template <class T>
  void start(const T* queries, int64_t head_stride, int group, int dim, float sm_scale) {
    for (int g = 0; g < group; g++) {
      const T* source = queries + g * head_stride;
      float* target = q + g * dim;
      int d = 0;
      for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        const Pair x = load_pair(source + d);
        storeu(target + d, x.first * sm_scale);
        storeu(target + d + LANES, x.second * sm_scale);
      }
      if (d < dim) storeu(target + d, load(source + d) * sm_scale);
      std::memset(acc + g * dim, 0, dim * sizeof(float));
      m[g] = -INF;
      l[g] = 0;
    }
  }
  float log_mass(int g) const { return m[g] + std::log(l[g]); }
};

// Tokens whose values are added before the next head's turn: a head alone has no other to wait for.
constexpr int VALUE_TOKENS_ONE_HEAD = 16, VALUE_TOKENS_ALL_HEADS = 8;
// Rows of at most so many bytes have room in L1 when they come so far ahead; longer ones go to L2,
// as those of a dim of 0 do, which may be any.
constexpr int NEAR_ROW_BYTES = 256;
template <int DT, class T>
constexpr bool IN_L1 = DT != 0 && DT * sizeof(T) <= NEAR_ROW_BYTES;

// logits[g][0 .. 4) of four rows for GB heads; DT = head_dim at compile time or 0. Row stride of
// logits: `pitch`. Meanwhile `next` is brought, a little at every step: requests that come in
// bunches keep the buffers busy that the loads need.
template <int GB, int DT, class T>
inline void dot_four(const T* const (&row)[4], const T* const (&next)[4], const float* q, int dim,
                     float* logits, int pitch) {
  const int D = DT ? DT : dim;
  F sum[GB][4] = {};
  int d = 0;
#pragma GCC unroll 4
  for (; d + 2 * LANES <= D; d += 2 * LANES) {
    Pair key[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      key[u] = load_pair(row[u] + d);
      prefetch_range<IN_L1<DT, T>>(next[u] + d, 2 * LANES * (int)sizeof(T));
    }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const F first = loadu<F>(q + g * D + d), second = loadu<F>(q + g * D + d + LANES);
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) sum[g][u] += first * key[u].first;
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) sum[g][u] += second * key[u].second;
    }
  }
  if (d < D)
    for (int u = 0; u < 4; u++) {
      const F key = load(row[u] + d);
      for (int g = 0; g < GB; g++) sum[g][u] += loadu<F>(q + g * D + d) * key;
    }
  F4 x[GB];
  hsum4(sum, x);
  for (int g = 0; g < GB; g++) storeu(logits + g * pitch, x[g]);
}

// acc[g][d0 .. d0 + NB * LANES) += sum_t weight[g][t] * row[t]; NB is even, or 1 for the
// last vector. at: offset of the head in the rows. `next` is brought, to L1 if NEAR.
template <int GB, int NB, bool NEAR, class T>
inline void add_value_part(const T* const* rows, int64_t at, const T* const* next, int tokens,
                           const float* weights, int pitch, float* acc, int D, int d0) {
  F sum[GB][NB];
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) sum[g][j] = loadu<F>(acc + g * D + d0 + j * LANES);
  for (int t = 0; t < tokens; t++) {
    const T* row = rows[t] + at + d0;
    prefetch_range<NEAR>(next[t] + d0, NB * LANES * (int)sizeof(T));
    F value[NB];
    if constexpr (NB == 1)
      value[0] = load(row);
    else
#pragma GCC unroll 4
      for (int j = 0; j < NB; j += 2) {
        const Pair x = load_pair(row + j * LANES);
        value[j] = x.first;
        value[j + 1] = x.second;
      }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const F w = set1(weights[g * pitch + t]);
#pragma GCC unroll 4
      for (int j = 0; j < NB; j++) sum[g][j] += w * value[j];
    }
  }
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) storeu(acc + g * D + d0 + j * LANES, sum[g][j]);
}

template <int GB, int DT, class T>
inline void add_values(const T* const* rows, int64_t at, const T* const* next, int tokens,
                       const float* weights, int pitch, float* acc, int dim) {
  constexpr bool NEAR = IN_L1<DT, T>;
  const int D = DT ? DT : dim;
  int d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES)
    add_value_part<GB, 4, NEAR>(rows, at, next, tokens, weights, pitch, acc, D, d);
  if constexpr (DT == 0 || DT % (4 * LANES) != 0) {
    if (d + 2 * LANES <= D) {
      add_value_part<GB, 2, NEAR>(rows, at, next, tokens, weights, pitch, acc, D, d);
      d += 2 * LANES;
    }
    if (d < D) add_value_part<GB, 1, NEAR>(rows, at, next, tokens, weights, pitch, acc, D, d);
  }
}

// Raises the maximum of head g to at least `block_max`.
inline void raise_max(HeadState& st, int g, int dim, float block_max) {
  if (!(block_max > st.m[g])) return;
  const float shrink = exp1(st.m[g] - block_max);
  for (int d = 0; d < dim; d += LANES) {
    float* a = st.acc + g * dim + d;
    storeu(a, loadu<F>(a) * shrink);
  }
  st.l[g] *= shrink;
  st.m[g] = block_max;
}

// Turns the logits of heads g .. g + GB into weights exp(logit - m).
template <int GB>
inline void soften(HeadState& st, int g, int dim, float* logits, float* weights, int pitch,
                   int tokens) {
  const int end = padded(tokens);
  F top[4], sum[4];
  for (int i = 0; i < GB; i++) {
    float* row = logits + i * pitch;
    for (int t = tokens; t < end; t++) row[t] = -INF;
    top[i] = loadu<F>(row);
    for (int t = LANES; t < end; t += LANES) top[i] = max(top[i], loadu<F>(row + t));
  }
  for (int i = GB; i < 4; i++) top[i] = top[0];
  const F4 block_max = hmax4(top[0], top[1], top[2], top[3]);
  for (int i = 0; i < GB; i++) {
    const float* row = logits + i * pitch;
    raise_max(st, g + i, dim, block_max[i]);
    const float m = st.m[g + i];
    sum[i] = F{};
    for (int t = 0; t < end; t += LANES) {
      const F w = exp(loadu<F>(row + t) - m);
      storeu(weights + i * pitch + t, w);
      sum[i] += w;
    }
  }
  for (int i = GB; i < 4; i++) sum[i] = sum[0];
  const F4 total = hsum4(sum[0], sum[1], sum[2], sum[3]);
  for (int i = 0; i < GB; i++) st.l[g + i] += total[i];
}

// The log mass of a page of a block, by its logits. place / page_size: page of a token.
template <class T>
inline float faint_page(const Block<T>& b, int page, const float* logits, int page_size) {
  float top = -INF, sum = 0;
  for (int t = 0; t < b.tokens; t++)
    if (b.place[t] / page_size == page) top = std::max(top, logits[t]);
  for (int t = 0; t < b.tokens; t++)
    if (b.place[t] / page_size == page) sum += std::exp(logits[t] - top);
  return top + std::log(sum);
}

// Log masses of the block's pages, of which the last may hold less than `page_size` tokens, for one
// head with weights exp(logit - m).
template <class T>
inline void page_masses(const Block<T>& b, float m, const float* logits, const float* weights,
                        int page_size, float* mass) {
  float sums[BLOCK_TOKENS + LANES] = {};
  if (b.page_tokens && LANES % b.pages == 0) {
    F lanes{};
    for (int t = 0; t < b.tokens; t += LANES) lanes += loadu<F>(weights + t);
    for (int i = 0; i < LANES; i++) sums[i % b.pages] += lanes[i];
  } else {
    for (int t = 0; t < b.tokens; t++) sums[b.place[t] / page_size] += weights[t];
  }
  for (int p = 0; p < b.pages; p += LANES) storeu(mass + p, log(loadu<F>(sums + p)) + m);
  // Far below the running maximum the weights underflow, but the page's own mass must not.
  for (int p = 0; p < b.pages; p++)
    if (!(sums[p] > 1e-17f)) mass[p] = faint_page(b, p, logits, page_size);
}

// Where the log masses of the pages of a block go, [G][pitch], with room for whole vectors; null:
// nobody asks.
struct PageMass {
  float* mass;
  int pitch, page_size;
};

// f(g, count) for query heads g .. g + count, count a compile-time constant, until all are done.
template <class Fn>
inline void for_head_blocks(int group, Fn f) {
  int g = 0;
  for (; g + HEAD_BLOCK <= group; g += HEAD_BLOCK)
    f(g, std::integral_constant<int, HEAD_BLOCK>{});
  if constexpr (HEAD_BLOCK > 2)
    for (; g + 2 <= group; g += 2) f(g, std::integral_constant<int, 2>{});
  for (; g < group; g++) f(g, std::integral_constant<int, 1>{});
}

// Attends the block s.now with the G query heads of each of `heads` KV heads, and brings what
// follows to a cache, the keys of s.ahead at last. st holds the heads one after the other. Tokens
// are outside, KV heads inside: where the pool stores the heads of a token side by side, memory is
// read in order. ONE: there is one KV head, which takes a tenth less time where that is known here.
template <int DT, bool ONE, class T>
__attribute__((noinline)) void attend_block(HeadState& st, int num_heads, int group, int dim,
                                            const BlockSpace<T>& s, const PageMass& wanted) {
  const int heads = ONE ? 1 : num_heads;
  const int D = DT ? DT : dim, tokens = s.now.tokens, pitch = s.pitch;
  const auto distance = [&](int done) { return ONE ? s.ahead_of(done) : AHEAD_ALL_HEADS; };
  constexpr int value_tokens = ONE ? VALUE_TOKENS_ONE_HEAD : VALUE_TOKENS_ALL_HEADS;
  if (ONE) translate(s.ahead, D);
  for (int t = 0; t < tokens; t += 4)
    for (int h = 0; h < heads; h++) {
      const int64_t k_at = h * s.k_head, v_at = h * s.v_head;
      const T *row[4], *next[4];
      const int far = distance(t + 4);
      for (int u = 0; u < 4; u++) {
        // Rows behind the last token repeat it: unused slots are never read.
        row[u] = s.now.k[std::min(t + u, tokens - 1)] + k_at;
        // What is read anyway stands for nothing to fetch.
        const int i = t + u + far;
        next[u] = i < tokens            ? s.now.k[i] + k_at
                  : i - tokens < tokens ? s.now.v[i - tokens] + v_at
                                        : row[u];
      }
      for_head_blocks(group, [&](int g, auto count) {
        const size_t at = (size_t)h * group + g;
        dot_four<count(), DT>(row, g ? row : next, st.q + at * D, dim, s.logits + at * pitch + t,
                              pitch);
      });
    }
  for (int h = 0; h < heads; h++)
    for_head_blocks(group, [&](int g, auto count) {
      const size_t at = (size_t)h * group + g;
      float *logits = s.logits + at * pitch, *weights = s.weights + at * pitch;
      soften<count()>(st, at, D, logits, weights, pitch, tokens);
      for (int i = 0; wanted.mass && i < count(); i++)
        page_masses(s.now, st.m[at + i], logits + i * pitch, weights + i * pitch, wanted.page_size,
                    wanted.mass + (at + i) * wanted.pitch);
    });
  for (int t = 0; t < tokens; t += value_tokens)
    for (int h = 0; h < heads; h++) {
      const int64_t k_at = h * s.k_head, v_at = h * s.v_head;
      const int count = std::min(value_tokens, tokens - t);
      const T* next[VALUE_TOKENS_ONE_HEAD];
      const int far = distance(tokens + t + count);
      for (int u = 0; u < count; u++) {
        const int i = t + u + far;
        next[u] = i < tokens                    ? s.now.v[i] + v_at
                  : i - tokens < s.ahead.tokens ? s.ahead.k[i - tokens] + k_at
                                                : s.now.v[t + u] + v_at;
      }
      for_head_blocks(group, [&](int g, auto size) {
        const size_t at = (size_t)h * group + g;
        add_values<size(), DT>(s.now.v + t, v_at, next, count, s.weights + at * pitch + t, pitch,
                               st.acc + at * D, dim);
      });
    }
}

template <class T>
using AttendBlock = void (*)(HeadState&, int, int, int, const BlockSpace<T>&, const PageMass&);

// The instance for a head_dim, of which common ones have their own, and a number of KV heads.
template <class T>
inline AttendBlock<T> attend_block_for(int dim, int heads) {
  const bool one = heads == 1;
  switch (dim) {
    case 64: return one ? attend_block<64, true, T> : attend_block<64, false, T>;
    case 128: return one ? attend_block<128, true, T> : attend_block<128, false, T>;
  }
  return one ? attend_block<0, true, T> : attend_block<0, false, T>;
}

}  // namespace psa
