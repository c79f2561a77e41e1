// The order in which blocks of keys add to the same queries' dQ.
//
// ORDERED: one after the other, in the order of the keys, so that the result does not depend on which block runs first.
// The semaphore counts: entry 0 the blocks that have begun; then, for each block of queries, those that have added to
// it.
#pragma once
#include "common/mask.h"
#include "ptx/ptx.h"

namespace posattn {

// Which of the launch's blocks this one is. A block draws a ticket, so all that it may have to wait for are already
// running. `shared` is free before and after.
__device__ __forceinline__ int block_number(int32_t* dq_semaphore, unsigned char* shared) {
  int number = blockIdx.x;
  if constexpr (ORDERED) {
    int* ticket = reinterpret_cast<int*>(shared);
    if (threadIdx.x == 0) *ticket = ptx::atom_add(dq_semaphore, 1);
    ptx::bar_sync();
    number = *ticket;
    ptx::bar_sync();
  }
  return number;
}

// How many blocks of KEYS keys add before this one to the queries from i0 on: earlier ones that they see.
template <int KEYS>
__device__ __forceinline__ int blocks_before(int key_block, const Sequence& s, const MaskParams& mask, int i0) {
  const int first = HAS_LEFT ? max(i0 + s.offset() - mask.left, 0) / KEYS : 0;
  return key_block - first;
}

// For one thread; a barrier must follow.
__device__ __forceinline__ void wait_for_earlier(const int32_t* added, int before) {
  while (ptx::ld_acquire(added) < before) {
  }
}

// For one thread, after a barrier: lets the next block add.
__device__ __forceinline__ void release_next(int32_t* added) {
  ptx::red_release_add(added, 1);
}

}  // namespace posattn
