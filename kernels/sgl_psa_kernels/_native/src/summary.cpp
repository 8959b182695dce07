// Page summaries: mean, variance, box centre and radius per (page, KV head), and their scores.
#include "elem.h"
#include "score_rows.h"

namespace psa {
namespace {

inline void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < LANES; i++) p[i] = to_bf16(x[i]);
}

// Summary of LANES dimensions from d on.
template <class T>
void summarise(const T* keys, int64_t stride, int tokens, uint16_t* summary, int dim, int d) {
  F sum{}, low = load(keys + d), high = low;
  for (int t = 0; t < tokens; t++) {
    const F x = load(keys + t * stride + d);
    sum += x;
    low = min(low, x);
    high = max(high, x);
  }
  const float inverse = 1.0f / tokens;
  const F mean = sum * inverse, centre = (low + high) * 0.5f;
  F square{}, distance{};
  for (int t = 0; t < tokens; t++) {
    const F x = load(keys + t * stride + d);
    square += (x - mean) * (x - mean);
    distance += abs(x - centre);
  }
  store_bf16(summary + d, mean);
  store_bf16(summary + dim + d, square * inverse);
  store_bf16(summary + 2 * dim + d, centre);
  store_bf16(summary + 3 * dim + d, distance * inverse);
}

// Both estimates of GB heads for one page: x . mean + half . variance and x . centre + |x| . radius,
// with half = x^2 / 2 stored behind x.
template <int GB>
inline void estimates(const bf16* summary, const float* x, int D, float* gaussian, float* cuboid,
                      int stride) {
  F first[GB] = {}, second[GB] = {};
  for (int d = 0; d < D; d += LANES) {
    const F mean = load(summary + d), variance = load(summary + D + d);
    const F centre = load(summary + 2 * D + d), radius = load(summary + 3 * D + d);
    for (int g = 0; g < GB; g++) {
      const F v = loadu<F>(x + 2 * g * D + d), half = loadu<F>(x + (2 * g + 1) * D + d);
      first[g] += v * mean + half * variance;
      second[g] += v * centre + abs(v) * radius;
    }
  }
  for (int g = 0; g < GB; g += 2) {
    const int other = g + 1 < GB ? g + 1 : g;
    const F4 s = hsum4(first[g], second[g], first[other], second[other]);
    gaussian[g * stride] = s[0];
    cuboid[g * stride] = s[1];
    gaussian[other * stride] = s[2];
    cuboid[other * stride] = s[3];
  }
}

