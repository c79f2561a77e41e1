// Parallel regions on the OpenMP runtime that the process already has, so that there is never a second one.
#pragma once

#include <cstdint>

namespace posattn {

// Run body(context, thread) for thread = 0 .. threads - 1, concurrently where the runtime grants it.
void parallel(int threads, void (*body)(void* context, int thread), void* context);

// A call that may be told to end early. Its threads ask `interrupted` between tiles; the thread that made the call also
// asks `poll` there, a few times a second, and nothing else in the process needs to know.
struct Watch {
  bool (*poll)(void* context) = nullptr;  // true: end the call
  void* context = nullptr;
  int stopped = 0;
  int64_t next_poll = 0;
};

// While it lives, the parallel regions that this thread starts belong to the call that `watch` watches.
class Watching {
public:
  explicit Watching(Watch& watch);
  ~Watching();
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

private:
  Watch* watch_;
  Watch* before_;
};

// True if the call that this thread works for is to end: what it leaves behind will not be looked at.
bool interrupted();

// Returns when `*done` is `total`. Only the thread that made a watched call waits, so that it hears of an interruption
// while others finish; at the end of a parallel region it would not.
void wait_watching(const int64_t* done, int64_t total);

// "libgomp", "libomp", ... or "std::thread": what `parallel` runs on.
const char* parallel_runtime();

}  // namespace posattn
