// Attention of many rows over keys that lie one behind the other, in tiles with an online softmax
// (FlashAttention, arXiv 2205.14135).
#include "prefill_words.h"
#include "scratch.h"
#include "vecmath.h"

namespace psa {
namespace {

// Keys that are packed together, most rows that share them, and rows whose logits stay in a cache.
constexpr int64_t KEYS = 256;
constexpr int64_t ROWS = 768;
constexpr int64_t PART = 48;
static_assert(PART % TILE_ROWS == 0 && ROWS % PART == 0 && KEYS % PANEL == 0);

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

// Up to `rows` rows of a KV head: row r is head r % group of its group, of token r / group.
template <class T>
class Tile {
 public:
  Tile(const PsaPrefillArgs& a, int64_t head, int64_t begin, int64_t rows, Scratch& scratch)
      : a_(a), head_(head), begin_(begin) {
    count_ = std::min(rows, a.tokens * a.group - begin);
    steps_ = words<T>(a.head_dim);
    dim_ = round_up(a.head_dim, LANES);
    const int64_t values = round_up(a.head_dim, PANEL) * words<T>(KEYS);
    scratch.reset(Scratch::need<uint32_t>(ROWS * steps_) + Scratch::need<uint32_t>(KEYS * steps_) +
                  Scratch::need<uint32_t>(values) + Scratch::need<float>(PART * KEYS) +
                  Scratch::need<float>(ROWS * dim_) + 2 * Scratch::need<float>(ROWS) +
                  Scratch::need<float>(PART));
    q_ = scratch.take<uint32_t>(ROWS * steps_);
    keys_ = scratch.take<uint32_t>(KEYS * steps_);
    values_ = scratch.take<uint32_t>(values);
    logits_ = scratch.take<float>(PART * KEYS);
    sum_ = scratch.take<float>(ROWS * dim_);
    top_ = scratch.take<float>(ROWS);
    total_ = scratch.take<float>(ROWS);
    shrink_ = scratch.take<float>(PART);
  }

  void attend() {
    start();
    const int64_t seen = a_.causal ? token(count_ - 1) + 1 : a_.keys;
    const int64_t ahead = (KEYS * PART + count_ - 1) / count_;  // keys, while a part is attended
    for (int64_t first = 0; first < seen; first += KEYS) {
      const int64_t count = std::min(KEYS, seen - first);
      pack_keys(key(first), a_.k_token, count, a_.head_dim, keys_);
      pack_values(value(first), a_.v_token, count, a_.head_dim, values_);
      int64_t next = first + KEYS;
      const int64_t last = std::min(seen, next + KEYS);
      for (int64_t row = 0; row < count_; row += PART) {
        for (const int64_t end = std::min(last, next + ahead); next < end; next++) {
          prefetch_range(key(next), a_.head_dim * sizeof(T));
          prefetch_range(value(next), a_.head_dim * sizeof(T));
        }
        part(row, first, count);
      }
    }
    finish();
  }

 private:
  const T* key(int64_t i) const {
    return static_cast<const T*>(a_.k) + head_ * a_.k_head + i * a_.k_token;
  }
  const T* value(int64_t i) const {
    return static_cast<const T*>(a_.v) + head_ * a_.v_head + i * a_.v_token;
  }
  int64_t token(int64_t row) const { return (begin_ + row) / a_.group; }
  int64_t rows_of(int64_t row) const { return std::min(PART, count_ - row); }
  int64_t place(int64_t row) const {  // of its state in the results
    return token(row) * a_.num_kv_heads * a_.group + head_ * a_.group + (begin_ + row) % a_.group;
  }
  // Keys of a block that a row sees.
  int64_t visible(int64_t row, int64_t first, int64_t count) const {
    return a_.causal ? std::clamp<int64_t>(token(row) + 1 - first, 0, count) : count;
  }

  void start() {
    for (int64_t r = 0; r < round_up(count_, TILE_ROWS); r++) {
      uint32_t* q = q_ + r * steps_;
      float* sum = sum_ + r * dim_;
      std::fill(sum, sum + dim_, 0.0f);
      if (r >= count_) {
        std::fill(q, q + steps_, 0);
        continue;
      }
      const int64_t head = head_ * a_.group + (begin_ + r) % a_.group;
      to_words(static_cast<const T*>(a_.q) + token(r) * a_.q_token + head * a_.q_head, a_.head_dim,
               q);
      const float before = a_.lse[place(r)];
      top_[r] = before * LOG2_E;
      total_[r] = before == -INF ? 0.0f : 1.0f;
      if (total_[r] != 0) std::memcpy(sum, a_.out + place(r) * a_.head_dim, a_.head_dim * 4);
    }
  }

  // Rows [row, row + PART) over the packed keys.
  void part(int64_t row, int64_t first, int64_t count) {
    const int64_t rows = rows_of(row), seen = visible(row + rows - 1, first, count);
    if (!seen) return;
    for (int64_t key = 0; key < seen; key += PANEL)
      with_vectors((std::min<int64_t>(PANEL, seen - key) + LANES - 1) / LANES,
                   [&](auto vectors) { logits<vectors>(row, rows, key); });
    for (int64_t r = 0; r < rows; r++)
      shrink_[r] = weigh(row + r, logits_ + r * KEYS, visible(row + r, first, count), seen);
    const int64_t steps = words<T>(seen), packed = words<T>(count);
    for (int64_t d = 0; d < dim_; d += PANEL)
      with_vectors((std::min<int64_t>(PANEL, dim_ - d)) / LANES,
                   [&](auto vectors) { add_values<vectors>(row, rows, d, steps, packed); });
  }

