// What the backward passes for sm_80 and sm_90a have in common: a block of keys, the queries it walks, and when it
// may add to them.
#pragma once
#include "backward/spans.h"
#include "backward/warps.h"
#include "common/dq_semaphore.h"
#include "common/load.h"

namespace posattn {

struct KeyBlock {
  const BackwardParams& p;
  Sequence sequence;
  int index;  // of the sequence
  int key_head;
  int key_block;
  QuerySpans spans;
  int thread;
  int warp;
  int lane;
  uint32_t first_row;  // of the sequence, in padded rows

  __device__ __forceinline__ KeyBlock(const BackwardParams& p, const Sequence& sequence, int index, int key_head,
                                      int key_block)
      : p(p),
        sequence(sequence),
        index(index),
        key_head(key_head),
        key_block(key_block),
        spans(sequence, p.mask, key_block * BLOCK_N, key_block * BLOCK_N + BLOCK_N - 1),
        thread(threadIdx.x),
        warp(thread / WARP),
        lane(thread % WARP),
        first_row(first_query_block<BLOCK_M>(p.shape, sequence, index) * BLOCK_M) {
    if constexpr (REACH) {
      spans.lo = max(spans.lo, reach()[0]);
      spans.hi = min(spans.hi, reach()[1]);
    }
  }

  // Volatile, so that it is read again rather than kept.
  __device__ __forceinline__ const volatile int32_t* reach() const {
    const int64_t at = block_of_all<BLOCK_N>(p.shape, sequence, index, key_block);
    return p.reach + 2 * (at * (p.shape.heads / p.shape.group) + key_head);
  }

  // spans.lo and spans.hi.
  __device__ __forceinline__ int first() const {
    if constexpr (!REACH) return spans.lo;
    const QuerySpans seen(sequence, p.mask, key_block * BLOCK_N, key_block * BLOCK_N + BLOCK_N - 1);
    return max(seen.lo, reach()[0]);
  }
  __device__ __forceinline__ int end() const {
    if constexpr (!REACH) return spans.hi;
    if constexpr (!HAS_LEFT) return reach()[1];
    const QuerySpans seen(sequence, p.mask, key_block * BLOCK_N, key_block * BLOCK_N + BLOCK_N - 1);
    return min(seen.hi, reach()[1]);
  }

  __device__ __forceinline__ Cursor first_block(int head) const {
    const int block = first();
    return {head, block, head * static_cast<uint32_t>(p.rows) + first_row + block * BLOCK_M};
  }

  // Starts the copies of the block's keys and values.
  template <class Layout>
  __device__ __forceinline__ void load_keys(uint32_t keys, uint32_t values) const {
    const int64_t batch = sequence.batch;
    const int j0 = key_block * BLOCK_N;
    Loader<PADDED, DIM, BLOCK_N, THREADS, Layout> k(
        static_cast<const Element*>(p.k) + batch * p.k_strides.batch + key_head * p.k_strides.head, p.k_strides.token,
        sequence.k_start + j0, keys, thread);
    k.next(0, sequence.k_len - j0);
    Loader<PADDED, DIM_V, BLOCK_N, THREADS, Layout> v(
        static_cast<const Element*>(p.v) + batch * p.v_strides.batch + key_head * p.v_strides.head, p.v_strides.token,
        sequence.k_start + j0, values, thread);
    v.next(0, sequence.k_len - j0);
  }

  // Of the first block of queries with the last of this block's keys; blocks of queries are a multiple of 4 apart.
  __device__ __forceinline__ int first_diagonal() const {
    return sequence.offset() - (key_block * BLOCK_N + BLOCK_N - 1) - p.first_distance;
  }

  // Adds to the dQ of a block of queries, after the blocks of earlier keys if ORDERED.
  template <class Add>
  __device__ __forceinline__ void in_order(const Cursor& at, int thread, Add add) const {
    int32_t* added = p.dq_semaphore + 1 + at.row / BLOCK_M;
    if constexpr (ORDERED) {
      int before = blocks_before<BLOCK_N>(key_block, sequence, p.mask, at.block * BLOCK_M);
      if (thread == 0) {
        if constexpr (REACH) {
          const int64_t block = first_row / BLOCK_M + at.block;
          before = min(before, key_block - p.first[block * (p.shape.heads / p.shape.group) + key_head]);
        }
        wait_for_earlier(added, before);
      }
      ptx::bar_sync();
    }
    add();
    if constexpr (ORDERED) {
      ptx::bar_sync();
      if (thread == 0) release_next(added);
    }
  }
};

// A launch has a block for each block of keys, of each key head of each sequence.
template <class Backward>
__device__ __forceinline__ void run_block(const BackwardParams& p, unsigned char* shared) {
  const int number = block_number(p.dq_semaphore, shared);
  const int key_block = number % p.shape.k_blocks;
  const int key_heads = p.shape.heads / p.shape.group;
  const int index = number / p.shape.k_blocks / key_heads;
  const Sequence sequence(p.shape, p.mask, index);
  if (key_block * BLOCK_N >= sequence.k_len) return;
  Backward(p, sequence, index, number / p.shape.k_blocks % key_heads, key_block).run();
}

}  // namespace posattn
