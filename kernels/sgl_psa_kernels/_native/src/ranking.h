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
  // p .. p + LANES are still wanted, -1 or 0; one that is not wanted may be dropped for good.
  template <class Keep>
  void prepare(int count, Keep keep) {
    while (size_ - next_ < count && below_ > -INF) gather(keep);
  }
  int prepared() const { return size_ - next_; }
  // The page `ahead` places behind the next one, ahead < prepared().
  int peek(int ahead) const { return (int)(uint32_t)entries_[next_ + ahead]; }
  int pop() { return (int)(uint32_t)entries_[next_++]; }

 private:
  static constexpr float BAND = 1.5f, DEEPEST = -80.0f;

  static int padded(int pages) { return (pages + LANES - 1) / LANES * LANES; }

  // Appends the wanted pages with lower < key <= upper_, in order.
  template <class Keep>
  void gather(Keep keep) {
    const float lower = below_ > DEEPEST ? below_ - BAND : -INF;
    const int first = size_;
    F left = set1(-INF);
    for (int p = 0; p < pages_; p += LANES) {
      const F key = loadu<F>(keys_ + p);
      const I open = (key <= set1(upper_)) & (key > set1(-INF));
      if (!any(open)) continue;
      const I wanted = open & keep(p), now = wanted & (key > set1(lower));
      left = max(left, (wanted & ~now) ? key : set1(-INF));
      for (uint32_t lanes = mask_of(now); lanes; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        entries_[size_++] = entry(keys_[p + i], p + i);
      }
    }
    std::sort(entries_ + first, entries_ + size_);
    upper_ = lower;
    below_ = hmax(left);
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
