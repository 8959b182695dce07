// Exact attention of query heads over a block of tokens, as an online softmax.
#pragma once

#include "elem.h"
#include "scratch.h"
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

// Pages are attended in blocks of about this many tokens, to spread the cost of a softmax step.
constexpr int BLOCK_TOKENS = 64;

// Where the rows of a page begin, for the first KV head.
template <class T>
struct PageRows {
  const T *k, *v;
  int tokens;
};

// K and V rows, for the first KV head, of the tokens that are attended together, in the order in
// which they are read: a row of each page in turn. Pages lie apart, and several places of memory
// are read at once faster than one after the other. place: where the logit of a row belongs, so
// that those of a page follow each other.
template <class T>
struct Block {
  const T **k, **v;
  int16_t* place;
  int tokens;

  // k_step, v_step: strides from one token to the next
  void fill(const PageRows<T>* pages, int count, int64_t k_step, int64_t v_step) {
    int longest = 0;
    for (int i = 0; i < count; i++) longest = std::max(longest, pages[i].tokens);
    tokens = 0;
    for (int t = 0; t < longest; t++)
      for (int i = 0, first = 0; i < count; first += pages[i++].tokens)
        if (t < pages[i].tokens) {
          k[tokens] = pages[i].k + t * k_step;
          v[tokens] = pages[i].v + t * v_step;
          place[tokens++] = (int16_t)(first + t);
        }
    // Logits are computed by fours.
    for (int t = tokens; t % 4; t++) place[t] = (int16_t)t;
  }
};

// Tokens whose values are added before the next head's turn: a head alone has no other to wait for.
constexpr int VALUE_TOKENS_ONE_HEAD = 16, VALUE_TOKENS_ALL_HEADS = 8;
// Distance in tokens between what is attended and what is brought to L2, first keys, then values,
// then the next block's keys. A row takes about a tenth of the latency of memory.
constexpr int AHEAD_ONE_HEAD = 32, AHEAD_ALL_HEADS = 8;

inline int padded(int tokens) { return (tokens + LANES - 1) / LANES * LANES; }

// Row pointers of a block and results of its tokens for `heads` query heads in all.
template <class T>
struct BlockSpace {
  Block<T> now, ahead;     // ahead: the block that is likely to follow
  int64_t k_head, v_head;  // strides from one KV head to the next
  float *logits, *weights;
  int pitch;

  static size_t bytes(int heads, int tokens) {
    return 4 * Scratch::need<const T*>(tokens) + 2 * Scratch::need<int16_t>(tokens + 3) +
           2 * Scratch::need<float>((size_t)heads * pitch_of(tokens));
  }
  void take(Scratch& s, int heads, int tokens) {
    pitch = pitch_of(tokens);
    for (Block<T>* b : {&now, &ahead}) {
      b->k = s.take<const T*>(tokens);
      b->v = s.take<const T*>(tokens);
      b->place = s.take<int16_t>(tokens + 3);
      b->tokens = 0;
    }
    logits = s.take<float>((size_t)heads * pitch);
    weights = s.take<float>((size_t)heads * pitch);
  }
  static int pitch_of(int tokens) { return padded(tokens) + 16; }
};

template <class T>
inline void prefetch_row(const T* row, int dim) {
  prefetch_range(row, dim * (int)sizeof(T));
}

// Has the addresses of a block translated. A prefetch that has to wait for a translation keeps the
// arithmetic behind it waiting, too; side by side such prefetches wait together. The rows named are
// the first ones of all pages of memory where a head's rows follow each other.
template <class T>
inline void translate(const Block<T>& b, int dim) {
  int rows = 1;
  while (2 * rows * dim * (int)sizeof(T) <= 4096) rows *= 2;
  for (int t = 0; t < b.tokens; t++)
    if (!(b.place[t] & (rows - 1))) {
      prefetch_l2(b.k[t]);
      prefetch_l2(b.v[t]);
    }
}

