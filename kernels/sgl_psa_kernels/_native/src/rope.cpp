// Rotary position embedding of queries and keys, in place.
#include <algorithm>

#include "store.h"

namespace psa {
namespace {

// Halves: element i pairs with i + half (NeoX); the products are rounded to T, as torch's are.
template <class T>
void rotate_halves(T* x, const T* cos, const T* sin, int half) {
  each_vector(half, [&](int64_t i, auto load, auto store) {
    const F a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, rounded<T>(a * c) - rounded<T>(b * s));
    store(x + half + i, rounded<T>(b * c) + rounded<T>(a * s));
  });
}

// Neighbours: element 2i pairs with 2i + 1 (GPT-J).
template <class T>
void rotate_neighbours(T* x, const T* cos, const T* sin, int half) {
  each_vector(half, [&](int64_t i, auto load, auto store) {
    T even[LANES] = {}, odd[LANES] = {};
    const int n = (int)std::min<int64_t>(LANES, half - i);
    for (int j = 0; j < n; j++) {
      even[j] = x[2 * (i + j)];
      odd[j] = x[2 * (i + j) + 1];
    }
    const F a = psa::load(even), b = psa::load(odd), c = load(cos + i), s = load(sin + i);
    psa::store(even, rounded<T>(a * c) - rounded<T>(b * s));
    psa::store(odd, rounded<T>(b * c) + rounded<T>(a * s));
    for (int j = 0; j < n; j++) {
      x[2 * (i + j)] = even[j];
      x[2 * (i + j) + 1] = odd[j];
    }
    (void)store;
  });
}

template <class T>
void rotate_token(const PsaRopeArgs& a, int64_t token) {
  const int half = a.rotary_dim / 2;
  const T* cos = static_cast<const T*>(a.cos_sin) + a.positions[token] * a.rotary_dim;
  const auto heads = [&](void* base, int64_t row_stride, int count) {
    T* x = static_cast<T*>(base) + token * row_stride;
    for (int h = 0; h < count; h++, x += a.head_dim) {
      if (a.interleaved)
        rotate_neighbours(x, cos, cos + half, half);
      else
        rotate_halves(x, cos, cos + half, half);
    }
  };
  heads(a.q, a.q_row_stride, a.num_qo_heads);
  heads(a.k, a.k_row_stride, a.num_kv_heads);
}

}  // namespace
}  // namespace psa

extern "C" int psa_rope(PsaRopeArgs* args) {
  using namespace psa;
  const PsaRopeArgs& a = *args;
  for (int64_t i = 0; i < a.tokens; i++)
    if (a.positions[i] < 0 || a.positions[i] >= a.max_positions) {
      args->error_index = (int32_t)i;
      return PSA_BAD_POSITION;
    }
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(a.num_threads) \
    schedule(static) if (a.num_threads > 1 && a.tokens >= 16)
    for (int64_t i = 0; i < a.tokens; i++) rotate_token<T>(a, i);
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
