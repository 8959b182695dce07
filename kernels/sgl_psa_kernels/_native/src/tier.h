// A page tier: pages of all layers in frames, every full page on the host as well.
//
// One thread calls; decode has threads of its own, and one copy thread loads and saves. All state is
// used with the mutex held, but for the contents of frames: those of a frame that is being copied
// belong to who copies, those of a pinned one are only read. With an int8 host, the frame of an open
// page is not taken, and a page is rounded when it fills, before it is saved.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host_io.h"

namespace psa {

// Ends a call with this status.
struct TierFailure {
  int status;
  PsaTierError error;
};

struct Frame {
  enum State : uint8_t { FREE, QUEUED, COPYING, READY };
  State state = FREE;
  bool fresh = false;   // loaded, and no head has attended it yet
  uint32_t call = 0;    // decode call that loaded it
  bool saving = false;  // on the queue of saves
  bool open = false;    // its page is not full
  int pins = 0;
  int waiting = 0;      // threads to wake when it is ready
  uint32_t epoch = 0;   // in which it was attended last
  uint32_t ticket = 0;  // of its load; one that finds another ticket is void
};

class Tier {
 public:
  using Lock = std::unique_lock<std::mutex>;

  explicit Tier(const PsaTierCreateArgs& args);
  ~Tier();

  // The calls of psa_abi.h; each throws TierFailure.
  void write(PsaTierRowsArgs& args);
  void gather(PsaTierRowsArgs& args);
  void decode(PsaTierDecodeArgs& args);
  void control(PsaTierControlArgs& args);

 private:
  friend class DecodeCrew;

  struct Load {
    int frame;
    uint32_t ticket;
  };
  struct Save {
    int64_t record;
    int frame;   // -1: from a buffer
    int buffer;
    int tokens;
  };

  char* keys(int frame) const { return k_frames_ + frame * half_bytes_; }
  char* values(int frame) const { return v_frames_ + frame * half_bytes_; }
  int64_t record_of(int layer, int64_t page) const { return layer * a_.num_pages + page; }
  int layer_of(int64_t record) const { return (int)(record / a_.num_pages); }
  bool dirty(int frame) const {
    const int64_t record = a_.owner[frame];
    return record >= 0 && a_.saved[record] < a_.filled[record];
  }
  bool arriving(const Frame& f) const { return f.state == Frame::QUEUED || f.state == Frame::COPYING; }

  // Frames (tier_frames.cpp).
  void sync_busy(int frame);
  void pin(int frame);
  void unpin(int frame);
  void enter(int64_t record, int frame);  // state READY
  void leave(int frame);                  // not on the free list yet
  void set_open(int frame, bool open);
  void free_frame(int frame);
  int take_free(int layer);   // -1: there is none for this layer
  // A frame for the layer from whoever has one. -1: wait for an event and try again; ahead: there
  // is none to be had without harm.
  int take(int layer, bool ahead = false);
  bool takeable(int frame, int layer) const;
  bool expected(int frame) const;
  // Frames that the layer may have for pages that can leave again.
  int64_t room(int layer) const;
  [[noreturn]] void no_frame(int layer) const;
  void evict(int frame);
  void forget(Lock& lock, int64_t record);
  void settle(Lock& lock, int64_t record);
  void release(Lock& lock, const int64_t* pages, int64_t count);
  void set_victims(const int32_t* order, int rows, int64_t count);
  int check() const;

  // Copies (tier_copy.cpp).
  void start_load(int64_t record, int frame, bool ahead);
  void cancel_load(int frame);
  void cancel_ahead();
  void start_save(int frame);
  void save_now(int64_t record, int frame);
  void saved_now(int64_t record, int frame);
  void load_now(Lock& lock, int64_t record, int frame);
  bool load_one(Lock& lock);
  void finish_loads(Lock& lock);
  void save_one(Lock& lock);
  void copier();
  void wake_copier();
  bool worth_waking() const;
  void progress(bool wanted);
  void wait(Lock& lock);  // for any event
  void drain(Lock& lock);
  void fail(const PsaTierError& error);
  void require_whole() const;
  [[noreturn]] void short_page(int layer, int64_t page, int have, int want) const;

  // Writes (tier_rows.cpp).
  void check_slots(PsaTierRowsArgs& args);
  void write_run(const PsaTierRowsArgs& args, int64_t first, int start, int count);
  void write_whole(Lock& lock, const PsaTierRowsArgs& args, int64_t first, int64_t record);
  int take_buffer(Lock& lock);

  PsaTierCreateArgs a_;
  char *k_frames_, *v_frames_;
  int64_t half_bytes_;  // of the keys, or the values, of a page
  HostIo io_;

  std::mutex mutex_;
  std::vector<Frame> frames_;
  std::vector<int> free_;
  std::vector<int> held_;  // frames of each layer
  std::vector<int> open_;  // those of pages that are not full
  int64_t all_open_ = 0;
  int64_t quota_;
  std::vector<int32_t> order_;
  std::vector<int64_t> cursors_;  // per row of order_
  int64_t order_width_ = 0;
  uint32_t epoch_ = 1;
  uint32_t call_ = 0;  // of decode; what it loaded ahead stays until it ends
  bool all_attended_ = false;  // since epoch_ began no frame was found that is not
  int hand_ = 0;
  int64_t came_ = 0;
  int64_t count_[8] = {};

  std::condition_variable changed_, work_;
  std::thread thread_;
  bool stop_ = false, idle_ = false;
  std::deque<Load> urgent_, ahead_;
  std::deque<Save> saves_;
  int saving_ = 0, copying_ = 0, saves_first_ = 0;
  int ahead_frames_ = 0;  // arriving and not pinned
  int sleepers_ = 0, event_waiters_ = 0;
  uint64_t events_ = 0;
  uint32_t ticket_ = 0;
  std::unique_ptr<char[]> page_;  // of write_whole, to an int8 host in memory
  std::vector<std::unique_ptr<char[]>> buffers_;
  std::vector<int> free_buffers_;
  bool failed_ = false;
  PsaTierError failure_{};

  // Of the decode that runs: pages that its threads may have pinned, and have.
  int64_t budget_ = 0, reserved_ = 0;

  std::vector<int32_t> simulated_;  // tokens of pages in the course of check_slots, -1: not met
  std::unique_ptr<class FiberPool> fibers_;
};

enum Count { HITS, LOADS, BYTES_LOADED, BYTES_SAVED, BYTES_IN_VAIN, STALL_NS, EVICTIONS, RECYCLED };

}  // namespace psa
