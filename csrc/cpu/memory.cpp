// Scratch that the next call can have again, and advice on pages.
#include "memory.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace posattn {
namespace {

// Scratch of a call: a fresh megabyte costs some hundred page faults, 1 to 2% of a short call, so the last block of a
// middling size waits for the next call. Smaller ones would only push it out; larger ones are not worth keeping.
constexpr size_t KEEP_FROM = size_t{256} << 10, KEEP_TO = size_t{32} << 20, HEADER = 64;

std::atomic<char*> kept{nullptr};

size_t& capacity(char* block) {
  return *reinterpret_cast<size_t*>(block);
}

}  // namespace

void* allocate(size_t bytes) {
  const size_t wanted = bytes + HEADER;
  if (wanted >= KEEP_FROM) {
    char* block = kept.exchange(nullptr);
    if (block && capacity(block) >= wanted) return block + HEADER;
    std::free(block);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, HEADER, wanted) != 0) throw std::bad_alloc();
  auto* block = static_cast<char*>(memory);
  capacity(block) = wanted;
  return block + HEADER;
}

void release(void* memory) {
  char* block = static_cast<char*>(memory) - HEADER;
  const size_t size = capacity(block);
  if (size >= KEEP_FROM && size <= KEEP_TO) block = kept.exchange(block);
  std::free(block);
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = (begin + PAGE - 1) / PAGE * PAGE,
                  last = (begin + bytes) / PAGE * PAGE;
  // Only advice: a kernel that cannot follow it says so, and small pages serve as well.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace posattn
