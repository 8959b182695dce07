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
