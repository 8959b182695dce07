// x @ weight^T of a few rows x: bound by reading the weights, which are taken as they lie in memory.
#include <algorithm>

#include "scratch.h"
#include "store.h"

namespace psa {
namespace {

constexpr int PAIR = 2 * LANES;
// Weight rows that a thread takes at once.
constexpr int64_t PART = 32;
// Weights are asked into the second-level cache this many bytes ahead; asked into the first, they
// would take the few buffers through which it is filled.
constexpr int64_t AHEAD = 16384;

// Rows of x with more columns are taken in blocks of so many, which stay in the first-level cache.
template <int M>
constexpr int64_t COLUMNS = M <= 2 ? 8192 / M : M <= 4 ? 2048 : 1024;

// Weight rows that share one pass over x, as the registers allow.
template <int M>
constexpr int GROUP = LANES == 16 ? M == 3 || M == 4 ? 4 : 2 : M <= 2 ? 2 : 1;

inline int64_t padded(int64_t columns) { return (columns + PAIR - 1) / PAIR * PAIR; }

// sum[r][m] += weight row r * row m of x over `count` columns; rows of x are `width` apart.
template <int M, int R, class T>
__attribute__((always_inline)) inline void multiply(const T* weight, int64_t stride, int64_t ahead,
                                                    const float* x, int64_t width, int64_t count,
                                                    F (&sum)[R][M]) {
  const int64_t whole = count / PAIR * PAIR;
  const auto step = [&](int64_t k, auto load_weights) __attribute__((always_inline)) {
    Pair pair[R];
    unrolled<R>([&](auto r) {
      const T* w = weight + r * stride + k;
      prefetch_l2(w + ahead);
      if constexpr (sizeof(T) * PAIR > 64) prefetch_l2(w + ahead + LANES);
      pair[r] = load_weights(w);
    });
    unrolled<M>([&](auto m) {
      const F first = loadu<F>(x + m * width + k);
      unrolled<R>([&](auto r) { sum[r][m] += pair[r].first * first; });
      const F second = loadu<F>(x + m * width + k + LANES);
      unrolled<R>([&](auto r) { sum[r][m] += pair[r].second * second; });
    });
  };
  for (int64_t k = 0; k < whole; k += PAIR) step(k, [](const T* w) { return load_pair(w); });
  if (whole < count)
    step(whole, [&](const T* w) {
      T part[PAIR] = {};
      std::memcpy(part, w, (count - whole) * sizeof(T));
      return load_pair(part);
    });
}

template <int M, int R, class T>
__attribute__((always_inline)) inline void finish(const PsaSkinnyLinearArgs& a, int64_t n,
                                                  const F (&sum)[R][M]) {
  unrolled<R>([&](auto r) {
    const float bias = a.bias ? load_part(static_cast<const T*>(a.bias) + n + r, 1)[0] : 0.0f;
    T* out = static_cast<T*>(a.out) + n + r;
    unrolled<(M + 3) / 4>([&](auto four) {
      constexpr int first = 4 * four, count = std::min(4, M - first);
      const auto row = [&](int i) { return sum[r][first + (i < count ? i : 0)]; };
      const F4 y = hsum4(row(0), row(1), row(2), row(3));
      unrolled<count>([&](int i) { store1(out + (first + i) * a.out_features, y[i] + bias); });
    });
  });
}

// R weight rows from n on.
template <int M, int R, class T>
void whole_rows(const PsaSkinnyLinearArgs& a, const float* x, int64_t n) {
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_row_stride;
  F sum[R][M] = {};
  multiply<M, R, T>(weight, a.weight_row_stride, AHEAD / sizeof(T), x, padded(a.in_features),
                    a.in_features, sum);
  finish<M, R, T>(a, n, sum);
}

// The same for one block of columns from k on; kept: sums [R][M] of the blocks before.
template <int M, int R, class T>
void block(const PsaSkinnyLinearArgs& a, const float* x, int64_t n, int64_t k, F* kept) {
  const int64_t count = std::min(COLUMNS<M>, a.in_features - k);
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_row_stride + k;
  F sum[R][M];
  unrolled<R>([&](auto r) {
    unrolled<M>([&](auto m) { sum[r][m] = k ? kept[r * M + m] : F{}; });
  });
  // The same block of the next part: the weights come in about the order of memory.
  multiply<M, R, T>(weight, a.weight_row_stride, PART * a.weight_row_stride, x + k * M,
                    padded(count), count, sum);
  if (k + count == a.in_features) return finish<M, R, T>(a, n, sum);
  unrolled<R>([&](auto r) { unrolled<M>([&](auto m) { kept[r * M + m] = sum[r][m]; }); });
}

template <int M, class T>
void rows(const PsaSkinnyLinearArgs& a, const float* x, int64_t begin, int64_t end) {
  constexpr int R = GROUP<M>;
  if (a.in_features <= COLUMNS<M>) {
    int64_t n = begin;
    for (; n + R <= end; n += R) whole_rows<M, R, T>(a, x, n);
    for (; n < end; n++) whole_rows<M, 1, T>(a, x, n);
    return;
  }
  F kept[PART * M];
  for (int64_t k = 0; k < a.in_features; k += COLUMNS<M>) {
    int64_t n = begin;
    for (; n + R <= end; n += R) block<M, R, T>(a, x, n, k, kept + (n - begin) * M);
    for (; n < end; n++) block<M, 1, T>(a, x, n, k, kept + (n - begin) * M);
  }
}

// x as float32, in the order of load_pair, by blocks of columns; each row of a block is padded with
// zeros to whole pairs.
template <int M, class T>
const float* widened(const PsaSkinnyLinearArgs& a, Scratch& scratch) {
  const int64_t size = M * padded(a.in_features);
  scratch.reset(Scratch::need<float>(size));
  float* const x = scratch.take<float>(size);
  float* to = x;
  for (int64_t begin = 0; begin < a.in_features; begin += COLUMNS<M>)
    for (int64_t m = 0; m < M; m++) {
      const int64_t end = std::min(begin + COLUMNS<M>, a.in_features);
      for (int64_t k = begin; k < end; k += PAIR, to += PAIR) {
        T part[PAIR] = {};
        const int64_t count = std::min<int64_t>(PAIR, end - k);
        std::memcpy(part, static_cast<const T*>(a.x) + m * a.x_row_stride + k, count * sizeof(T));
        const Pair pair = load_pair(part);
        storeu(to, pair.first);
        storeu(to + LANES, pair.second);
      }
    }
  return x;
}

template <int M, class T>
void product(const PsaSkinnyLinearArgs& a) {
  static thread_local Scratch scratch;
  const float* x = widened<M, T>(a, scratch);
  const int64_t parts = (a.out_features + PART - 1) / PART;
#pragma omp parallel for num_threads(a.num_threads) \
    schedule(static) if (a.num_threads > 1 && parts > 1)
  for (int64_t part = 0; part < parts; part++)
    rows<M, T>(a, x, part * PART, std::min((part + 1) * PART, a.out_features));
}

}  // namespace
}  // namespace psa

extern "C" int psa_skinny_linear(PsaSkinnyLinearArgs* args) {
  using namespace psa;
  const PsaSkinnyLinearArgs& a = *args;
  if (a.rows < 1 || a.rows > PSA_SKINNY_ROWS) return PSA_BAD_ROWS;
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    unrolled<PSA_SKINNY_ROWS>([&](auto m) {
      if (a.rows == m + 1) product<m + 1, T>(a);
    });
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
