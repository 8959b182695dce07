// Exact attention of the G query heads of one KV head over one page, as an online softmax.
#pragma once

#include "elem.h"
#include "scratch.h"
#include "vecmath.h"

namespace psa {

// Softmax state of G query heads: what was attended so far is sum(p v) = acc, sum(p) = l, with
// p = exp(logit - m). q is scaled by sm_scale. q and acc hold the elements of a head in the order of
// load_pair; what does not fill a pair follows in plain order.
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

// K and V of one (page, KV head), and of the one to bring to L2 meanwhile (or null).
template <class T>
struct PageView {
  const T *k, *v;
  int64_t k_stride, v_stride;
  int tokens;
  const T *next_k, *next_v;
};

inline int padded(int tokens) { return (tokens + LANES - 1) / LANES * LANES; }

// logits[g][t] for GB heads; DT = head_dim at compile time or 0. Row stride of logits: `pitch`.
template <int GB, int DT, class T>
inline void dot_keys(const PageView<T>& p, const float* q, int dim, float* logits, int pitch,
                     bool prefetch) {
  const int D = DT ? DT : dim;
  for (int t = 0; t < p.tokens; t += 4) {
    const T* row[4];
    for (int u = 0; u < 4; u++) {
      // Rows behind the last token repeat it: unused slots are never read.
      row[u] = p.k + std::min(t + u, p.tokens - 1) * p.k_stride;
      if (prefetch) prefetch_range(p.next_k + (t + u) * p.k_stride, D * (int)sizeof(T));
    }
    F sum[GB][4] = {};
    int d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES) {
      Pair key[4];
      for (int u = 0; u < 4; u++) key[u] = load_pair(row[u] + d);
      for (int g = 0; g < GB; g++) {
        const F first = loadu<F>(q + g * D + d), second = loadu<F>(q + g * D + d + LANES);
        for (int u = 0; u < 4; u++) sum[g][u] += first * key[u].first;
        for (int u = 0; u < 4; u++) sum[g][u] += second * key[u].second;
      }
    }
    if (d < D)
      for (int u = 0; u < 4; u++) {
        const F key = load(row[u] + d);
        for (int g = 0; g < GB; g++) sum[g][u] += loadu<F>(q + g * D + d) * key;
      }
    for (int g = 0; g < GB; g++)
      storeu(logits + g * pitch + t, hsum4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]));
  }
}

// acc[g][d0 .. d0 + NB * LANES) += sum_t weight[g][t] * v[t]; NB is even, or 1 for the last vector.
template <int GB, int NB, class T>
inline void add_value_block(const PageView<T>& p, const float* weights, int pitch, float* acc,
                            int D, int d0, bool prefetch) {
  F sum[GB][NB];
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) sum[g][j] = loadu<F>(acc + g * D + d0 + j * LANES);
  for (int t = 0; t < p.tokens; t++) {
    const T* row = p.v + t * p.v_stride + d0;
    if (prefetch) prefetch_range(p.next_v + t * p.v_stride, D * (int)sizeof(T));
    F value[NB];
    if constexpr (NB == 1)
      value[0] = load(row);
    else
      for (int j = 0; j < NB; j += 2) {
        const Pair x = load_pair(row + j * LANES);
        value[j] = x.first;
        value[j + 1] = x.second;
      }
    for (int g = 0; g < GB; g++) {
      const F w = set1(weights[g * pitch + t]);
      for (int j = 0; j < NB; j++) sum[g][j] += w * value[j];
    }
  }
  for (int g = 0; g < GB; g++)
    for (int j = 0; j < NB; j++) storeu(acc + g * D + d0 + j * LANES, sum[g][j]);
}

template <int GB, int DT, class T>
inline void add_values(const PageView<T>& p, const float* weights, int pitch, float* acc, int dim,
                       bool prefetch) {
  const int D = DT ? DT : dim;
  int d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES)
    add_value_block<GB, 4>(p, weights, pitch, acc, D, d, prefetch && d == 0);
  if constexpr (DT == 0 || DT % (4 * LANES) != 0) {
    if (d + 2 * LANES <= D) {
      add_value_block<GB, 2>(p, weights, pitch, acc, D, d, prefetch && d == 0);
      d += 2 * LANES;
    }
    if (d < D) add_value_block<GB, 1>(p, weights, pitch, acc, D, d, prefetch && d == 0);
  }
}

