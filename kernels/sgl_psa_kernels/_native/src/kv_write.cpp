// New rows of K and V into the cache of a layer.
#include <cstring>

#include "psa_abi.h"

namespace {

// Writes that are worth another thread, in bytes.
constexpr int64_t LARGE = 1 << 18;

void write_head(const PsaKvWriteArgs& a, int head) {
  const char* k = static_cast<const char*>(a.k) + head * a.k_head;
  const char* v = static_cast<const char*>(a.v) + head * a.v_head;
  char* k_cache = static_cast<char*>(a.k_cache) + head * a.k_cache_head;
  char* v_cache = static_cast<char*>(a.v_cache) + head * a.v_cache_head;
  for (int64_t i = 0; i < a.count; i++) {
    std::memcpy(k_cache + a.slots[i] * a.k_slot, k + i * a.k_row, a.k_bytes);
    std::memcpy(v_cache + a.slots[i] * a.v_slot, v + i * a.v_row, a.v_bytes);
  }
}

}  // namespace

extern "C" int psa_kv_write(PsaKvWriteArgs* args) {
  const PsaKvWriteArgs& a = *args;
  for (int64_t i = 0; i < a.count; i++)
    if (a.slots[i] < 0 || a.slots[i] >= a.num_slots) {
      args->error_index = (int32_t)i;
      return PSA_BAD_SLOT;
    }
  const bool large = a.count * a.num_kv_heads * (a.k_bytes + a.v_bytes) >= LARGE;
  // A head has one thread, so of rows for one slot the last stays.
#pragma omp parallel for num_threads(a.num_threads) schedule(static) if (a.num_threads > 1 && large)
  for (int h = 0; h < a.num_kv_heads; h++) write_head(a, h);
  return PSA_OK;
}
