// Work shared among threads: tasks are handed out in order, and a task may wait for what a lower-numbered one has
// published. The lowest running task never waits, so nothing deadlocks, and sums are always taken in task order, so the
// result is the same for every number of threads.
#pragma once

#include "bias.h"
#include "threads.h"

namespace posattn::POSATTN_ISA {

struct Counter {
  alignas(64) int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// Runs work(arena, task) for every task; `layout(arena)` says how much scratch a thread needs.
template <class Layout, class Work>
void run_tasks(int threads, int64_t tasks, const Layout& layout, const Work& work) {
  if (tasks == 0) return;
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
  } shared{{}, &work, static_cast<char*>(allocate(each * static_cast<size_t>(team))), each, tasks};
  parallel(
      team,
      [](void* context, int thread) {
        auto& region = *static_cast<Shared*>(context);
        char* block = region.memory + region.each * static_cast<size_t>(thread);
        for (int64_t t = region.counter.next(); t < region.tasks; t = region.counter.next()) {
          Arena arena{block};
          (*region.work)(arena, t);
        }
      },
      &shared);
  release(shared.memory);
}

}  // namespace posattn::POSATTN_ISA
