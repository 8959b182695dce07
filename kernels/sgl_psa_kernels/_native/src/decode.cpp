// Entry point of progressive decode over a resident pool.
#include "decode_tasks.h"

namespace psa {
namespace {

template <class T>
void run(const PsaDecodeArgs& a) {
  static thread_local Scratch shared;  // partial results of the dense rows, read by all threads
  const Tasks<T> tasks(a, shared, heads_apart(a));
  const int count = tasks.count(), merges = tasks.merges();
#pragma omp parallel num_threads(a.rows.num_threads) if (a.rows.num_threads > 1 && count > 1)
  {
    static thread_local Scratch own;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; i++) {
      RowPool<T> pool(a, tasks.row(i));
      tasks.run(i, pool, own);
    }
#pragma omp for schedule(static)
    for (int i = 0; i < merges; i++) tasks.merge(i);
  }
}

}  // namespace
}  // namespace psa

extern "C" int psa_progressive_decode(PsaDecodeArgs* args) {
  using namespace psa;
  if (const int status = check_decode(*args)) return status;
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
                           sizeof(PsaSkinnyLinearArgs), sizeof(PsaTierCreateArgs),
                           sizeof(PsaTierRowsArgs), sizeof(PsaTierRowsArgs),
                           sizeof(PsaTierDecodeArgs), sizeof(PsaTierControlArgs),
                           sizeof(PsaSiluAndMulArgs), sizeof(PsaKvWriteArgs),
                           sizeof(PsaPrefillArgs)};
  constexpr int count = sizeof(sizes) / sizeof(sizes[0]);
  return index >= 0 && index < count ? sizes[index] : -1;
}
extern "C" int psa_abi_version(void) { return PSA_ABI_VERSION; }
extern "C" const char* psa_isa(void) { return PSA_ISA; }
