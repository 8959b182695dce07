// Validation of a decode call and its division into tasks.
#pragma once

#include <vector>

#include "dense.h"
#include "progressive.h"

namespace psa {

struct Task {
  DenseTask part;            // progressive: one KV head, chunk 0
  const Partials* partials;  // null: progressive
  int64_t work;
};

inline int check_decode(PsaDecodeArgs& a) {
  if (const int status = check_rows(a.rows, nullptr)) return status;
  for (int b = 0; b < a.rows.batch; b++) {
    a.rows.error_index = b;
    if (a.mode[b] < PSA_DENSE || a.mode[b] > PSA_CONSERVATIVE) return PSA_BAD_MODE;
    if (a.threshold[b] != a.threshold[b]) return PSA_BAD_THRESHOLD;
    if (a.mode[b] != PSA_DENSE && !a.log_mass) return PSA_NO_LOG_MASS;
  }
  return PSA_OK;
}

template <class T>
void padding_row(const PsaDecodeArgs& a, int row) {
  const int64_t heads = a.rows.num_qo_heads, first = row * heads;
  T* out = static_cast<T*>(a.out) + first * a.rows.head_dim;
  std::memset(static_cast<void*>(out), 0, heads * a.rows.head_dim * sizeof(T));
  std::fill(a.lse + first, a.lse + first + heads, -INF);
  float* s = stats_of(a, row, 0);
  std::fill(s, s + (int64_t)a.rows.num_kv_heads * PSA_NUM_STATS, 0.0f);
  if (uint8_t* attended = attended_of(a, row, 0))
    std::memset(attended, 0, (size_t)a.rows.num_kv_heads * a.rows.max_pages);
  if (float* residuals = residuals_of(a, first)) std::fill(residuals, residuals + 3 * heads, 0.0f);
}


// The tasks of a call, longest first, so that no thread starts a long task last. Results of padding
// rows are written on the way.
template <class T>
class Tasks {
 public:
  // heads_apart: dense rows are divided by KV heads, too.
  Tasks(const PsaDecodeArgs& a, Scratch& shared, bool heads_apart)
      : a_(a), partials_(a.rows.batch) {
    const PsaRows& r = a.rows;
    size_t bytes = 0;
    for (int b = 0; b < r.batch; b++)
      if (a.mode[b] == PSA_DENSE) bytes += Partials::bytes(r, num_chunks(r, b));
    shared.reset(bytes);
    for (int b = 0; b < r.batch; b++) {
      if (r.seq_lens[b] == 0) {
        padding_row<T>(a, b);
      } else if (a.mode[b] == PSA_DENSE) {
        const int chunks = num_chunks(r, b);
        partials_[b].take(shared, r, chunks);
        const int heads = heads_apart ? 1 : r.num_kv_heads;
        for (int h = 0; h < r.num_kv_heads; h += heads)
          for (int c = 0; c < chunks; c++)
            list_.push_back({{b, c, h, heads}, &partials_[b], (int64_t)chunk_tokens(r) * heads});
        dense_rows_.push_back(b);
      } else {
        for (int h = 0; h < r.num_kv_heads; h++)
          list_.push_back({{b, 0, h, 1}, nullptr, r.seq_lens[b]});
      }
    }
    std::stable_sort(list_.begin(), list_.end(),
                     [](const Task& x, const Task& y) { return x.work > y.work; });
  }

  int count() const { return (int)list_.size(); }
  template <class Pool>
  void run(int i, Pool& pool, Scratch& own) const {
    const Task& t = list_[i];
    if (t.partials)
      dense_chunk<T>(a_, pool, t.part, *t.partials, own);
    else
      Progressive<T, Pool>(a_, pool, t.part.row, t.part.first, own).run();
  }
  int row(int i) const { return list_[i].part.row; }
  int heads(int i) const { return list_[i].part.count; }

  // Once all tasks are done.
  int merges() const { return (int)dense_rows_.size() * a_.rows.num_kv_heads; }
  void merge(int i) const {
    const int b = dense_rows_[i / a_.rows.num_kv_heads];
    merge_chunks<T>(a_, b, i % a_.rows.num_kv_heads, num_chunks(a_.rows, b), partials_[b]);
  }

 private:
  const PsaDecodeArgs& a_;
  std::vector<Task> list_;
  std::vector<Partials> partials_;
  std::vector<int> dense_rows_;
};

}  // namespace psa
