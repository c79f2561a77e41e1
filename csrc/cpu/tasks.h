// Work shared among threads: tasks are handed out in order, and a task may wait for what a lower-numbered one has
// published. The lowest running task never waits, so nothing deadlocks, and sums are always taken in task order, so the
// result is the same for every number of threads. A call that is interrupted skips what is left: nothing waits for it.
#pragma once

#include <sched.h>

#include "bias.h"
#include "memory.h"
#include "threads.h"

namespace posattn::POSATTN_ISA {

// The most queries that any sequence has: what tasks are cut from and scratch is sized by.
inline int64_t longest_queries(const Problem& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.n_sequences; ++n) longest = imax(longest, p.sequences[n].q_len);
  return longest;
}

// While it lives, subnormal numbers count as zero on this thread, going in and coming out. They are what a weight is
// before it is nothing, and on Intel's processors each costs a multiply-add a hundred cycles: a steep slope's calls
// took four times as long.
class FlushSubnormals {
public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | FLUSH_TO_ZERO));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
  FlushSubnormals() = default;
  ~FlushSubnormals() = default;
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

private:
#if defined(__x86_64__)
  static constexpr unsigned FLUSH_TO_ZERO = 0x8000, DENORMALS_ARE_ZERO = 0x40;
  unsigned before_;
#elif defined(__aarch64__)
  static constexpr uint64_t FLUSH_TO_ZERO = uint64_t{1} << 24;
  uint64_t before_ = 0;
#endif
};

struct Counter {
  alignas(64) int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// How far each task has come. A task waits for another's step by number; steps only rise.
struct Progress {
  int64_t* steps = nullptr;
  static constexpr int64_t DONE = INT64_MAX;

  explicit Progress(int64_t tasks) : steps(static_cast<int64_t*>(allocate(static_cast<size_t>(imax(tasks, 1)) * 8))) {
    for (int64_t t = 0; t < tasks; ++t) steps[t] = 0;
  }
  ~Progress() { release(steps); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void publish(int64_t task, int64_t step) { __atomic_store_n(&steps[task], step, __ATOMIC_RELEASE); }
  // Returns when `task` has published at least `step`; a negative task is one that does not exist. An interrupted
  // call's tasks do not wait, since the other may have been skipped.
  void wait(int64_t task, int64_t step) const {
    if (task < 0) return;
    for (int spins = 0; __atomic_load_n(&steps[task], __ATOMIC_ACQUIRE) < step; ++spins) {
      if (spins <= 64) continue;
      if (interrupted()) return;
      sched_yield();  // the other task's thread may need this core
    }
  }
};

// Runs work(arena, task) for every task; `layout(arena)` says how much scratch a thread needs.
template <class Layout, class Work>
void run_tasks(int threads, int64_t tasks, const Layout& layout, const Work& work) {
  if (tasks == 0 || interrupted()) return;
  Arena measure;
  layout(measure);
  size_t each = (measure.used + 4095) / 4096 * 4096 + 4096;
  int team = static_cast<int>(imax(1, imin(threads, tasks)));
  struct Shared {
    Counter counter;
    const Work* work;
    char* memory;
    size_t each;
    int64_t tasks;
    Counter done;
  } shared{{}, &work, static_cast<char*>(allocate(each * static_cast<size_t>(team))), each, tasks, {}};
  parallel(
      team,
      [](void* context, int thread) {
        const FlushSubnormals flush;
        auto& region = *static_cast<Shared*>(context);
        char* block = region.memory + region.each * static_cast<size_t>(thread);
        for (int64_t t = region.counter.next(); t < region.tasks; t = region.counter.next()) {
          Arena arena{block};
          if (!interrupted()) (*region.work)(arena, t);
          __atomic_fetch_add(&region.done.value, 1, __ATOMIC_RELEASE);
        }
        wait_watching(&region.done.value, region.tasks);
      },
      &shared);
  release(shared.memory);
}

}  // namespace posattn::POSATTN_ISA
