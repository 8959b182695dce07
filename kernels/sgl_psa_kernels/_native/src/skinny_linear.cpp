// x @ weight^T of a few rows x: bound by reading the weights, which are taken as they lie in memory.
#include <algorithm>

#include "scratch.h"
#include "store.h"

namespace psa {
namespace {

constexpr int PAIR = 2 * LANES;
// Weights are asked for this many bytes ahead: rows are contiguous, so each cache line once.
constexpr int64_t AHEAD = 8192;

// Weight rows that share one pass over x, as the registers allow.
template <int M>
constexpr int BLOCK = LANES == 16 ? 2 : M <= 2 ? 2 : 1;

template <int M, int R, class T>
void block(const PsaSkinnyLinearArgs& a, const float* x, int64_t first) {
  const int64_t padded = (a.in_features + PAIR - 1) / PAIR * PAIR;
  const int64_t whole = a.in_features / PAIR * PAIR;
  const T* weight = static_cast<const T*>(a.weight) + first * a.weight_row_stride;
  F even[R][M] = {}, odd[R][M] = {};
  const auto step = [&](int64_t k, auto load_weights) __attribute__((always_inline)) {
    unrolled<R>([&](auto r) {
      const T* w = weight + r * a.weight_row_stride + k;
      __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD, 0, 3);
      if constexpr (sizeof(T) * PAIR > 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD + 64, 0, 3);
      const Pair pair = load_weights(w);
      unrolled<M>([&](auto m) {
        even[r][m] += pair.first * loadu<F>(x + m * padded + k);
        odd[r][m] += pair.second * loadu<F>(x + m * padded + k + LANES);
      });
    });
  };
  for (int64_t k = 0; k < whole; k += PAIR) step(k, [](const T* w) { return load_pair(w); });
  if (whole < a.in_features)
    step(whole, [&](const T* w) {
      T part[PAIR] = {};
      std::memcpy(part, w, (a.in_features - whole) * sizeof(T));
      return load_pair(part);
    });
  unrolled<R>([&](auto r) {
    unrolled<M>([&](auto m) {
      float y = hsum(even[r][m] + odd[r][m]);
      if (a.bias) y += load_part(static_cast<const T*>(a.bias) + first + r, 1)[0];
      store1(static_cast<T*>(a.out) + m * a.out_features + first + r, y);
    });
  });
}

template <int M, class T>
void rows(const PsaSkinnyLinearArgs& a, const float* x, int64_t begin, int64_t end) {
  constexpr int R = BLOCK<M>;
  int64_t n = begin;
  for (; n + R <= end; n += R) block<M, R, T>(a, x, n);
  for (; n < end; n++) block<M, 1, T>(a, x, n);
}

// x as float32, in the order of load_pair, each row padded with zeros to whole pairs.
template <class T>
const float* widened(const PsaSkinnyLinearArgs& a, Scratch& scratch) {
  const int64_t padded = (a.in_features + PAIR - 1) / PAIR * PAIR;
  scratch.reset(Scratch::need<float>(a.rows * padded));
  float* to = scratch.take<float>(a.rows * padded);
  for (int64_t m = 0; m < a.rows; m++)
    for (int64_t k = 0; k < padded; k += PAIR) {
      T part[PAIR] = {};
      const int64_t count = std::min<int64_t>(PAIR, a.in_features - k);
      std::memcpy(part, static_cast<const T*>(a.x) + m * a.x_row_stride + k, count * sizeof(T));
      const Pair pair = load_pair(part);
      storeu(to + m * padded + k, pair.first);
      storeu(to + m * padded + k + LANES, pair.second);
    }
  return to;
}

}  // namespace
}  // namespace psa

extern "C" int psa_skinny_linear(PsaSkinnyLinearArgs* args) {
  using namespace psa;
  const PsaSkinnyLinearArgs& a = *args;
  if (a.rows < 1 || a.rows > PSA_SKINNY_ROWS) return PSA_BAD_ROWS;
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static thread_local Scratch scratch;
    const float* x = widened<T>(a, scratch);
    constexpr int64_t PART = 32;  // weight rows that a thread takes at once
    const int64_t parts = (a.out_features + PART - 1) / PART;
#pragma omp parallel for num_threads(a.num_threads) \
    schedule(static) if (a.num_threads > 1 && parts > 1)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t begin = part * PART, end = std::min(begin + PART, a.out_features);
      unrolled<PSA_SKINNY_ROWS>([&](auto m) {
        if (a.rows == m + 1) rows<m + 1, T>(a, x, begin, end);
      });
    }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