// logits[g][place[0 .. 4)] of four rows for GB heads; DT = head_dim at compile time or 0. Row
// stride of logits: `pitch`. Meanwhile `next` goes to L2, a little at every step: requests that
// come in bunches keep the buffers busy that the loads need.
template <int GB, int DT, class T>
inline void dot_four(const T* const (&row)[4], const T* const (&next)[4], const float* q, int dim,
                     const int16_t* place, float* logits, int pitch) {
  const int D = DT ? DT : dim;
  F sum[GB][4] = {};
  int d = 0;
#pragma GCC unroll 4
  for (; d + 2 * LANES <= D; d += 2 * LANES) {
    Pair key[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      key[u] = load_pair(row[u] + d);
      prefetch_range(next[u] + d, 2 * LANES * (int)sizeof(T));
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
  for (int g = 0; g < GB; g++) {
    const F4 x = hsum4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
    for (int u = 0; u < 4; u++) logits[g * pitch + place[u]] = x[u];
  }
}

// acc[g][d0 .. d0 + NB * LANES) += sum_t weight[g][place[t]] * row[t]; NB is even, or 1 for the
// last vector. at: offset of the head in the rows. `next` goes to L2.
template <int GB, int NB, class T>
inline void add_value_part(const T* const* rows, int64_t at, const T* const* next, int tokens,
                           const int16_t* place, const float* weights, int pitch, float* acc, int D,
                           int d0) {
  F sum[GB][NB];
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) sum[g][j] = loadu<F>(acc + g * D + d0 + j * LANES);
  for (int t = 0; t < tokens; t++) {
    const T* row = rows[t] + at + d0;
    prefetch_range(next[t] + d0, NB * LANES * (int)sizeof(T));
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
      const F w = set1(weights[g * pitch + place[t]]);
#pragma GCC unroll 4
      for (int j = 0; j < NB; j++) sum[g][j] += w * value[j];
    }
  }
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) storeu(acc + g * D + d0 + j * LANES, sum[g][j]);
}

