// Threads that go through the phases of a job together.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Shares out the tasks of one phase after the other. Each thread takes those of its own range first, which lie
// together in memory, then what others have left.
//
// A phase ends when its tasks are done, not when all threads have come: on a busy machine a thread that the
// system has taken off its core holds nobody up, unless it is in the middle of a task. It catches up later, or
// finds when it comes that everything is done.
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
        for (int i; taken.load(std::memory_order_relaxed) < count &&
                    (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;
             ++mine)
          task(first + i);
        if (mine) done.fetch_add(mine, std::memory_order_release);
      }
      for (int turn = 0; done.load(std::memory_order_acquire) < tasks; ++turn) {
        // Sleeping frees this core for the thread that holds the last task, should it have lost its own.
        if (turn < kSpins)
          relax();
        else
          std::this_thread::sleep_for(std::chrono::microseconds(30));
      }
    }

   private:
    static constexpr int kSpins = 2000;

    int begin(int owner, int tasks) const {
      return static_cast<int>(static_cast<int64_t>(tasks) * owner / team_.threads_);
    }

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

// What a pool runs. A thread that comes late may begin after the caller has gone on: then all tasks are done, and
// only what the job itself owns may be touched.
class Job {
 public:
  Job(int threads, int phases) : team_(threads, phases), threads_(threads) {}
  virtual ~Job() = default;

  int threads() const { return threads_; }

  void work(int index) {
    Team::Member member(team_, index);
    run(member);
  }

 protected:
  virtual void run(Team::Member& member) = 0;

 private:
  Team team_;
  int threads_;
};

// Threads that wait for jobs: a moment awake, since a step follows a step, then asleep. The caller works on its job
// too and waits for nobody, so that a job with no helper at all, or one of two that come at once, still gets done.
class Pool {
 public:
  // Of this process; its threads live as long.
  static Pool& shared() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void run(std::shared_ptr<Job> job) {
    if (job->threads() > 1) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        grow(job->threads() - 1);
        job_ = job;
        generation_.fetch_add(1, std::memory_order_release);
      }
      posted_.notify_all();
    }
    job->work(0);
  }

 private:
  static constexpr int kSpins = 2000;

  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
    } catch (const std::system_error&) {
      // No more threads are to be had: the others do the work.
    }
  }

  void help(int index) {
    for (uint64_t seen = 0;;) {
      for (int turn = 0; turn < kSpins && generation_.load(std::memory_order_acquire) == seen; ++turn) relax();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        posted_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (index < job->threads()) job->work(index);
    }
  }

  std::mutex mutex_;
  std::condition_variable posted_;
  std::atomic<uint64_t> generation_{0};
  std::shared_ptr<Job> job_;
  int helpers_ = 0;
};

// Runs `task` for each of [0, tasks) on so many threads.
template <class Task>
static inline void for_each(int tasks, int threads, Task task) {
  class Loop : public Job {
   public:
    Loop(int tasks, int threads, Task task) : Job(threads, 1), tasks_(tasks), task_(task) {}

   protected:
    void run(Team::Member& member) override { member.phase(tasks_, task_); }

   private:
    int tasks_;
    Task task_;
  };
  Pool::shared().run(std::make_shared<Loop>(tasks, threads, task));
}
