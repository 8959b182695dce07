#include "tier_crew.h"

#include <chrono>
#include <new>

namespace psa {

namespace {
constexpr int FIBERS = 8;  // of a thread: how many tasks may wait while another one is attended
}

DecodeCrew::DecodeCrew(Tier& tier, int layer, int step, int threads, int tasks, Run run,
                       void* context)
    : tier_(tier), layer_(layer), step_(step), tasks_(tasks), run_(run), context_(context) {
  tier_.budget_ = tier_.room(layer);
  tier_.all_attended_ = false;
  tier_.call_++;
  auto& fibers = tier_.fibers_->threads;
  if (fibers.size() < (size_t)threads) fibers.resize(threads);
}

DecodeCrew::~DecodeCrew() {
  Lock lock(tier_.mutex_);
  tier_.finish_loads(lock);  // a task that failed may have left some
}

void DecodeCrew::finish() const {
  if (failed_) throw failure_;
}

void DecodeCrew::check() const {
  tier_.require_whole();
  if (failed_) throw failure_;
}

void DecodeCrew::pause(DecodeFiber& fiber, Lock& lock, DecodeFiber::State state) {
  fiber.state = state;
  fiber.seen = tier_.events_;
  lock.unlock();
  fiber.fiber.pause();
  lock.lock();
  fiber.state = DecodeFiber::RUNS;
}

bool DecodeCrew::ready(const DecodeFiber& fiber) const {
  for (int i = 0; i < fiber.pinned; i++)
    if (tier_.frames_[fiber.frames[i]].state != Frame::READY) return false;
  return true;
}

// The frame of a page, which is there or on its way.
int DecodeCrew::bring(DecodeFiber& fiber, Lock& lock, int64_t record) {
  for (;;) {
    check();
    const int frame = tier_.a_.frame_of[record];
    if (frame >= 0) {
      Frame& f = tier_.frames_[frame];
      if (f.state == Frame::QUEUED && !f.pins) tier_.urgent_.push_back({frame, f.ticket});
      return frame;
    }
    if (tier_.a_.saved[record] < tier_.a_.filled[record]) {
      tier_.saves_first_++;
      pause(fiber, lock, DecodeFiber::WAITS_FOR_EVENT);
      tier_.saves_first_--;
    } else if (const int taken = tier_.take(layer_); taken >= 0) {
      tier_.start_load(record, taken, false);
      return taken;
    } else {
      pause(fiber, lock, DecodeFiber::WAITS_FOR_EVENT);
    }
  }
}

void DecodeCrew::need(DecodeFiber& fiber, const PageBlock& now, int heads) {
  Tier& t = tier_;
  Lock lock(t.mutex_);
  // What all fibers pin at once never exceeds the frames that there are.
  while (t.reserved_ + t.ahead_frames_ + now.count > t.budget_) {
    check();
    t.cancel_ahead();
    if (t.reserved_ + t.ahead_frames_ + now.count > t.budget_)
      pause(fiber, lock, DecodeFiber::WAITS_FOR_EVENT);
  }
  t.reserved_ += now.count;
  fiber.reserved = now.count;
  for (int i = 0; i < now.count; i++) {
    const int64_t record = now.record[i];
    if (t.a_.filled[record] < now.tokens[i])
      t.short_page(layer_, record % t.a_.num_pages, t.a_.filled[record], now.tokens[i]);
    const int frame = bring(fiber, lock, record);
    t.pin(frame);
    fiber.frames[fiber.pinned++] = frame;
    Frame& f = t.frames_[frame];
    t.count_[HITS] += heads - f.fresh;
    f.fresh = false;
    f.epoch = t.epoch_;
    t.a_.stamp[record] = step_;
    t.a_.uses[frame] += heads;
  }
  while (!ready(fiber)) {
    check();
    pause(fiber, lock, DecodeFiber::WAITS_FOR_PAGES);
  }
}

void DecodeCrew::unpin(DecodeFiber& fiber) {
  for (int i = 0; i < fiber.pinned; i++) tier_.unpin(fiber.frames[i]);
  tier_.reserved_ -= fiber.reserved;
  if (fiber.reserved) tier_.progress(false);
  fiber.pinned = fiber.reserved = 0;
}

void DecodeCrew::done(DecodeFiber& fiber) {
  const Lock lock(tier_.mutex_);
  unpin(fiber);
}

void DecodeCrew::expect(const PageBlock& pages) {
  Tier& t = tier_;
  const Lock lock(t.mutex_);
  // Loads ahead are for a copy thread that works; nobody else gets to them in time.
  if (t.io_.in_memory() && (t.idle_ || !t.thread_.joinable())) return;
  for (int i = 0; i < pages.count; i++) {
    const int64_t record = pages.record[i];
    if (t.a_.frame_of[record] >= 0) continue;
    if (t.a_.filled[record] < pages.tokens[i] || t.a_.saved[record] < t.a_.filled[record]) continue;
    if (t.reserved_ + t.ahead_frames_ >= t.budget_) return;
    const int frame = t.take(layer_, true);
    if (frame < 0) return;
    t.start_load(record, frame, true);
  }
}

int DecodeCrew::frame_if_ready(int64_t record) const {
  const int frame = tier_.a_.frame_of[record];
  return frame >= 0 && tier_.frames_[frame].state == Frame::READY ? frame : -1;
}

void DecodeCrew::enter(void* fiber) {
  DecodeFiber& self = *static_cast<DecodeFiber*>(fiber);
  self.crew->run(self);
}

void DecodeCrew::run(DecodeFiber& fiber) {
  TierFailure failure{};
  try {
    run_(context_, fiber.task, fiber);
  } catch (const TierFailure& f) {
    failure = f;
  } catch (const std::bad_alloc&) {
    failure.status = PSA_NO_MEMORY;
  }
  const Lock lock(tier_.mutex_);
  if (failure.status) {
    if (!failed_) failure_ = failure;
    failed_ = true;
    tier_.events_++;
  }
  unpin(fiber);
  fiber.state = DecodeFiber::IDLE;
  done_++;
  if (failed_ || done_ == tasks_) tier_.changed_.notify_all();
}

// Wakes the thread when the last page that is missing has come; earlier ones come before it.
void DecodeCrew::watch(DecodeFiber& fiber) {
  for (int i = fiber.pinned; i-- > 0;)
    if (tier_.frames_[fiber.frames[i]].state != Frame::READY) {
      fiber.watched = fiber.frames[i];
      tier_.frames_[fiber.watched].waiting++;
      return;
    }
}

void DecodeCrew::unwatch(DecodeFiber& fiber) {
  if (fiber.watched >= 0) tier_.frames_[fiber.watched].waiting--;
  fiber.watched = -1;
}

// A fiber that can go on: one whose pages have come, or one with a new task. Null: none.
DecodeFiber* DecodeCrew::next(std::vector<std::unique_ptr<DecodeFiber>>& own) {
  const bool stop = failed_ || tier_.failed_;
  DecodeFiber* idle = nullptr;
  for (auto& fiber : own) {
    if (fiber->state == DecodeFiber::IDLE) {
      idle = fiber.get();
      continue;
    }
    if (stop) return fiber.get();
    if (fiber->state == DecodeFiber::WAITS_FOR_PAGES && ready(*fiber)) return fiber.get();
    if (fiber->state == DecodeFiber::WAITS_FOR_EVENT && fiber->seen != tier_.events_)
      return fiber.get();
  }
  if (stop || started_ == tasks_) return nullptr;
  if (!idle) {
    if ((int)own.size() == (pipelined() ? FIBERS : 1)) return nullptr;
    own.push_back(std::make_unique<DecodeFiber>());
    idle = own.back().get();
  }
  idle->crew = this;
  idle->task = started_++;
  idle->state = DecodeFiber::RUNS;
  idle->fiber.start(enter, idle);
  return idle;
}

void DecodeCrew::work(int thread) {
  using Clock = std::chrono::steady_clock;
  Lock lock(tier_.mutex_);
  auto& own = tier_.fibers_->threads[thread];
  for (;;) {
    if (DecodeFiber* fiber = next(own)) {
      lock.unlock();
      fiber->fiber.resume();
      lock.lock();
      continue;
    }
    bool waits = false, for_event = false;
    for (auto& fiber : own) {
      waits |= fiber->state != DecodeFiber::IDLE;
      for_event |= fiber->state == DecodeFiber::WAITS_FOR_EVENT;
    }
    // A thread without tasks stays until the others have done theirs: it does loads for them.
    if (!waits && (failed_ || tier_.failed_ || done_ == tasks_)) return;
    const auto begin = Clock::now();
    if (tier_.failed_ || !tier_.load_one(lock)) {
      for (auto& fiber : own)
        if (fiber->state == DecodeFiber::WAITS_FOR_PAGES) watch(*fiber);
      tier_.event_waiters_ += for_event;
      tier_.sleepers_++;
      tier_.changed_.wait(lock);
      tier_.sleepers_--;
      tier_.event_waiters_ -= for_event;
      for (auto& fiber : own) unwatch(*fiber);
    }
    if (waits)
      tier_.count_[STALL_NS] +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  }
}

}  // namespace psa
