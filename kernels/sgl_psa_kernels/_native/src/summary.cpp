// Page summaries per (page, KV head), and their scores. The kinds differ in the vectors they store,
// in this order: mean, variance, box centre, radius or half width; summary_storage.h says how.
#include "elem.h"
#include "score_rows.h"
#include "summary_storage.h"

namespace psa {
namespace {

constexpr bool has_mean(int kind) { return kind != PSA_CUBOID_MEAN && kind != PSA_BOX; }
constexpr bool has_variance(int kind) { return kind == PSA_HYBRID || kind == PSA_GAUSSIAN; }
constexpr bool has_box(int kind) { return kind != PSA_MEAN && kind != PSA_GAUSSIAN; }
constexpr int num_vectors(int kind) {
  return has_mean(kind) + has_variance(kind) + 2 * has_box(kind);
}

// Calls f with the kind as a compile-time constant; false for an unknown kind.
template <class Fn>
bool with_kind(int kind, Fn f) {
  switch (kind) {
    case PSA_HYBRID: f(std::integral_constant<int, PSA_HYBRID>()); return true;
    case PSA_MEAN: f(std::integral_constant<int, PSA_MEAN>()); return true;
    case PSA_GAUSSIAN: f(std::integral_constant<int, PSA_GAUSSIAN>()); return true;
    case PSA_CUBOID_MEAN: f(std::integral_constant<int, PSA_CUBOID_MEAN>()); return true;
    case PSA_BOX: f(std::integral_constant<int, PSA_BOX>()); return true;
  }
  return false;
}

// LANES dimensions, from d on, of the vectors [vectors][dim] of a page; of a box its ends.
template <int KIND, class T>
void summarise(const T* keys, int64_t stride, int tokens, float* vectors, int dim, int d) {
  F sum{}, low = load(keys + d), high = low;
  for (int t = 0; t < tokens; t++) {
    const F x = load(keys + t * stride + d);
    sum += x;
    low = min(low, x);
    high = max(high, x);
  }
  float* out = vectors + d;
  if constexpr (KIND == PSA_BOX) {
    // 0, or NaN if a key is no number, which comparisons skip.
    const F finite = sum - sum;
    storeu(out, low + finite);
    storeu(out + dim, high + finite);
    return;
  }
  const float inverse = 1.0f / tokens;
  const F mean = sum * inverse, centre = (low + high) * 0.5f;
  F square{}, distance{};
  for (int t = 0; t < tokens; t++) {
    const F x = load(keys + t * stride + d);
    square += (x - mean) * (x - mean);
    distance += abs(x - centre);
  }
  if constexpr (has_mean(KIND)) storeu(out, mean);
  if constexpr (has_variance(KIND)) storeu(out + dim, square * inverse);
  if constexpr (has_box(KIND)) {
    float* box = out + (num_vectors(KIND) - 2) * dim;
    storeu(box, centre);
    storeu(box + dim, distance * inverse);
  }
}

// Stores the vectors of a page, which are overwritten; spare: dim floats.
template <int KIND>
void store(const PsaSummaryUpdateArgs& a, int64_t record, float* vectors, float* spare) {
  constexpr int VECTORS = num_vectors(KIND);
  const int dim = a.head_dim;
  if (a.affine) {
    uint8_t* codes = static_cast<uint8_t*>(a.summary) + record * VECTORS * dim;
    uint16_t* affine = a.affine + record * VECTORS * 2;
    if constexpr (KIND == PSA_BOX)
      store_box_bytes(vectors, vectors + dim, dim, spare, codes, affine);
    else
      for (int v = 0; v < VECTORS; v++)
        store_bytes<false>(vectors + v * dim, dim, codes + v * dim, affine + 2 * v);
  } else {
    uint16_t* words = static_cast<uint16_t*>(a.summary) + record * VECTORS * dim;
    if constexpr (KIND == PSA_BOX)
      store_box_words(vectors, vectors + dim, dim, words);
    else
      store_words(vectors, VECTORS * dim, words);
  }
}

// Estimates of GB heads for one page, with x and x^2 / 2 of each head behind each other. first:
// x . mean + half . variance, or for kinds without a mean x . centre + |x| . radius; second: the
// latter, for hybrid.
template <int KIND, int GB, class Vectors>
inline void estimates(const Vectors& summary, const float* x, int D, float* first, float* second,
                      int stride) {
  constexpr bool BOTH = KIND == PSA_HYBRID;
  constexpr int BOX = num_vectors(KIND) - 2;
  F a[GB] = {}, b[GB] = {};
  for (int d = 0; d < D; d += LANES) {
    F mean{}, variance{}, centre{}, radius{};
    if constexpr (has_mean(KIND)) mean = summary.at(0, d);
    if constexpr (has_variance(KIND)) variance = summary.at(1, d);
    if constexpr (has_box(KIND)) {
      centre = summary.at(BOX, d);
      radius = summary.at(BOX + 1, d);
    }
    for (int g = 0; g < GB; g++) {
      const F v = loadu<F>(x + 2 * g * D + d);
      if constexpr (has_mean(KIND)) a[g] += v * mean;
      if constexpr (has_variance(KIND)) a[g] += loadu<F>(x + (2 * g + 1) * D + d) * variance;
      if constexpr (has_box(KIND)) (BOTH ? b : a)[g] += v * centre + abs(v) * radius;
    }
  }
  for (int g = 0; g < GB; g += 2) {
    const int other = g + 1 < GB ? g + 1 : g;
    const F4 s = hsum4(a[g], b[g], a[other], b[other]);
    first[g * stride] = s[0];
    first[other * stride] = s[2];
    if constexpr (BOTH) {
      second[g * stride] = s[1];
      second[other * stride] = s[3];
    }
  }
}

template <int KIND, class T, class Vectors>
void score_block(const PsaSummaryScoreArgs& a, const PageBlock& block, Scratch& scratch) {
  const PsaRows& r = a.rows;
  const int heads = r.num_kv_heads, D = r.head_dim, group = r.num_qo_heads / heads;
  const size_t cells = (size_t)r.num_qo_heads * BLOCK_PAGES;
  scratch.reset(Scratch::need<float>((size_t)2 * r.num_qo_heads * D) +
                2 * Scratch::need<float>(cells) + Scratch::need<float>(BLOCK_PAGES));
  float* x = scratch.take<float>((size_t)2 * r.num_qo_heads * D);
  float* primary = scratch.take<float>(cells);
  float* secondary = scratch.take<float>(cells);
  float* log_tokens = scratch.take<float>(BLOCK_PAGES);
  std::fill(primary, primary + cells, 0.0f);
  std::fill(secondary, secondary + cells, 0.0f);
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
    return Vectors(a.summary, a.affine, (int64_t)page * heads + head, D);
  };
  for (int p = block.begin; p < block.end; p++) {
    const int column = p - block.begin;
    if (!covered(r, a.watermark, block.row, p)) {
      for (int h = 0; h < r.num_qo_heads; h++) primary[h * BLOCK_PAGES + column] = INF;
      continue;
    }
    log_tokens[column] = std::log((float)tokens_in_page(r, block.row, p));
    for (int h = 0; h < heads; h++) {
      const bool last = h + 1 == heads;
      if (!last || p + 1 < block.end)
        prefetch_range(record(pages[last ? p + 1 : p], last ? 0 : h + 1).data(),
                       Vectors::bytes(D));
      const Vectors summary = record(pages[p], h);
      for (int g = 0; g < group;) {
        const int head = h * group + g;
        const float* query = x + (size_t)2 * head * D;
        float* e = primary + head * BLOCK_PAGES + column;
        float* c = secondary + head * BLOCK_PAGES + column;
        if (g + HEAD_BLOCK <= group) {
          estimates<KIND, HEAD_BLOCK>(summary, query, D, e, c, BLOCK_PAGES);
          g += HEAD_BLOCK;
        } else {
          estimates<KIND, 1>(summary, query, D, e, c, BLOCK_PAGES);
          g++;
        }
      }
    }
  }
  for (int h = 0; h < r.num_qo_heads; h++) {
    float* e = primary + h * BLOCK_PAGES;
    for (int i = 0; i < block.size(); i += LANES) {
      F first = loadu<F>(e + i);
      if constexpr (KIND != PSA_CUBOID_MEAN) first += loadu<F>(log_tokens + i);
      if constexpr (KIND != PSA_HYBRID) {
        storeu(e + i, first);
        continue;
      }
      const F second = loadu<F>(secondary + h * BLOCK_PAGES + i);
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
  bool known_kind = false;
  const bool known = with_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    known_kind = with_kind(args->kind, [&](auto kind) {
      constexpr int VECTORS = num_vectors(kind.value);
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
      {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < count; i++) {
          if (args->affine)
            score_block<kind.value, T, ByteVectors<VECTORS>>(*args, blocks[i], scratch);
          else
            score_block<kind.value, T, WordVectors<VECTORS>>(*args, blocks[i], scratch);
        }
      }
    });
  });
  return !known ? PSA_BAD_DTYPE : known_kind ? PSA_OK : PSA_BAD_KIND;
}

