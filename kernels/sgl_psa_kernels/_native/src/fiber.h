// Tasks that give up their thread in the middle and go on later, on the same thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "scratch.h"

namespace psa {

class Fiber {
 public:
  Fiber() : stack_(new char[STACK_BYTES]) {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
  ~Fiber() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes entry(argument) what resume() begins with.
  void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = STACK_BYTES;
    own_.uc_link = nullptr;
    const uint64_t self = reinterpret_cast<uint64_t>(this);
    makecontext(&own_, reinterpret_cast<void (*)()>(&Fiber::begin), 2, (unsigned)(self >> 32),
                (unsigned)self);
  }
  // Runs it until it pauses. After its end it must be started again.
  void resume() {
#if defined(__SANITIZE_THREAD__)
    home_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 0);
#endif
    swapcontext(&home_, &own_);
  }
  // Back to whoever resumed it.
  void pause() {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(home_tsan_, 0);
#endif
    swapcontext(&own_, &home_);
  }

 private:
  static constexpr size_t STACK_BYTES = 512 << 10;

  static void begin(unsigned high, unsigned low) {
    Fiber* self = reinterpret_cast<Fiber*>((uint64_t)high << 32 | low);
    self->entry_(self->argument_);
    self->pause();
  }

  std::unique_ptr<char[]> stack_;
  ucontext_t own_, home_;
  void (*entry_)(void*);
  void* argument_;
#if defined(__SANITIZE_THREAD__)
  void *tsan_, *home_tsan_;
#endif
};

// A fiber of a decode and what it waits for.
struct DecodeFiber {
  enum State { IDLE, RUNS, WAITS_FOR_PAGES, WAITS_FOR_EVENT };
  Fiber fiber;
  Scratch scratch;
  class DecodeCrew* crew = nullptr;
  State state = IDLE;
  int task = 0;
  // The pages of a block that are pinned.
  int frames[64];
  int pinned = 0, reserved = 0;
  int watched = -1;  // frame whose arrival wakes the thread
  uint64_t seen = 0;
};

// Fibers of the threads of a decode, kept between calls; and memory for results of all threads.
class FiberPool {
 public:
  std::vector<std::vector<std::unique_ptr<DecodeFiber>>> threads;
  Scratch shared;
};

}  // namespace psa
