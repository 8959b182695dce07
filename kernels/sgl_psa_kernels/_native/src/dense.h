// Dense rows: all pages in logical order, in chunks, the KV heads of a page together, one after the
// other, or as tasks of their own, as the pool stores them. Chunks depend on the row's length and the
// model alone, so a row's result depends neither on the other rows nor on the number of threads.
#pragma once

#include "pool.h"

namespace psa {

// Tokens of a chunk for each KV head of the model, and in all: a chunk of one head is as much work
// as SHARE tokens of all, and what it costs to merge is small beside it.
constexpr int CHUNK_SHARE = 512, MOST_CHUNK_TOKENS = 4096;

inline int chunk_tokens(const PsaRows& r) {
  return std::min(CHUNK_SHARE * r.num_kv_heads, MOST_CHUNK_TOKENS);
}
inline int chunk_pages(const PsaRows& r) { return std::max(1, chunk_tokens(r) / r.page_size); }
inline int num_chunks(const PsaRows& r, int row) {
  return (num_pages(r, row) + chunk_pages(r) - 1) / chunk_pages(r);
}

// Unnormalised results of the chunks of one row: acc [chunks][Hq][D], m and l [chunks][Hq].
struct Partials {
  float *acc, *m, *l;

  static size_t bytes(const PsaRows& r, int chunks) {
    const size_t heads = (size_t)chunks * r.num_qo_heads;
    return Scratch::need<float>(heads * r.head_dim) + 2 * Scratch::need<float>(heads);
  }
  void take(Scratch& s, const PsaRows& r, int chunks) {
    const size_t heads = (size_t)chunks * r.num_qo_heads;
    acc = s.take<float>(heads * r.head_dim);
    m = s.take<float>(heads);
    l = s.take<float>(heads);
  }
};

// KV heads first .. first + count of a chunk of a row.
struct DenseTask {
  int row, chunk, first, count;
};

template <class T, class Pool>
void dense_chunk(const PsaDecodeArgs& a, Pool& pool, const DenseTask& task, const Partials& out,
                 Scratch& scratch) {
  const PsaRows& r = a.rows;
  const int D = r.head_dim, group = r.num_qo_heads / r.num_kv_heads, last = task.first + task.count;
  const int step = block_pages(r), block_tokens = step * r.page_size;
  const int together = pool.heads_apart() ? 1 : task.count;
  const AttendBlock<T> attend_block = attend_block_for<T>(D, together);
  const int begin = task.chunk * chunk_pages(r);
  const int count = std::min(num_pages(r, task.row), begin + chunk_pages(r)) - begin;
  scratch.reset(Scratch::need<float>((size_t)task.count * group * D) + Scratch::need<int>(count) +
                BlockSpace<T>::bytes(together * group, block_tokens));
  float* q = scratch.take<float>((size_t)task.count * group * D);
  int* pages = scratch.take<int>(count);
  BlockSpace<T> space;
  space.take(scratch, together * group, block_tokens);
  space.k_head = pool.k_head_stride();
  space.v_head = pool.v_head_stride();
  // The state lives in the chunk's place of the partial results.
  const auto state = [&](int kv_head) {
    const size_t head = (size_t)kv_head * group, at = (size_t)task.chunk * r.num_qo_heads + head;
    return HeadState{q + (kv_head - task.first) * group * D, out.acc + at * D, out.m + at,
                     out.l + at};
  };
  state(task.first)
      .start(pool.q(task.first), r.q_head_stride, task.count * group, D, r.sm_scale);

  for (int p = 0; p < count; p++) pages[p] = begin + p;
  pool.expect(pages, count, nullptr, 0);
  if constexpr (Pool::RESIDENT) pool.fill(space.ahead, pages, std::min(step, count), task.first);
  for (int h = task.first; h < last; h += together) {
    HeadState st = state(h);
    for (int p = 0; p < count; p += step) {
      const int end = std::min(p + step, count);
      // After a head's last block comes the first one of the next.
      const int next = end < count ? end : 0, next_head = end < count ? h : h + together;
      const int next_count = next_head < last ? std::min(step, count - next) : 0;
      pool.need(pages + p, end - p, pages + next, next_count);
      if constexpr (Pool::RESIDENT) {
        std::swap(space.now, space.ahead);
      } else {
        pool.fill(space.now, pages + p, end - p, h);
      }
      pool.fill_next(space.ahead, pages + next, next_count, next_head);
      attend_block(st, together, group, D, space, PageMass{});
      pool.done();
    }
  }
}

// Merges the chunks of one row and KV head by log-sum-exp, in order, and writes the result.
template <class T>
void merge_chunks(const PsaDecodeArgs& a, int row, int kv_head, int chunks, const Partials& in) {
  const PsaRows& r = a.rows;
  const int D = r.head_dim, group = r.num_qo_heads / r.num_kv_heads;
  for (int g = 0; g < group; g++) {
    const int head = kv_head * group + g;
    float* acc = in.acc + (size_t)head * D;
    float m = -INF;
    for (int c = 0; c < chunks; c++) m = std::max(m, in.m[(size_t)c * r.num_qo_heads + head]);
    float l = 0;
    for (int c = 0; c < chunks; c++) {
      const size_t at = (size_t)c * r.num_qo_heads + head;
      const float weight = exp1(in.m[at] - m);
      l += weight * in.l[at];
      for (int d = 0; d < D; d += LANES) {
        const F part = loadu<F>(in.acc + at * D + d) * weight;
        storeu(acc + d, c ? loadu<F>(acc + d) + part : part);
      }
    }
    HeadState st{nullptr, acc, &m, &l};
    const int64_t at = (int64_t)row * r.num_qo_heads + head;
    write_head<T>(a, at, st, 0);
    if (float* residuals = residuals_of(a, at)) std::fill(residuals, residuals + 3, 0.0f);
  }
  float* s = stats_of(a, row, kv_head);
  std::fill(s, s + PSA_NUM_STATS, 0.0f);
  s[PSA_PAGES_ATTENDED] = (float)num_pages(r, row);
  s[PSA_TOKENS_ATTENDED] = (float)r.seq_lens[row];
  s[PSA_ESTIMATED_COVERAGE] = 1;
  if (uint8_t* attended = attended_of(a, row, kv_head)) {
    std::memset(attended, 0, r.max_pages);
    std::memset(attended, 1, num_pages(r, row));
  }
}

}  // namespace psa
