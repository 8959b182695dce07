// Memory that a thread keeps between calls, handed out in 64-byte aligned pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace psa {

class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  // Makes room for `bytes`; what was handed out before is void.
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(base_);
    size_ = 0;
    const size_t rounded = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    base_ = static_cast<char*>(std::aligned_alloc(64, rounded));
    if (!base_) throw std::bad_alloc();
    size_ = rounded;
  }
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += need<T>(count);
    return p;
  }
  // Bytes that take<T>(count) uses up.
  template <class T>
  static size_t need(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace psa
