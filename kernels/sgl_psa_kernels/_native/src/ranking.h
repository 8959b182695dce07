// Pages in order of key, largest first, ties to the lower page; sorted only as far as asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scratch.h"
#include "simd.h"

namespace psa {

// Keys are logarithms of shares, so few pages have large ones: the ranking takes them from the top
// in bands of equal width, and sorts one band at a time.
class Ranking {
 public:
  static constexpr float LOWEST = -3e38f;  // of a key; -inf is a page that is not ranked

  static size_t bytes(int pages) {
    return Scratch::need<float>(padded(pages)) + Scratch::need<uint64_t>(pages);
  }
  void take(Scratch& s, int pages) {
    pages_ = padded(pages);
    keys_ = s.take<float>(pages_);
    entries_ = s.take<uint64_t>(pages);
  }
  // Room for the key of every page, padded with -inf to LANES before start().
  float* keys() { return keys_; }
  // top: the largest key
  void start(float top) {
    upper_ = INF;
    below_ = top;
    size_ = next_ = 0;
  }

  // Puts `count` more pages in order, as far as there are so many. keep(p): which of the pages
  // p .. p + LANES are still wanted, -1 or 0; one that is not wanted may be dropped for good, as all
  // with keys up to `least` may.
  template <class Keep>
  void prepare(int count, float least, Keep keep) {
    while (size_ - next_ < count && below_ > least) gather(keep);
  }
  int prepared() const { return size_ - next_; }
  // The page `ahead` places behind the next one, ahead < prepared().
  int peek(int ahead) const { return (int)(uint32_t)entries_[next_ + ahead]; }
  float key(int ahead) const {
    const uint32_t u = (uint32_t)(entries_[next_ + ahead] >> 32);
    const uint32_t bits = (u >> 31) ? u : u ^ 0x7fffffffu;
    float key;
    std::memcpy(&key, &bits, 4);
    return key;
  }
  int pop() { return (int)(uint32_t)entries_[next_++]; }

 private:
  static constexpr float BAND = 1.5f, DEEPEST = -80.0f;
  static constexpr int FEW = 64;
  typedef uint64_t W __attribute__((vector_size(LANES * 4)));

  static int padded(int pages) { return (pages + LANES - 1) / LANES * LANES; }

  // Appends the wanted pages with lower < key <= upper_, in order.
  template <class Keep>
  void gather(Keep keep) {
    const float lower = below_ > DEEPEST ? below_ - BAND : -INF;
    const int first = size_;
    F left = set1(-INF);
    for (int p = 0; p < pages_; p += LANES) {
      const F key = loadu<F>(keys_ + p);
      const I below = key <= set1(lower), now = ~below & (key <= set1(upper_));
      left = max(left, below ? key : set1(-INF));
      if (!any(now)) continue;
      for (uint32_t lanes = mask_of(now & keep(p)); lanes; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        entries_[size_++] = entry(keys_[p + i], p + i);
      }
    }
    sort(entries_ + first, size_ - first);
    upper_ = lower;
    below_ = hmax(left);
  }

  // Smallest first; entries differ. Halves until each of a few has its place by the number of those
  // before it: comparing all of them takes no branches.
  static void sort(uint64_t* x, int count) {
    if (count > FEW) {
      std::nth_element(x, x + count / 2, x + count);
      sort(x, count / 2);
      return sort(x + count / 2, count - count / 2);
    }
    uint64_t from[FEW + LANES];
    std::memcpy(from, x, count * sizeof(uint64_t));
    for (int i = 0; i < count; i += LANES / 2) {
      const W mine = loadu<W>(from + i);
      W place{};
      for (int j = 0; j < count; j++) place -= (W)(W{} + from[j] < mine);
      for (int lane = 0; lane < std::min(LANES / 2, count - i); lane++)
        x[place[lane]] = from[i + lane];
    }
  }

  static uint64_t entry(float key, int page) {
    key += 0.0f;  // -0 and +0 tie
    uint32_t u;
    std::memcpy(&u, &key, 4);
    // Order of floats as order of unsigned integers, reversed: the smallest entry comes first.
    u = (u >> 31) ? u : ~(u | 0x80000000u);
    return ((uint64_t)u << 32) | (uint32_t)page;
  }

  float* keys_;
  uint64_t* entries_;
  float upper_, below_;
  int pages_, size_, next_;
};

}  // namespace psa
