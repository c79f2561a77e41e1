// Memory for scratch and results.
#pragma once

#include <cstddef>

namespace posattn {

// 64-byte aligned memory; throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

// Asks for 2 MB pages where whole ones fit: memory that was never touched then costs one page fault in place of 512.
// On a large result those are up to a tenth of a call.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace posattn