extern "C" int psa_summary_update(PsaSummaryUpdateArgs* args) {
  using namespace psa;
  const PsaSummaryUpdateArgs& a = *args;
  for (int64_t i = 0; i < a.count; i++) {
    args->error_index = i;
    if (a.pages[i] < 0 || a.pages[i] >= a.num_pages) return PSA_BAD_PAGE;
    if (a.fill[i] < 1 || a.fill[i] > a.page_size) return PSA_BAD_FILL;
  }
  bool known_kind = false;
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    known_kind = with_kind(a.kind, [&](auto kind) {
      constexpr int VECTORS = num_vectors(kind.value);
#pragma omp parallel num_threads(a.num_threads) if (a.num_threads > 1 && a.count >= 4)
      {
        static thread_local Scratch scratch;
        scratch.reset(Scratch::need<float>((VECTORS + 1) * a.head_dim));
        float* vectors = scratch.take<float>((VECTORS + 1) * a.head_dim);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.count; i++)
          for (int h = 0; h < a.num_kv_heads; h++) {
            const T* keys = static_cast<const T*>(a.k) +
                            a.pages[i] * a.page_size * a.k_token_stride + h * a.k_head_stride;
            for (int d = 0; d < a.head_dim; d += LANES)
              summarise<kind.value>(keys, a.k_token_stride, a.fill[i], vectors, a.head_dim, d);
            store<kind.value>(a, a.pages[i] * a.num_kv_heads + h, vectors,
                              vectors + VECTORS * a.head_dim);
          }
      }
    });
  });
  return !known ? PSA_BAD_DTYPE : known_kind ? PSA_OK : PSA_BAD_KIND;
}
