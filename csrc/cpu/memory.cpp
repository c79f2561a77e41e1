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

// Scratch of a call: a fresh megabyte costs some hundred page faults, 1 to 2% of a short call, so the last few blocks
// of a middling size wait for the next call. Smaller ones would only push them out; larger ones are not worth keeping.
constexpr size_t KEEP_FROM = size_t{64} << 10, KEEP_TO = size_t{16} << 20, HEADER = 64;
constexpr int KEPT = 8;

std::atomic<char*> kept[KEPT];  // static, so null at first

size_t& capacity(char* block) {
  return *reinterpret_cast<size_t*>(block);
}

// Puts a block where there is room; if there is none, all move up by one and the last is freed.
void keep(char* block) {
  for (auto& slot : kept) {
    char* nothing = nullptr;
    if (slot.compare_exchange_strong(nothing, block)) return;
  }
  for (auto& slot : kept) {
    block = slot.exchange(block);
    if (!block) return;
  }
  std::free(block);
}

}  // namespace

void* allocate(size_t bytes) {
  const size_t wanted = bytes + HEADER;
  for (int n = 0; wanted >= KEEP_FROM && wanted <= KEEP_TO && n < KEPT; ++n) {
    char* block = kept[n].exchange(nullptr);
    if (!block) continue;
    if (capacity(block) >= wanted) return block + HEADER;
    keep(block);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, HEADER, wanted) != 0) throw std::bad_alloc();
  auto* block = static_cast<char*>(memory);
  if (wanted > KEEP_TO) prefer_huge_pages(block, wanted);  // what is not kept is fresh every time
  capacity(block) = wanted;
  return block + HEADER;
}

void release(void* memory) {
  char* block = static_cast<char*>(memory) - HEADER;
  const size_t size = capacity(block);
  if (size >= KEEP_FROM && size <= KEEP_TO)
    keep(block);
  else
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
