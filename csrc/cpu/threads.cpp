// Finds GOMP_parallel in the OpenMP runtime that torch has loaded and runs regions on it; without one, std::thread.
// GOMP_parallel is exported by libgomp, LLVM's libomp and Intel's libiomp5 alike.
#include "threads.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#  include <link.h>
#endif
#include <dlfcn.h>

namespace posattn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel fork = nullptr;
  const char* name = "std::thread";
};

#if defined(__linux__)
// True for libgomp.so.1, libgomp-a1b2c3.so.1, libomp.so and libiomp5.so.
const char* openmp_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* file = slash ? slash + 1 : path;
  for (const char* name : {"libgomp", "libiomp5", "libomp"})
    if (std::strncmp(file, name, std::strlen(name)) == 0) return name;
  return nullptr;
}

int visit(dl_phdr_info* info, size_t, void* out) {
  const char* name = info->dlpi_name ? openmp_name(info->dlpi_name) : nullptr;
  if (!name) return 0;
  void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_NOW);
  if (!handle) return 0;
  auto* runtime = static_cast<Runtime*>(out);
  runtime->fork = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  runtime->name = name;
  return runtime->fork ? 1 : 0;
}
#endif

Runtime find_runtime() {
  Runtime runtime;
#if defined(__linux__)
  dl_iterate_phdr(visit, &runtime);
#else
  runtime.fork = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (runtime.fork) runtime.name = "libomp";
#endif
  if (!runtime.fork) runtime.name = "std::thread";
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// The call that a thread works for.
struct Current {
  Watch* watch = nullptr;
  bool caller = false;  // it made the call
};
thread_local Current current;

struct Region {
  void (*body)(void*, int);
  void* context;
  Watch* watch;
  std::atomic<int> next{0};
};

void enter(void* data) {
  auto* region = static_cast<Region*>(data);
  const Current before = current;
  if (before.watch != region->watch) current = {region->watch, false};
  region->body(region->context, region->next.fetch_add(1, std::memory_order_relaxed));
  current = before;
}

// Python's handler runs at the first poll after the signal: soon to a person, and the cost of a poll, which may wait
// for the interpreter's lock, is hidden. Shorter calls are never asked.
constexpr int64_t POLL_NANOSECONDS = 100'000'000;

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

Watching::Watching(Watch& watch) : watch_(&watch), before_(current.watch) {
  watch.next_poll = nanoseconds() + POLL_NANOSECONDS;
  current = {watch_, true};
}

Watching::~Watching() {
  current = {before_, before_ != nullptr};
}

bool interrupted() {
  Watch* watch = current.watch;
  if (!watch) return false;
  if (__atomic_load_n(&watch->stopped, __ATOMIC_RELAXED)) return true;
  if (!current.caller || nanoseconds() < watch->next_poll) return false;
  const bool stop = watch->poll(watch->context);
  watch->next_poll = nanoseconds() + POLL_NANOSECONDS;
  if (stop) __atomic_store_n(&watch->stopped, 1, __ATOMIC_RELAXED);
  return stop;
}

void wait_watching(const int64_t* done, int64_t total) {
  if (!current.caller) return;
  for (int turns = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < total; ++turns) {
    interrupted();
    turns < 1000 ? sched_yield() : usleep(50);
  }
}

const char* parallel_runtime() {
  return runtime().name;
}

void parallel(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) return body(context, 0);
  Region region{body, context, current.watch};
  // The runtime may grant fewer threads than asked for (nested regions, limits): bodies must take work until none is
  // left rather than count on their number.
  if (runtime().fork) return runtime().fork(enter, &region, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(enter, &region);
  enter(&region);
  for (auto& thread : pool) thread.join();
}

}  // namespace posattn
