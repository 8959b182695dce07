// The backing store of a page tier: records of keys and values in memory or in a file.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>

#include <sys/uio.h>
#include <unistd.h>

#include "psa_abi.h"

namespace psa {

// Stateless but for where the bytes are; any thread may call.
class HostIo {
 public:
  HostIo(void* memory, int fd, int64_t half_bytes)
      : memory_(static_cast<char*>(memory)), fd_(fd), half_(half_bytes) {}

  bool in_memory() const { return fd_ < 0; }
  // Keys of a record in memory; its values follow.
  char* keys(int64_t record) const { return memory_ + record * 2 * half_; }
  char* values(int64_t record) const { return keys(record) + half_; }

  // False if the transfer failed; `error` says how.
  bool load(int64_t record, void* k, void* v, PsaTierError& error) const {
    if (!in_memory()) return transfer(record, k, v, error, false);
    std::memcpy(k, keys(record), half_);
    std::memcpy(v, values(record), half_);
    return true;
  }
  bool save(int64_t record, const void* k, const void* v, PsaTierError& error) const {
    if (!in_memory())
      return transfer(record, const_cast<void*>(k), const_cast<void*>(v), error, true);
    std::memcpy(keys(record), k, half_);
    std::memcpy(values(record), v, half_);
    return true;
  }

 private:
  bool transfer(int64_t record, void* k, void* v, PsaTierError& error, bool writing) const {
    const int64_t begin = record * 2 * half_;
    for (int64_t done = 0; done < 2 * half_;) {
      iovec parts[2] = {{static_cast<char*>(k) + done, (size_t)(half_ - done)},
                        {v, (size_t)half_}};
      iovec* first = parts;
      if (done >= half_) {
        first = parts + 1;
        *first = {static_cast<char*>(v) + (done - half_), (size_t)(2 * half_ - done)};
      }
      const int count = (int)(parts + 2 - first);
      const ssize_t moved = writing ? pwritev(fd_, first, count, begin + done)
                                    : preadv(fd_, first, count, begin + done);
      if (moved < 0 && errno == EINTR) continue;
      if (moved <= 0) {
        error = {};
        error.code = moved < 0 ? errno : 0;
        error.writing = writing;
        error.offset = begin;
        error.bytes = 2 * half_;
        return false;
      }
      done += moved;
    }
    return true;
  }

  char* memory_;
  int fd_;
  int64_t half_;
};

}  // namespace psa
