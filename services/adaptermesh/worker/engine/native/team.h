// Threads that go through the phases of a step together.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <vector>

#include "vector.h"

// Shares out the tasks of one phase after the other. Each thread takes those of its own range first, which lie
// together in memory, then what others have left.
//
// A phase ends when its tasks are done, not when all threads have come: on a busy machine a thread that the
// system has taken off its core holds nobody up, unless it is in the middle of a task. It catches up later.
class Team {
 public:
  Team(int threads, int phases)
      : threads_(threads), stride_(threads + 1), counters_(static_cast<size_t>(phases) * stride_) {}

  // One member's view of the team, used by its thread alone.
  class Member {
   public:
    Member(Team& team, int index) : team_(team), index_(index) {}

    template <class Task>
    void phase(int tasks, Task task) {
      Counter* next = &team_.counters_[static_cast<size_t>(phase_++) * team_.stride_];
      std::atomic<int>& done = next[team_.threads_].value;
      for (int turn = 0; turn < team_.threads_; ++turn) {
        const int owner = (index_ + turn) % team_.threads_;
        const int first = begin(owner, tasks), count = begin(owner + 1, tasks) - first;
        std::atomic<int>& taken = next[owner].value;
        int mine = 0;
        for (int i; taken.load(std::memory_order_relaxed) < count && (i = taken.fetch_add(1, std::memory_order_relaxed)) < count; ++mine)
          task(first + i);
        if (mine) done.fetch_add(mine, std::memory_order_release);
      }
      for (int turn = 0; done.load(std::memory_order_acquire) < tasks; ++turn) turn < kSpins ? relax() : yield();
    }

   private:
    static constexpr int kSpins = 4000;

    int begin(int owner, int tasks) const {
      return static_cast<int>(static_cast<int64_t>(tasks) * owner / team_.threads_);
    }

    static void relax() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }

    static void yield() { sched_yield(); }

    Team& team_;
    int index_;
    int phase_ = 0;
  };

 private:
  // Counters of two threads share no cache line.
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  int threads_;
  int stride_;
  std::vector<Counter> counters_;
};
