// Reads memory as fast as the machine can: what every op here is compared with.
#include <cstdint>

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

static constexpr int64_t kAhead = 64;  // lines prefetched ahead

// Exclusive or of all 8-byte words. `words` starts at a cache line and has whole lines only.
extern "C" __attribute__((visibility("default"))) uint64_t stream_read(
    const void* words, int64_t lines, int threads) {
  const Line* p = (const Line*)words;
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : all)
  for (int part = 0; part < threads; part++) {
    const int64_t begin = lines * part / threads, end = lines * (part + 1) / threads;
    Line sum[4] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      for (int j = 0; j < 4; j++) {
        __builtin_prefetch(p + i + j + kAhead, 0, 2);
        sum[j] ^= p[i + j];
      }
    }
    for (; i < end; i++) sum[0] ^= p[i];
    const Line x = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
    for (int j = 0; j < 8; j++) all ^= x[j];
  }
  return all;
}

typedef float Floats __attribute__((vector_size(64)));

// For each of `count` rows of 256 bytes, offsets in `rows`: requests it (prefetch) and multiplies
// 64 vectors of 16 floats that have nothing to do with it (products). Returns something.
extern "C" __attribute__((visibility("default"))) float prefetch_rows(
    const char* memory, const int64_t* rows, int64_t count, int prefetch, int products) {
  Floats sum[16] = {}, factor = {};
  factor += 0.5f;
  for (int64_t i = 0; i < count; i++) {
    if (prefetch)
      for (int line = 0; line < 4; line++) __builtin_prefetch(memory + rows[i] + 64 * line, 0, 2);
    if (products)
#pragma GCC unroll 4
      for (int turn = 0; turn < 4; turn++) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) sum[j] = sum[j] * factor + factor;
#if defined(__AVX512F__)
        // Turns stay apart, in registers.
        for (int j = 0; j < 16; j++) asm volatile("" : "+v"(sum[j]));
#endif
      }
  }
  float all = 0;
  for (int j = 0; j < 16; j++) all += sum[j][0];
  return all;
}

// Exclusive or of the 8-byte words of `count` rows of 256 bytes, offsets in `rows`, each requested
// `ahead` rows before it is read; 0: never.
extern "C" __attribute__((visibility("default"))) uint64_t read_rows(
    const char* memory, const int64_t* rows, int64_t count, int64_t ahead) {
  Line sum[4] = {};
  for (int64_t i = 0; i < count; i++) {
    if (ahead && i + ahead < count)
      for (int j = 0; j < 4; j++)
        __builtin_prefetch(memory + rows[i + ahead] + 64 * j, 0, 2);
    for (int j = 0; j < 4; j++) sum[j] ^= *(const Line*)(memory + rows[i] + 64 * j);
  }
  const Line x = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
  uint64_t all = 0;
  for (int j = 0; j < 8; j++) all ^= x[j];
  return all;
}