  template <int VECTORS>
  __attribute__((noinline)) void logits(int64_t row, int64_t rows, int64_t key) {
    const F scale = set1(a_.sm_scale * LOG2_E);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      F sum[TILE_ROWS][VECTORS] = {};
      multiply<PER_WORD<T>, VECTORS>(q_ + (row + r) * steps_, steps_, keys_ + key * steps_, steps_,
                                     sum);
      unrolled<TILE_ROWS>([&](auto i) {
        unrolled<VECTORS>([&](auto v) {
          storeu(logits_ + (r + i) * KEYS + key + v * LANES, sum[i][v] * scale);
        });
      });
    }
  }

  // Logits, which count in powers of two, to weights in their place, 0 for [visible, seen).
  // Returns the factor for what the row has summed.
  float weigh(int64_t row, float* logits, int64_t visible, int64_t seen) {
    if (!visible) {
      std::memset(logits, 0, round_up(seen, LANES) * (4 / PER_WORD<T>));
      return 1.0f;
    }
    for (int64_t i = visible; i < round_up(visible, LANES); i++) logits[i] = -INF;
    F high = set1(-INF);
    for (int64_t i = 0; i < visible; i += LANES) high = max(high, loadu<F>(logits + i));
    const float before = top_[row], top = std::max(before, hmax(high));
    top_[row] = top;
    const auto weight = [&](int64_t i) {
      const F x = loadu<F>(logits + i) - top;
      const F e = exp2(x);
      return x == -INF ? F{} : e;  // exp2 never is 0; NaN stays NaN
    };
    F sum{};
    int64_t i = 0;
    for (; i < visible; i += LANES) {
      const F e = weight(i);
      sum += e;
      store_weights(logits, i, e);
    }
    for (; i < seen; i += LANES) store_weights(logits, i, F{});
    const float shrink = exp2(set1(before - top))[0];
    total_[row] = total_[row] * shrink + hsum(sum);
    return shrink;
  }

  static void store_weights(float* row, int64_t i, F weights) {
#if defined(__AVX512BF16__)
    if constexpr (PER_WORD<T> == 2) {
      storeu(reinterpret_cast<bf16*>(row) + i, (__m256i)_mm512_cvtneps_pbh((__m512)weights));
      return;
    }
#endif
    storeu(row + i, weights);
  }

  template <int VECTORS>
  __attribute__((noinline)) void add_values(int64_t row, int64_t rows, int64_t d, int64_t steps,
                                            int64_t packed) {
    const uint32_t* panel = values_ + d * packed;
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      F sum[TILE_ROWS][VECTORS];
      float* to = sum_ + (row + r) * dim_ + d;
      unrolled<TILE_ROWS>([&](auto i) {
        unrolled<VECTORS>(
            [&](auto v) { sum[i][v] = loadu<F>(to + i * dim_ + v * LANES) * shrink_[r + i]; });
      });
      multiply<PER_WORD<T>, VECTORS>(reinterpret_cast<uint32_t*>(logits_) + r * KEYS, KEYS, panel,
                                     steps, sum);
      unrolled<TILE_ROWS>([&](auto i) {
        unrolled<VECTORS>([&](auto v) { storeu(to + i * dim_ + v * LANES, sum[i][v]); });
      });
    }
  }

  void finish() {
    for (int64_t r = 0; r < count_; r++) {
      if (total_[r] == 0) continue;  // saw no key
      float* out = a_.out + place(r) * a_.head_dim;
      const float* sum = sum_ + r * dim_;
      for (int64_t d = 0; d < a_.head_dim; d++) out[d] = sum[d] / total_[r];
      a_.lse[place(r)] = (top_[r] + std::log2(total_[r])) * LN_2;
    }
  }

  const PsaPrefillArgs& a_;
  const int64_t head_, begin_;
  int64_t count_, steps_, dim_;
  uint32_t *q_, *keys_, *values_;  // operands
  float *logits_, *sum_, *top_, *total_, *shrink_;
};

// Rows of a tile: large ones pack keys less often, several for each thread share the work evenly.
// No row's result depends on it.
int64_t tile_rows(const PsaPrefillArgs& a) {
  int64_t rows = ROWS;
  while (rows > 2 * PART && a.tokens * a.group * a.num_kv_heads < 4 * a.num_threads * rows)
    rows /= 2;
  return rows;
}

template <class T>
int attend(const PsaPrefillArgs& a) {
  const int64_t rows = tile_rows(a), tiles = (a.tokens * a.group + rows - 1) / rows;
  int status = PSA_OK;
#pragma omp parallel for num_threads(a.num_threads) schedule(dynamic, 1) if (a.num_threads > 1)
  for (int64_t i = 0; i < tiles * a.num_kv_heads; i++) {
    static thread_local Scratch scratch;
    // The last tiles, which see most keys, first.
    const int64_t head = i % a.num_kv_heads, tile = tiles - 1 - i / a.num_kv_heads;
    try {
      Tile<T>(a, head, tile * rows, rows, scratch).attend();
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      status = PSA_NO_MEMORY;
    }
  }
  return status;
}

}  // namespace
}  // namespace psa

extern "C" int psa_prefill(PsaPrefillArgs* args) {
  using namespace psa;
  int status = PSA_BAD_DTYPE;
  with_dtype(args->dtype, [&](auto* type) {
    status = attend<std::remove_pointer_t<decltype(type)>>(*args);
  });
  return status;
}