inline float sum_exp(const float* logits, int end, float base) {
  F sum{};
  for (int t = 0; t < end; t += LANES) sum += exp(loadu<F>(logits + t) - base);
  return hsum(sum);
}

// Raises the maximum of head g to at least `page_max`.
inline void raise_max(HeadState& st, int g, int dim, float page_max) {
  if (!(page_max > st.m[g])) return;
  const float shrink = exp1(st.m[g] - page_max);
  for (int d = 0; d < dim; d += LANES) {
    float* a = st.acc + g * dim + d;
    storeu(a, loadu<F>(a) * shrink);
  }
  st.l[g] *= shrink;
  st.m[g] = page_max;
}

// Turns the logits of heads g .. g + GB into weights exp(logit - m), and writes the page's own log
// masses if wanted (else null).
template <int GB>
inline void soften(HeadState& st, int g, int dim, float* logits, int pitch, int tokens,
                   float* page_mass) {
  const int end = padded(tokens);
  F top[4], sum[4];
  for (int i = 0; i < GB; i++) {
    float* row = logits + i * pitch;
    for (int t = tokens; t < end; t++) row[t] = -INF;
    top[i] = loadu<F>(row);
    for (int t = LANES; t < end; t += LANES) top[i] = max(top[i], loadu<F>(row + t));
  }
  for (int i = GB; i < 4; i++) top[i] = top[0];
  const F4 page_max = hmax4(top[0], top[1], top[2], top[3]);
  for (int i = 0; i < GB; i++) {
    float* row = logits + i * pitch;
    raise_max(st, g + i, dim, page_max[i]);
    const float m = st.m[g + i];
    // Far below the running maximum the weights underflow, but the page's own mass must not.
    const bool far = m - page_max[i] > 40.0f;
    if (page_mass && far)
      page_mass[g + i] = page_max[i] + std::log(sum_exp(row, end, page_max[i]));
    sum[i] = F{};
    for (int t = 0; t < end; t += LANES) {
      const F w = exp(loadu<F>(row + t) - m);
      storeu(row + t, w);
      sum[i] += w;
    }
  }
  for (int i = GB; i < 4; i++) sum[i] = sum[0];
  const F4 total = hsum4(sum[0], sum[1], sum[2], sum[3]);
  for (int i = 0; i < GB; i++) {
    st.l[g + i] += total[i];
    const bool far = st.m[g + i] - page_max[i] > 40.0f;
    if (page_mass && !far) page_mass[g + i] = st.m[g + i] + std::log(total[i]);
  }
}

template <int GB, int DT, class T>
inline void attend_heads(HeadState& st, int g, int dim, const PageView<T>& p, float* logits,
                         int pitch, bool prefetch, float* page_mass) {
  const int D = DT ? DT : dim;
  dot_keys<GB, DT>(p, st.q + g * D, dim, logits, pitch, prefetch);
  soften<GB>(st, g, D, logits, pitch, p.tokens, page_mass);
  add_values<GB, DT>(p, logits, pitch, st.acc + g * D, dim, prefetch);
}

// Attends one page with all G heads. logits: [HEAD_BLOCK][pitch] floats of work space, pitch >=
// padded(tokens) + 4. page_mass: [G] the page's exact log masses, or null.
template <int DT, class T>
__attribute__((noinline)) void attend_page(HeadState& st, int group, int dim, const PageView<T>& p, float* logits,
                        int pitch, float* page_mass) {
  bool prefetch = p.next_k != nullptr;
  int g = 0;
  for (; g + HEAD_BLOCK <= group; g += HEAD_BLOCK, prefetch = false)
    attend_heads<HEAD_BLOCK, DT>(st, g, dim, p, logits, pitch, prefetch, page_mass);
  if constexpr (HEAD_BLOCK > 2)
    for (; g + 2 <= group; g += 2, prefetch = false)
      attend_heads<2, DT>(st, g, dim, p, logits, pitch, prefetch, page_mass);
  for (; g < group; g++, prefetch = false)
    attend_heads<1, DT>(st, g, dim, p, logits, pitch, prefetch, page_mass);
}

template <class T>
using AttendPage = void (*)(HeadState&, int, int, const PageView<T>&, float*, int, float*);

// The instance for a head_dim; common sizes have their own.
template <class T>
inline AttendPage<T> attend_page_for(int dim) {
  switch (dim) {
    case 64: return attend_page<64, T>;
    case 128: return attend_page<128, T>;
  }
  return attend_page<0, T>;
}

}  // namespace psa
