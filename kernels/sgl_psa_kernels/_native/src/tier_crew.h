// The threads of a decode over a page tier: each has a few fibers, and goes on with another one, with
// a new task, or with a load, when a fiber waits for pages.
#pragma once

#include "fiber.h"
#include "tier.h"

namespace psa {

// Pages that one fiber attends together, and those that it may attend next.
struct PageBlock {
  int64_t record[64];
  int tokens[64];  // that must be there
  int count;
};

class DecodeCrew {
 public:
  // run(context, task, fiber) attends a task.
  using Run = void (*)(void* context, int task, DecodeFiber& fiber);

  DecodeCrew(Tier& tier, int layer, int step, int threads, int tasks, Run run, void* context);
  ~DecodeCrew();
  // The loop of one thread; returns when all tasks are done or one failed.
  void work(int thread);
  // Throws the failure of a task.
  void finish() const;

  // For fibers. heads: KV heads that attend the pages together. need() returns when all pages are
  // in frames, and pins them until done().
  void need(DecodeFiber& fiber, const PageBlock& now, int heads);
  void done(DecodeFiber& fiber);
  // Frames of pages if they are there now, else -1; without pinning them.
  void expect(const PageBlock& pages);
  int frame_if_ready(int64_t record) const;
  bool pipelined() const { return tier_.a_.pipeline; }
  Tier& tier() { return tier_; }
  const char* keys(int frame) const { return tier_.keys(frame); }
  const char* values(int frame) const { return tier_.values(frame); }
  int64_t record_of(int64_t page) const { return tier_.record_of(layer_, page); }
  std::mutex& mutex() { return tier_.mutex_; }

 private:
  using Lock = Tier::Lock;

  static void enter(void* fiber);
  void run(DecodeFiber& fiber);
  void unpin(DecodeFiber& fiber);
  void check() const;
  int bring(DecodeFiber& fiber, Lock& lock, int64_t record);
  void pause(DecodeFiber& fiber, Lock& lock, DecodeFiber::State state);
  bool ready(const DecodeFiber& fiber) const;
  void watch(DecodeFiber& fiber);
  void unwatch(DecodeFiber& fiber);
  DecodeFiber* next(std::vector<std::unique_ptr<DecodeFiber>>& own);

  Tier& tier_;
  const int layer_, step_, tasks_;
  const Run run_;
  void* const context_;
  int started_ = 0, done_ = 0;
  bool failed_ = false;
  TierFailure failure_{};
};

}  // namespace psa