template <class T>
void score_block(const PsaSummaryScoreArgs& a, const PageBlock& block, Scratch& scratch) {
  const PsaRows& r = a.rows;
  const int heads = r.num_kv_heads, D = r.head_dim, group = r.num_qo_heads / heads;
  const size_t cells = (size_t)r.num_qo_heads * BLOCK_PAGES;
  scratch.reset(Scratch::need<float>((size_t)2 * r.num_qo_heads * D) +
                2 * Scratch::need<float>(cells) + Scratch::need<float>(BLOCK_PAGES));
  float* x = scratch.take<float>((size_t)2 * r.num_qo_heads * D);
  float* gaussian = scratch.take<float>(cells);
  float* cuboid = scratch.take<float>(cells);
  float* log_tokens = scratch.take<float>(BLOCK_PAGES);
  std::fill(gaussian, gaussian + cells, 0.0f);
  std::fill(cuboid, cuboid + cells, 0.0f);
  std::fill(log_tokens, log_tokens + BLOCK_PAGES, std::log((float)r.page_size));

  const T* queries = static_cast<const T*>(r.q) + block.row * r.q_row_stride;
  for (int h = 0; h < r.num_qo_heads; h++)
    for (int d = 0; d < D; d += LANES) {
      const F v = load(queries + h * r.q_head_stride + d) * r.sm_scale;
      storeu(x + (size_t)2 * h * D + d, v);
      storeu(x + (size_t)(2 * h + 1) * D + d, 0.5f * v * v);
    }
  const int32_t* pages = pages_of(r, block.row);
  auto record = [&](int page, int head) {
    return reinterpret_cast<const bf16*>(a.summary) + ((int64_t)page * heads + head) * 4 * D;
  };
  for (int p = block.begin; p < block.end; p++) {
    const int column = p - block.begin;
    if (!covered(r, a.watermark, block.row, p)) {
      for (int h = 0; h < r.num_qo_heads; h++) gaussian[h * BLOCK_PAGES + column] = INF;
      continue;
    }
    log_tokens[column] = std::log((float)tokens_in_page(r, block.row, p));
    for (int h = 0; h < heads; h++) {
      const bool last = h + 1 == heads;
      if (!last || p + 1 < block.end)
        prefetch_range(record(pages[last ? p + 1 : p], last ? 0 : h + 1), D * 8);
      const bf16* summary = record(pages[p], h);
      for (int g = 0; g < group;) {
        const int head = h * group + g;
        const float* query = x + (size_t)2 * head * D;
        float *e = gaussian + head * BLOCK_PAGES + column, *c = cuboid + head * BLOCK_PAGES + column;
        if (g + HEAD_BLOCK <= group) {
          estimates<HEAD_BLOCK>(summary, query, D, e, c, BLOCK_PAGES);
          g += HEAD_BLOCK;
        } else {
          estimates<1>(summary, query, D, e, c, BLOCK_PAGES);
          g++;
        }
      }
    }
  }
  for (int h = 0; h < r.num_qo_heads; h++) {
    float* e = gaussian + h * BLOCK_PAGES;
    for (int i = 0; i < block.size(); i += LANES) {
      const F first = loadu<F>(e + i) + loadu<F>(log_tokens + i);
      const F second = loadu<F>(cuboid + h * BLOCK_PAGES + i);
      const F high = max(first, second), low = min(first, second);
      const F joint = high + log(1.0f + exp(low - high));
      storeu(e + i, (first == first) & (second == second) ? joint : set1(INF));
    }
    const int64_t row = (int64_t)block.row * r.num_qo_heads + h;
    store_estimates(a.log_mass + row * r.max_pages + block.begin, e, block.size());
  }
}

}  // namespace
}  // namespace psa

extern "C" int psa_summary_score(PsaSummaryScoreArgs* args) {
  using namespace psa;
  PsaRows& r = args->rows;
  if (const int status = check_rows(r, args->active)) return status;
  const std::vector<PageBlock> blocks = page_blocks(r, args->active);
  const int count = (int)blocks.size();
  const bool known = with_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; i++) score_block<T>(*args, blocks[i], scratch);
    }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}

extern "C" int psa_summary_update(PsaSummaryUpdateArgs* args) {
  using namespace psa;
  const PsaSummaryUpdateArgs& a = *args;
  for (int64_t i = 0; i < a.count; i++) {
    args->error_index = i;
    if (a.pages[i] < 0 || a.pages[i] >= a.num_pages) return PSA_BAD_PAGE;
    if (a.fill[i] < 1 || a.fill[i] > a.page_size) return PSA_BAD_FILL;
  }
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) num_threads(a.num_threads) \
    if (a.num_threads > 1 && a.count >= 4)
    for (int64_t i = 0; i < a.count; i++)
      for (int h = 0; h < a.num_kv_heads; h++) {
        const T* keys = static_cast<const T*>(a.k) +
                        a.pages[i] * a.page_size * a.k_token_stride + h * a.k_head_stride;
        uint16_t* summary = a.summary + (a.pages[i] * a.num_kv_heads + h) * 4 * a.head_dim;
        for (int d = 0; d < a.head_dim; d += LANES)
          summarise(keys, a.k_token_stride, a.fill[i], summary, a.head_dim, d);
      }
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
