// Frames of a page tier: who has them, who may take them.
#include <algorithm>
#include <numeric>

#include "fiber.h"
#include "tier.h"

namespace psa {

Tier::Tier(const PsaTierCreateArgs& args)
    : a_(args),
      k_frames_(static_cast<char*>(args.k_frames)),
      v_frames_(static_cast<char*>(args.v_frames)),
      half_bytes_((int64_t)args.num_kv_heads * args.page_size * args.head_dim * args.itemsize),
      io_(args, half_bytes_),
      frames_(args.num_frames),
      held_(args.num_layers),
      open_(args.num_layers),
      quota_(args.num_frames),
      cursors_(1),
      simulated_(args.num_pages, -1),
      fibers_(std::make_unique<FiberPool>()) {
  for (int f = (int)args.num_frames; f-- > 0;) free_.push_back(f);
}

Tier::~Tier() {
  {
    const Lock lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Tier::sync_busy(int frame) {
  const Frame& f = frames_[frame];
  a_.busy[frame] = arriving(f) || f.pins || f.saving || dirty(frame);
}

void Tier::pin(int frame) {
  Frame& f = frames_[frame];
  if (!f.pins++) {
    if (arriving(f)) ahead_frames_--;
    a_.busy[frame] = 1;
  }
}

void Tier::unpin(int frame) {
  Frame& f = frames_[frame];
  if (!--f.pins) {
    if (arriving(f)) ahead_frames_++;
    sync_busy(frame);
  }
}

void Tier::enter(int64_t record, int frame) {
  Frame& f = frames_[frame];
  f.state = Frame::READY;
  f.fresh = false;
  f.epoch = 0;
  a_.frame_of[record] = frame;
  a_.owner[frame] = record;
  a_.came[frame] = ++came_;
  a_.uses[frame] = 0;
  held_[layer_of(record)]++;
  set_open(frame, a_.filled[record] < a_.page_size);
  sync_busy(frame);
}

void Tier::leave(int frame) {
  Frame& f = frames_[frame];
  const int64_t record = a_.owner[frame];
  if (f.fresh && f.state == Frame::READY) count_[BYTES_IN_VAIN] += io_.record_bytes();
  set_open(frame, false);
  f.fresh = false;
  f.state = Frame::FREE;
  a_.frame_of[record] = -1;
  a_.owner[frame] = -1;
  a_.uses[frame] = a_.busy[frame] = 0;
  held_[layer_of(record)]--;
}

// The frame has an owner.
void Tier::set_open(int frame, bool open) {
  const int change = (int)open - (int)frames_[frame].open;
  frames_[frame].open = open;
  open_[layer_of(a_.owner[frame])] += change;
  all_open_ += change;
}

int64_t Tier::room(int layer) const {
  if (!a_.int8_host) return std::min<int64_t>(a_.num_frames, quota_);
  return std::min(a_.num_frames - all_open_, quota_ - open_[layer]);
}

void Tier::no_frame(int layer) const {
  PsaTierError error{};
  error.layer = layer;
  error.have = (int32_t)all_open_;
  throw TierFailure{PSA_NO_FRAME, error};
}

void Tier::free_frame(int frame) {
  leave(frame);
  free_.push_back(frame);
}

int Tier::take_free(int layer) {
  if (free_.empty() || held_[layer] >= quota_) return -1;
  const int frame = free_.back();
  free_.pop_back();
  return frame;
}

// Holds a page that the layer may drive out. A layer at its quota takes only its own.
bool Tier::takeable(int frame, int layer) const {
  const Frame& f = frames_[frame];
  if (f.state != Frame::READY || f.pins || f.saving) return false;
  return held_[layer] < quota_ || layer_of(a_.owner[frame]) == layer;
}

// Loaded by the decode call that is under way, for a head that may yet attend it.
bool Tier::expected(int frame) const {
  return frames_[frame].fresh && frames_[frame].call == call_;
}

void Tier::evict(int frame) {
  count_[EVICTIONS]++;
  leave(frame);
}

int Tier::take(int layer, bool ahead) {
  if (const int frame = take_free(layer); frame >= 0) return frame;
  const int64_t row = layer % (int64_t)cursors_.size();
  for (int64_t& i = cursors_[row]; i < order_width_;) {
    const int frame = order_[row * order_width_ + i++];
    if (frame < 0 || !takeable(frame, layer) || dirty(frame)) continue;
    if (frames_[frame].epoch == epoch_ || expected(frame)) continue;
    evict(frame);
    return frame;
  }
  // In rotation: what is clean and was not attended, what is clean, what was loaded ahead, anything.
  for (int pass = all_attended_; pass < (ahead ? 2 : 4); pass++) {
    for (int64_t n = 0; n < a_.num_frames; n++) {
      const int frame = hand_;
      hand_ = hand_ + 1 == a_.num_frames ? 0 : hand_ + 1;
      if (!takeable(frame, layer)) continue;
      if (pass < 1 && frames_[frame].epoch == epoch_) continue;
      if (pass < 2 && expected(frame)) continue;
      if (dirty(frame)) {
        if (pass < 3 || a_.int8_host) continue;
        if (!io_.in_memory()) {
          // A full page that is being saved is clean soon.
          if (saves_.empty() && !saving_) start_save(frame);
          return -1;
        }
        save_now(a_.owner[frame], frame);
      }
      count_[RECYCLED]++;
      evict(frame);
      return frame;
    }
    if (!pass) all_attended_ = true;
  }
  return -1;
}

// Ends what is under way for a page: a load is called off, a save awaited.
void Tier::settle(Lock& lock, int64_t record) {
  for (;;) {
    require_whole();
    const int frame = a_.frame_of[record];
    if (frame >= 0) {
      const Frame& f = frames_[frame];
      if (f.state == Frame::QUEUED) return cancel_load(frame);
      if (f.state == Frame::READY && !f.saving) return;
    } else if (a_.saved[record] == a_.filled[record]) {
      return;
    }
    saves_first_++;
    wait(lock);
    saves_first_--;
  }
}

void Tier::forget(Lock& lock, int64_t record) {
  settle(lock, record);
  if (a_.frame_of[record] >= 0) free_frame(a_.frame_of[record]);
  a_.saved[record] = a_.filled[record] = a_.stamp[record] = 0;
}

void Tier::release(Lock& lock, const int64_t* pages, int64_t count) {
  for (int layer = 0; layer < a_.num_layers; layer++)
    for (int64_t i = 0; i < count; i++) forget(lock, record_of(layer, pages[i]));
}

void Tier::set_victims(const int32_t* order, int rows, int64_t count) {
  order_.assign(order, order + rows * count);
  cursors_.assign(rows, 0);
  order_width_ = count;
  epoch_++;
  all_attended_ = false;
}

int Tier::check() const {
  int problems = 0;
  std::vector<int> held(held_.size());
  std::vector<char> listed(frames_.size());
  for (size_t i = 0; i < frames_.size(); i++) {
    const Frame& f = frames_[i];
    const bool owned = a_.owner[i] >= 0;
    if (f.pins || f.waiting || f.saving) problems |= 1;
    if (owned) held[layer_of(a_.owner[i])]++;
    if (owned != (f.state == Frame::READY)) problems |= 16;
    if (f.open != (owned && a_.filled[a_.owner[i]] < a_.page_size)) problems |= 8;
  }
  if (reserved_ || ahead_frames_ || copying_ || saving_ || saves_first_) problems |= 1;
  if (!saves_.empty() || free_buffers_.size() != buffers_.size()) problems |= 2;
  for (const int f : free_) {
    if (listed[f] || a_.owner[f] >= 0) problems |= 4;
    listed[f] = 1;
  }
  const auto owned = std::count_if(a_.owner, a_.owner + a_.num_frames, [](int64_t r) { return r >= 0; });
  if ((int64_t)free_.size() + owned != a_.num_frames) problems |= 4;
  if (held != held_ || std::accumulate(open_.begin(), open_.end(), 0) != all_open_) problems |= 8;
  return problems;
}

void Tier::control(PsaTierControlArgs& c) {
  Lock lock(mutex_);
  if (c.command != PSA_TIER_COUNTERS) require_whole();
  switch (c.command) {
    case PSA_TIER_RELEASE:
      release(lock, static_cast<const int64_t*>(c.data), c.count);
      break;
    case PSA_TIER_CLEAR:
      drain(lock);
      for (int64_t i = 0; i < a_.num_layers * a_.num_pages; i++) forget(lock, i);
      break;
    case PSA_TIER_VICTIMS:
      set_victims(static_cast<const int32_t*>(c.data), c.rows, c.count);
      break;
    case PSA_TIER_QUOTA:
      quota_ = c.count;
      break;
    case PSA_TIER_DRAIN:
      drain(lock);
      break;
    case PSA_TIER_COUNTERS:
      std::copy(count_, count_ + 8, c.counters);
      break;
    case PSA_TIER_CHECK:
      drain(lock);
      c.counters[0] = check();
      break;
  }
}

}  // namespace psa
