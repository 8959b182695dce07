// Loads and saves of a page tier, and the thread that does them.
#include "fiber.h"
#include "tier.h"

namespace psa {

namespace {
constexpr int64_t WAKE_BYTES = 1 << 20;
}

void Tier::fail(const PsaTierError& error) {
  if (!failed_) failure_ = error;
  failed_ = true;
  events_++;
  changed_.notify_all();
}

void Tier::require_whole() const {
  if (failed_) throw TierFailure{PSA_HOST_STORE, failure_};
}

void Tier::short_page(int layer, int64_t page, int have, int want) const {
  PsaTierError error{};
  error.layer = layer;
  error.page = (int32_t)page;
  error.have = have;
  error.want = want;
  throw TierFailure{PSA_SHORT_PAGE, error};
}

void Tier::wait(Lock& lock) {
  sleepers_++;
  event_waiters_++;
  changed_.wait(lock);
  event_waiters_--;
  sleepers_--;
}

// wanted: somebody waits for just this.
void Tier::progress(bool wanted) {
  events_++;
  if (sleepers_ && (wanted || event_waiters_)) changed_.notify_all();
}

// Waking a thread costs more than copying a few pages within memory, which decode threads do
// themselves when they have nothing else to do.
bool Tier::worth_waking() const {
  const int64_t loads = (int64_t)(urgent_.size() + ahead_.size());
  return !io_.in_memory() || loads * 2 * half_bytes_ >= WAKE_BYTES;
}

void Tier::wake_copier() {
  if (!thread_.joinable())
    thread_ = std::thread([this] { copier(); });
  else if (idle_)
    work_.notify_one();
}

void Tier::copier() {
  Lock lock(mutex_);
  while (!stop_) {
    if (failed_) {
    } else if (saves_first_ && !saves_.empty()) {
      save_one(lock);
      continue;
    } else if (load_one(lock)) {
      continue;
    } else if (!saves_.empty()) {
      save_one(lock);
      continue;
    }
    idle_ = true;
    work_.wait(lock);
    idle_ = false;
  }
}

// The page has no frame, its tokens are on the host, and `frame` was taken for it.
void Tier::start_load(int64_t record, int frame, bool ahead) {
  enter(record, frame);
  Frame& f = frames_[frame];
  f.state = Frame::QUEUED;
  f.fresh = true;
  f.call = call_;
  f.ticket = ++ticket_;
  a_.busy[frame] = 1;
  ahead_frames_++;  // until it is pinned
  (ahead ? ahead_ : urgent_).push_back({frame, f.ticket});
  if (worth_waking()) wake_copier();
}

void Tier::cancel_load(int frame) {
  if (!frames_[frame].pins) ahead_frames_--;
  free_frame(frame);
}

void Tier::cancel_ahead() {
  for (const Load& load : ahead_) {
    const Frame& f = frames_[load.frame];
    if (f.state == Frame::QUEUED && f.ticket == load.ticket && !f.pins) cancel_load(load.frame);
  }
  ahead_.clear();
}

// Does the load that is next. False: there is none.
bool Tier::load_one(Lock& lock) {
  for (std::deque<Load>* queue : {&urgent_, &ahead_})
    while (!queue->empty()) {
      const Load load = queue->front();
      queue->pop_front();
      Frame& f = frames_[load.frame];
      if (f.state != Frame::QUEUED || f.ticket != load.ticket) continue;
      load_now(lock, a_.owner[load.frame], load.frame);
      return true;
    }
  return false;
}

// The frame is the page's already; a failure is kept.
void Tier::load_now(Lock& lock, int64_t record, int frame) {
  Frame& f = frames_[frame];
  f.state = Frame::COPYING;
  a_.busy[frame] = 1;
  copying_++;
  PsaTierError error;
  lock.unlock();
  const bool loaded = io_.load(record, keys(frame), values(frame), error);
  lock.lock();
  copying_--;
  if (!loaded) return fail(error);
  f.state = Frame::READY;
  if (!f.pins) ahead_frames_--;
  count_[LOADS]++;
  count_[BYTES_LOADED] += io_.record_bytes();
  sync_busy(frame);
  progress(f.waiting);
}

void Tier::save_now(int64_t record, int frame) {
  PsaTierError error;
  io_.save(record, keys(frame), values(frame), error);  // to memory
  saved_now(record, frame);
}

void Tier::saved_now(int64_t record, int frame) {
  count_[BYTES_SAVED] += io_.record_bytes();
  a_.saved[record] = a_.filled[record];
  sync_busy(frame);
}

void Tier::start_save(int frame) {
  const int64_t record = a_.owner[frame];
  if (io_.in_memory()) return save_now(record, frame);
  frames_[frame].saving = true;
  a_.busy[frame] = 1;
  saves_.push_back({record, frame, -1, a_.filled[record]});
  wake_copier();
}

void Tier::save_one(Lock& lock) {
  const Save save = saves_.front();
  saves_.pop_front();
  saving_++;
  char* from = save.frame >= 0 ? nullptr : buffers_[save.buffer].get();
  const char* k = from ? from : keys(save.frame);
  const char* v = from ? from + half_bytes_ : values(save.frame);
  PsaTierError error;
  lock.unlock();
  const bool saved = io_.save(save.record, k, v, error);
  lock.lock();
  saving_--;
  if (from) free_buffers_.push_back(save.buffer);
  if (!saved) return fail(error);
  count_[BYTES_SAVED] += io_.record_bytes();
  a_.saved[save.record] = save.tokens;
  if (!from) {
    frames_[save.frame].saving = false;
    sync_busy(save.frame);
  }
  progress(false);
}

// What is still to be loaded is, by the caller.
void Tier::finish_loads(Lock& lock) {
  cancel_ahead();
  while (!failed_ && load_one(lock)) {
  }
}

void Tier::drain(Lock& lock) {
  finish_loads(lock);
  for (;;) {
    require_whole();
    if (saves_.empty() && !copying_ && !saving_) return;
    wait(lock);
  }
}

}  // namespace psa
