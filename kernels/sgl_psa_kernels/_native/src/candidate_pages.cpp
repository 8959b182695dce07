// Candidate pages: the `count` pages of each row and KV head with the largest share of the estimated
// mass under any query head of the group; of equal shares the lower page.
#include <algorithm>

#include "psa_abi.h"
#include "scratch.h"
#include "vecmath.h"

namespace psa {
namespace {

constexpr int32_t NO_PAGE = INT32_MIN;  // below the key of every share

// Integers in the order of the floats.
inline I key_of(F x) { return (I)x ^ (((I)x >> 31) & 0x7fffffff); }

// LANES estimates as seen by the choice: -inf where there is none that a finer one could replace.
inline F load_usable(const float* x, int count) {
  F v = set1(INF);
  if (count >= LANES)
    v = loadu<F>(x);
  else
    std::memcpy(&v, x, count * 4);
  return v < INF ? v : set1(-INF);
}

inline float log_sum_exp(const float* x, int n) {
  F top = set1(-INF), sum{};
  for (int i = 0; i < n; i += LANES) top = max(top, load_usable(x + i, n - i));
  const float largest = hmax(top);
  if (!(largest > -INF)) return 0;
  for (int i = 0; i < n; i += LANES) sum += exp(load_usable(x + i, n - i) - largest);
  return largest + std::log(hsum(sum));
}

// How many of the keys, padded to whole vectors, are not below `least`.
inline int count_from(const int32_t* keys, int n, int32_t least) {
  I negative{};
  for (int i = 0; i < n; i += LANES) negative += loadu<I>(keys + i) >= least;
  return -hsum4(negative, I{}, I{}, I{})[0];
}

void choose(const PsaCandidateArgs& a, int row, int head, Scratch& scratch) {
  const int group = a.num_qo_heads / a.num_kv_heads, padded = (a.max_pages + LANES - 1) / LANES;
  scratch.reset(Scratch::need<int32_t>((size_t)padded * LANES));
  int32_t* keys = scratch.take<int32_t>((size_t)padded * LANES);
  const int64_t at = (int64_t)row * a.num_kv_heads + head;
  uint8_t* flags = a.candidates + at * a.max_pages;
  std::memset(flags, 0, a.max_pages);
  a.chosen[at] = 0;
  if (!a.active[row]) return;
  const int n = (int)(((int64_t)a.seq_lens[row] + a.page_size - 1) / a.page_size);

  for (int i = 0; i < n; i += LANES) storeu(keys + i, set1i(NO_PAGE));
  for (int g = 0; g < group; g++) {
    const float* x = a.log_mass + (at * group + g) * a.max_pages;
    const float total = log_sum_exp(x, n);
    for (int i = 0; i < n; i += LANES) {
      F v = set1(INF);
      if (n - i >= LANES)
        v = loadu<F>(x + i);
      else
        std::memcpy(&v, x + i, (n - i) * 4);
      const I key = v < INF ? key_of(v - total) : set1i(NO_PAGE), old = loadu<I>(keys + i);
      storeu(keys + i, key > old ? key : old);
    }
  }

  // The largest key that at least `count` pages reach, by bisection.
  const int usable = count_from(keys, n, NO_PAGE + 1), wanted = std::min(a.count, usable);
  int64_t low = (int64_t)NO_PAGE + 1, high = INT32_MAX;
  for (int reach = usable; reach != wanted && low < high;) {
    const int64_t middle = (low + high + 1) >> 1;
    const int found = count_from(keys, n, (int32_t)middle);
    if (found >= wanted) {
      low = middle;
      reach = found;
    } else {
      high = middle - 1;
    }
  }
  int equal = wanted - (low < INT32_MAX ? count_from(keys, n, (int32_t)low + 1) : 0);
  for (int i = 0; i < n; i++)
    flags[i] = keys[i] > low || (keys[i] == low && equal-- > 0);
  a.chosen[at] = wanted;
}

}  // namespace
}  // namespace psa

extern "C" int psa_candidate_pages(PsaCandidateArgs* args) {
  using namespace psa;
  const PsaCandidateArgs& a = *args;
  for (int b = 0; b < a.batch; b++) {
    args->error_index = b;
    if (!a.active[b]) continue;
    if (a.seq_lens[b] < 0 || a.seq_lens[b] > (int64_t)a.max_pages * a.page_size)
      return PSA_BAD_SEQ_LEN;
  }
  const int count = a.batch * a.num_kv_heads;
#pragma omp parallel num_threads(a.num_threads) if (a.num_threads > 1 && count > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; i++) choose(a, i / a.num_kv_heads, i % a.num_kv_heads, scratch);
  }
  return PSA_OK;
}
