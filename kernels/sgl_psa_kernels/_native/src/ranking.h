// Pages in order of key, largest first, ties to the lower page; sorted only as far as asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace psa {

class Ranking {
 public:
  // entries: work space for every page that may be added.
  explicit Ranking(uint64_t* entries) : entries_(entries) {}

  void add(float key, int page) {
    key += 0.0f;  // -0 and +0 tie
    uint32_t u;
    std::memcpy(&u, &key, 4);
    // Order of floats as order of unsigned integers, reversed: the smallest entry comes first.
    u = (u >> 31) ? u : ~(u | 0x80000000u);
    entries_[size_++] = ((uint64_t)u << 32) | (uint32_t)page;
  }
  int size() const { return size_; }

  int operator[](int i) {
    while (i >= sorted_) sort_more();
    return (int)(uint32_t)entries_[i];
  }
  // Page at place i if that part is sorted already, else -1.
  int peek(int i) const { return i < sorted_ ? (int)(uint32_t)entries_[i] : -1; }

 private:
  void sort_more() {
    const int end = std::min(size_, std::max(64, 2 * sorted_));
    if (end < size_) std::nth_element(entries_ + sorted_, entries_ + end, entries_ + size_);
    std::sort(entries_ + sorted_, entries_ + end);
    sorted_ = end;
  }

  uint64_t* entries_;
  int size_ = 0, sorted_ = 0;
};

}  // namespace psa