template <int GB, int DT, class T>
inline void add_values(const T* const* rows, int64_t at, const T* const* next, int tokens,
                       const int16_t* place, const float* weights, int pitch, float* acc, int dim) {
  const int D = DT ? DT : dim;
  int d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES)
    add_value_part<GB, 4>(rows, at, next, tokens, place, weights, pitch, acc, D, d);
  if constexpr (DT == 0 || DT % (4 * LANES) != 0) {
    if (d + 2 * LANES <= D) {
      add_value_part<GB, 2>(rows, at, next, tokens, place, weights, pitch, acc, D, d);
      d += 2 * LANES;
    }
    if (d < D) add_value_part<GB, 1>(rows, at, next, tokens, place, weights, pitch, acc, D, d);
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

// Sum of x[t .. t + count), f applied to each vector; lanes behind the end are left out.
template <class Fn>
inline float sum_of(const float* x, int count, Fn f) {
  F sum{};
  int t = 0;
  for (; t + LANES <= count; t += LANES) sum += f(loadu<F>(x + t));
  if (t < count) {
    const F last = f(loadu<F>(x + t));
    float tail = 0;
    for (int i = 0; t + i < count; i++) tail += last[i];
    sum[0] += tail;
  }
  return hsum(sum);
}

// The log mass of one page whose weights exp(logit - m) sum to `sum`.
inline float page_log_mass(const float* logits, int tokens, float m, float sum) {
  if (sum > 1e-17f) return m + std::log(sum);
  // Far below the running maximum the weights underflow, but the page's own mass must not.
  float top = -INF;
  for (int t = 0; t < tokens; t++) top = std::max(top, logits[t]);
  const F base = set1(top);
  return top + std::log(sum_of(logits, tokens, [&](F x) { return exp(x - base); }));
}

// Log masses of the block's pages of `page_size` tokens, for heads g .. g + GB.
template <int GB>
inline void page_masses(const HeadState& st, int g, const float* logits, const float* weights,
                        int pitch, int tokens, int page_size, float* mass, int mass_pitch) {
  for (int i = 0; i < GB; i++)
    for (int t = 0, page = 0; t < tokens; t += page_size, page++) {
      const int count = std::min(page_size, tokens - t);
      const float* row = weights + i * pitch + t;
      const float sum = sum_of(row, count, [](F x) { return x; });
      mass[(g + i) * mass_pitch + page] =
          page_log_mass(logits + i * pitch + t, count, st.m[g + i], sum);
    }
}

// Where the log masses of the pages of a block go, [G][pitch]; null: nobody asks.
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
// follows to L2, the keys of s.ahead at last. st holds the heads one after the other. Tokens are
// outside, KV heads inside: where the pool stores the heads of a token side by side, memory is read
// in order.
template <int DT, class T>
__attribute__((noinline)) void attend_block(HeadState& st, int heads, int group, int dim,
                                            const BlockSpace<T>& s, const PageMass& wanted) {
  const int D = DT ? DT : dim, tokens = s.now.tokens, pitch = s.pitch;
  const int distance = heads == 1 ? AHEAD_ONE_HEAD : AHEAD_ALL_HEADS;
  const int value_tokens = heads == 1 ? VALUE_TOKENS_ONE_HEAD : VALUE_TOKENS_ALL_HEADS;
  if (heads == 1) translate(s.ahead, D);
  for (int t = 0; t < tokens; t += 4)
    for (int h = 0; h < heads; h++) {
      const int64_t k_at = h * s.k_head, v_at = h * s.v_head;
      const T *row[4], *next[4];
      for (int u = 0; u < 4; u++) {
        // Rows behind the last token repeat it: unused slots are never read.
        row[u] = s.now.k[std::min(t + u, tokens - 1)] + k_at;
        // What is read anyway stands for nothing to fetch.
        const int i = t + u + distance;
        next[u] = i < tokens            ? s.now.k[i] + k_at
                  : i - tokens < tokens ? s.now.v[i - tokens] + v_at
                                        : row[u];
      }
      for_head_blocks(group, [&](int g, auto count) {
        const size_t at = (size_t)h * group + g;
        dot_four<count(), DT>(row, g ? row : next, st.q + at * D, dim, s.now.place + t,
                              s.logits + at * pitch, pitch);
      });
    }
  for (int h = 0; h < heads; h++)
    for_head_blocks(group, [&](int g, auto count) {
      const size_t at = (size_t)h * group + g;
      float *logits = s.logits + at * pitch, *weights = s.weights + at * pitch;
      soften<count()>(st, at, D, logits, weights, pitch, tokens);
      if (wanted.mass)
        page_masses<count()>(st, at, logits, weights, pitch, tokens, wanted.page_size, wanted.mass,
                             wanted.pitch);
    });
  for (int t = 0; t < tokens; t += value_tokens)
    for (int h = 0; h < heads; h++) {
      const int64_t k_at = h * s.k_head, v_at = h * s.v_head;
      const int count = std::min(value_tokens, tokens - t);
      const T* next[VALUE_TOKENS_ONE_HEAD];
      for (int u = 0; u < count; u++) {
        const int i = t + u + distance;
        next[u] = i < tokens                    ? s.now.v[i] + v_at
                  : i - tokens < s.ahead.tokens ? s.ahead.k[i - tokens] + k_at
                                                : s.now.v[t + u] + v_at;
      }
      for_head_blocks(group, [&](int g, auto size) {
        const size_t at = (size_t)h * group + g;
        add_values<size(), DT>(s.now.v + t, v_at, next, count, s.now.place + t,
                               s.weights + at * pitch, pitch, st.acc + at * D, dim);
      });
    }
}

template <class T>
using AttendBlock = void (*)(HeadState&, int, int, int, const BlockSpace<T>&, const PageMass&);

// The instance for a head_dim; common sizes have their own.
template <class T>
inline AttendBlock<T> attend_block_for(int dim) {
  switch (dim) {
    case 64: return attend_block<64, T>;
    case 128: return attend_block<128, T>;
  }
  return attend_block<0, T>;
}

}  // namespace psa
