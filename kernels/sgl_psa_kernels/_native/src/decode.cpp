// Entry point of progressive decode: validation, tasks, threads.
#include <vector>

#include "dense.h"
#include "progressive.h"

namespace psa {
namespace {

struct Task {
  int row, part;     // part: chunk of a dense row, KV head of the others
  const Partials* partials;  // null: progressive
  int64_t work;
};

int check(PsaDecodeArgs& a) {
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

template <class T>
void run(const PsaDecodeArgs& a) {
  static thread_local Scratch shared;  // partial results of the dense rows, read by all threads
  const PsaRows& r = a.rows;
  std::vector<Partials> partials(r.batch);
  std::vector<Task> tasks;
  std::vector<int> dense_rows;
  size_t bytes = 0;
  for (int b = 0; b < r.batch; b++)
    if (a.mode[b] == PSA_DENSE) bytes += Partials::bytes(r, num_chunks(r, b));
  shared.reset(bytes);
  for (int b = 0; b < r.batch; b++) {
    if (r.seq_lens[b] == 0) {
      padding_row<T>(a, b);
    } else if (a.mode[b] == PSA_DENSE) {
      const int chunks = num_chunks(r, b);
      partials[b].take(shared, r, chunks);
      for (int c = 0; c < chunks; c++)
        tasks.push_back({b, c, &partials[b], (int64_t)CHUNK_TOKENS * r.num_kv_heads});
      dense_rows.push_back(b);
    } else {
      for (int h = 0; h < r.num_kv_heads; h++) tasks.push_back({b, h, nullptr, r.seq_lens[b]});
    }
  }
  // Longest first, so that no thread starts a long task last.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.work > y.work; });
  const int count = (int)tasks.size(), heads = r.num_kv_heads;
  const int merges = (int)dense_rows.size() * heads;
#pragma omp parallel num_threads(r.num_threads) if (r.num_threads > 1 && count > 1)
  {
    static thread_local Scratch own;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; i++) {
      const Task& t = tasks[i];
      if (t.partials)
        dense_chunk<T>(a, t.row, t.part, *t.partials, own);
      else
        Progressive<T>(a, t.row, t.part, own).run();
    }
#pragma omp for schedule(static)
    for (int i = 0; i < merges; i++) {
      const int b = dense_rows[i / heads];
      merge_chunks<T>(a, b, i % heads, num_chunks(r, b), partials[b]);
    }
  }
}

}  // namespace
}  // namespace psa

extern "C" int psa_progressive_decode(PsaDecodeArgs* args) {
  using namespace psa;
  if (const int status = check(*args)) return status;
  try {
    const bool known = with_dtype(args->rows.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      run<T>(*args);
    });
    return known ? PSA_OK : PSA_BAD_DTYPE;
  } catch (const std::bad_alloc&) {
    return PSA_NO_MEMORY;
  }
}

extern "C" int psa_struct_size(int index) {
  constexpr int sizes[] = {sizeof(PsaDecodeArgs), sizeof(PsaSketchScoreArgs),
                           sizeof(PsaSummaryScoreArgs), sizeof(PsaSketchWriteArgs),
                           sizeof(PsaSummaryUpdateArgs), sizeof(PsaCandidateArgs),
                           sizeof(PsaRmsNormArgs), sizeof(PsaRopeArgs),
                           sizeof(PsaSkinnyLinearArgs), sizeof(PsaSiluAndMulArgs)};
  constexpr int count = sizeof(sizes) / sizeof(sizes[0]);
  return index >= 0 && index < count ? sizes[index] : -1;
}
extern "C" int psa_abi_version(void) { return PSA_ABI_VERSION; }
extern "C" const char* psa_isa(void) { return PSA_ISA; }
