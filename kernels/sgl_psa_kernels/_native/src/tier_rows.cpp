// Tokens into a page tier and out of it.
#include <algorithm>

#include "fiber.h"
#include "tier.h"

namespace psa {
namespace {

constexpr int64_t BUFFER_BYTES = 8 << 20;  // of pages without frame that wait to be saved

// Rows of one page in the layout of a frame.
struct PageRows {
  int heads, page_size;
  int64_t row_bytes;

  char* at(char* page, int head, int token) const {
    return page + ((int64_t)head * page_size + token) * row_bytes;
  }
  // tokens first .. first + count of the page; strides in bytes
  void put(char* page, int first, int count, const char* rows, int64_t token_stride,
           int64_t head_stride) const {
    for (int t = 0; t < count; t++)
      for (int h = 0; h < heads; h++)
        std::memcpy(at(page, h, first + t), rows + t * token_stride + h * head_stride, row_bytes);
  }
  void get(const char* page, int count, char* rows) const {
    for (int t = 0; t < count; t++)
      for (int h = 0; h < heads; h++)
        std::memcpy(rows + ((int64_t)t * heads + h) * row_bytes,
                    at(const_cast<char*>(page), h, t), row_bytes);
  }
};

PageRows page_rows(const PsaTierCreateArgs& a) {
  return {a.num_kv_heads, a.page_size, (int64_t)a.head_dim * a.itemsize};
}

}  // namespace

// Every slot is the token that its page is filled up to, or the first one.
void Tier::check_slots(PsaTierRowsArgs& args) {
  PsaTierError error{};
  int status = PSA_OK;
  int64_t i = 0;
  for (; i < args.count && !status; i++) {
    const int64_t slot = args.index[i], page = slot / a_.page_size;
    error.index = i;
    if (slot < 0 || page >= a_.num_pages) {
      status = PSA_BAD_SLOT;
      break;
    }
    int32_t& filled = simulated_[page];
    if (filled < 0) filled = a_.filled[record_of(args.layer, page)];
    const int offset = (int)(slot % a_.page_size);
    if (offset && offset != filled) {
      error.page = (int32_t)page;
      error.have = filled;
      error.want = offset;
      status = PSA_GAP;
    }
    filled = offset + 1;
  }
  for (int64_t j = 0; j < i; j++) simulated_[args.index[j] / a_.page_size] = -1;
  if (status) throw TierFailure{status, error};
}

void Tier::write(PsaTierRowsArgs& args) {
  {
    const Lock lock(mutex_);
    require_whole();
  }
  check_slots(args);
  for (int64_t i = 0; i < args.count;) {
    const int64_t slot = args.index[i];
    const int start = (int)(slot % a_.page_size);
    int count = 1;
    while (i + count < args.count && start + count < a_.page_size &&
           args.index[i + count] == slot + count)
      count++;
    write_run(args, i, start, count);
    i += count;
  }
}

// Tokens first .. first + count of the call, which lie in one page from its token `start` on.
void Tier::write_run(const PsaTierRowsArgs& args, int64_t first, int start, int count) {
  const PageRows rows = page_rows(a_);
  const int64_t record = record_of(args.layer, args.index[first] / a_.page_size);
  const int64_t size = a_.itemsize;
  Lock lock(mutex_);
  if (start == 0)
    forget(lock, record);
  else
    settle(lock, record);
  int frame = a_.frame_of[record];
  if (start == 0 && count == a_.page_size) {
    frame = take_free(args.layer);
    if (frame < 0) return write_whole(lock, args, first, record);
  } else {
    while (frame < 0 && (frame = take(args.layer)) < 0) {
      if (room(args.layer) < 1) no_frame(args.layer);
      wait(lock);
      require_whole();
    }
  }
  if (a_.frame_of[record] != frame) {
    enter(record, frame);
    if (start) {
      pin(frame);
      load_now(lock, record, frame);
      unpin(frame);
      require_whole();
    }
  }
  a_.filled[record] = start + count;
  a_.busy[frame] = 1;
  lock.unlock();
  rows.put(keys(frame), start, count,
           static_cast<const char*>(args.k) + first * args.k_token_stride * size,
           args.k_token_stride * size, args.k_head_stride * size);
  rows.put(values(frame), start, count,
           static_cast<const char*>(args.v) + first * args.v_token_stride * size,
           args.v_token_stride * size, args.v_head_stride * size);
  const bool full = start + count == a_.page_size;
  const bool rounded = full && a_.int8_host;
  if (rounded) {
    PsaTierError error;
    if (io_.in_memory()) {
      io_.save(record, keys(frame), values(frame), error);
      io_.load(record, keys(frame), values(frame), error);
    } else {
      io_.round(keys(frame), values(frame));
    }
  }
  lock.lock();
  set_open(frame, !full);
  if (rounded && io_.in_memory())
    saved_now(record, frame);
  else if (full)
    start_save(frame);
}

// A whole page that gets no frame.
void Tier::write_whole(Lock& lock, const PsaTierRowsArgs& args, int64_t first, int64_t record) {
  const int64_t size = a_.itemsize;
  const int buffer = io_.in_memory() ? -1 : take_buffer(lock);
  a_.filled[record] = a_.page_size;
  lock.unlock();
  if (!page_ && buffer < 0 && !io_.addressable()) page_.reset(new char[2 * half_bytes_]);
  char* k = buffer >= 0 ? buffers_[buffer].get() : page_ ? page_.get() : io_.keys(record);
  char* v = k + half_bytes_;
  const PageRows rows = page_rows(a_);
  rows.put(k, 0, a_.page_size, static_cast<const char*>(args.k) + first * args.k_token_stride * size,
           args.k_token_stride * size, args.k_head_stride * size);
  rows.put(v, 0, a_.page_size, static_cast<const char*>(args.v) + first * args.v_token_stride * size,
           args.v_token_stride * size, args.v_head_stride * size);
  PsaTierError error;
  if (page_) io_.save(record, k, v, error);
  lock.lock();
  if (buffer < 0) {
    a_.saved[record] = a_.page_size;
    count_[BYTES_SAVED] += io_.record_bytes();
  } else {
    saves_.push_back({record, -1, buffer, a_.page_size});
    wake_copier();
  }
}

int Tier::take_buffer(Lock& lock) {
  while (free_buffers_.empty()) {
    require_whole();
    if ((int64_t)buffers_.size() * 2 * half_bytes_ < BUFFER_BYTES || buffers_.size() < 2) {
      buffers_.emplace_back(new char[2 * half_bytes_]);
      free_buffers_.push_back((int)buffers_.size() - 1);
    } else {
      wait(lock);
    }
  }
  const int buffer = free_buffers_.back();
  free_buffers_.pop_back();
  return buffer;
}

void Tier::gather(PsaTierRowsArgs& args) {
  const PageRows rows = page_rows(a_);
  const int64_t token_bytes = rows.heads * rows.row_bytes;
  std::unique_ptr<char[]> record_bytes;
  Lock lock(mutex_);
  require_whole();
  for (int64_t done = 0, i = 0; done < args.count; i++) {
    const int count = (int)std::min<int64_t>(a_.page_size, args.count - done);
    const int64_t page = args.index[i], record = record_of(args.layer, page);
    if (a_.filled[record] < count) short_page(args.layer, page, a_.filled[record], count);
    int frame = a_.frame_of[record];
    if (frame >= 0 && arriving(frames_[frame])) frame = -1;  // the host has it
    while (frame < 0 && a_.saved[record] < a_.filled[record]) {
      saves_first_++;
      wait(lock);
      saves_first_--;
      require_whole();
    }
    lock.unlock();
    PsaTierError error;
    bool there = true;
    const char *k, *v;
    if (frame >= 0) {
      k = keys(frame), v = values(frame);
    } else if (io_.addressable()) {
      k = io_.keys(record), v = io_.values(record);
    } else {
      if (!record_bytes) record_bytes.reset(new char[2 * half_bytes_]);
      there = io_.load(record, record_bytes.get(), record_bytes.get() + half_bytes_, error);
      k = record_bytes.get(), v = k + half_bytes_;
    }
    if (there) {
      rows.get(k, count, static_cast<char*>(args.k) + done * token_bytes);
      rows.get(v, count, static_cast<char*>(args.v) + done * token_bytes);
    }
    lock.lock();
    if (!there) fail(error);
    require_whole();
    done += count;
  }
}

}  // namespace psa
