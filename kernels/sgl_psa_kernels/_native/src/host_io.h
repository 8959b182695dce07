// The backing store of a page tier: records of keys and values in memory or in a file.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include <sys/uio.h>
#include <unistd.h>

#include "tier_codec.h"

namespace psa {

// Stateless but for where the bytes are; any thread may call.
class HostIo {
 public:
  // half_bytes: of the keys, or the values, of a page
  HostIo(const PsaTierCreateArgs& a, int64_t half_bytes)
      : memory_(static_cast<char*>(a.host)),
        fd_(a.host_fd),
        record_bytes_(a.record_bytes),
        half_(half_bytes),
        int8_(a.int8_host),
        codec_(a) {}

  bool in_memory() const { return fd_ < 0; }
  // Records are keys and values as frames have them, in memory.
  bool addressable() const { return in_memory() && !int8_; }
  int64_t record_bytes() const { return record_bytes_; }
  // Where a record lies in memory. Values of an addressable one follow its keys.
  char* keys(int64_t record) const { return memory_ + record * record_bytes_; }
  char* values(int64_t record) const { return keys(record) + half_; }

  // False if the transfer failed; `error` says how.
  bool load(int64_t record, void* k, void* v, PsaTierError& error) const {
    if (int8_) {
      const char* bytes = in_memory() ? keys(record) : scratch();
      if (!in_memory() && !transfer(record, scratch(), record_bytes_, nullptr, 0, error, false))
        return false;
      codec_.decode(bytes, k, v);
      return true;
    }
    if (!in_memory()) return transfer(record, k, half_, v, half_, error, false);
    std::memcpy(k, keys(record), half_);
    std::memcpy(v, values(record), half_);
    return true;
  }
  bool save(int64_t record, const void* k, const void* v, PsaTierError& error) const {
    if (int8_) {
      codec_.encode(k, v, in_memory() ? keys(record) : scratch());
      return in_memory() || transfer(record, scratch(), record_bytes_, nullptr, 0, error, true);
    }
    if (!in_memory())
      return transfer(record, const_cast<void*>(k), half_, const_cast<void*>(v), half_, error,
                      true);
    std::memcpy(keys(record), k, half_);
    std::memcpy(values(record), v, half_);
    return true;
  }
  // A page that is full, as an int8 host will give it back.
  void round(void* k, void* v) const {
    codec_.encode(k, v, scratch());
    codec_.decode(scratch(), k, v);
  }

 private:
  // A record of this thread.
  char* scratch() const {
    thread_local std::vector<char> bytes;
    bytes.resize(std::max(bytes.size(), (size_t)record_bytes_));
    return bytes.data();
  }

  // Bytes of two places, one behind the other in the file.
  bool transfer(int64_t record, void* head, int64_t head_bytes, void* tail, int64_t tail_bytes,
                PsaTierError& error, bool writing) const {
    const int64_t begin = record * record_bytes_;
    for (int64_t done = 0; done < head_bytes + tail_bytes;) {
      iovec parts[2] = {{static_cast<char*>(head) + done, (size_t)(head_bytes - done)},
                        {tail, (size_t)tail_bytes}};
      iovec* first = parts;
      if (done >= head_bytes) {
        first = parts + 1;
        *first = {static_cast<char*>(tail) + (done - head_bytes),
                  (size_t)(head_bytes + tail_bytes - done)};
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
        error.bytes = record_bytes_;
        return false;
      }
      done += moved;
    }
    return true;
  }

  char* memory_;
  int fd_;
  int64_t record_bytes_, half_;
  bool int8_;
  PageCodec codec_;
};

}  // namespace psa
