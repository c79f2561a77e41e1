// Which keys a block of queries sees: ranges of whole tiles, and the element mask of a tile on their border.
//
// Everything here counts inside one sequence. Key j is allowed for query i where
// i + offset - left <= j <= i + offset + right and j < k_len; causal attention is right = 0. Only border tiles need the
// element mask, so a kernel walks three spans: left border, full, right border.
#pragma once
#include "params.h"

namespace posattn {

// Keys of a sequence may begin at any token, so what goes by groups of tokens cannot go by groups of its keys.
constexpr bool UNALIGNED_KEYS = PACKED || HAS_K_STARTS;

// One sequence's tokens: where they begin in the tensors' token axes, and how many there are.
struct Sequence {
  int batch;  // in the tensors: 0 for packed documents
  int q_start = 0;
  int k_start = 0;
  int q_len;
  int k_len;
  int given_offset = 0;

  __device__ __forceinline__ Sequence(const ShapeParams& shape, const MaskParams& mask, int index)
      : batch(index), q_len(shape.q_tokens), k_len(shape.k_tokens) {
    if constexpr (PACKED) {
      batch = 0;
      q_start = mask.cu_q[index];
      k_start = mask.cu_k[index];
      q_len = mask.cu_q[index + 1] - q_start;
      k_len = mask.cu_k[index + 1] - k_start;
    }
    if constexpr (HAS_K_LENGTHS) k_len = mask.k_lengths[index];
    if constexpr (HAS_K_STARTS) {
      k_start = mask.k_starts[index];
      k_len -= k_start;
    }
    if constexpr (HAS_OFFSET) given_offset = mask.offset - (HAS_K_STARTS ? k_start : 0);
    if constexpr (HAS_OFFSETS) given_offset = mask.offsets[index] - (HAS_K_STARTS ? k_start : 0);
  }

  // Query i sits at key i + offset. The default is computed anew, for a register is dearer.
  __device__ __forceinline__ int offset() const { return HAS_OFFSET || HAS_OFFSETS ? given_offset : k_len - q_len; }
};

// The number of a sequence's block of KEYS keys among the blocks of all sequences. Packed documents count by tokens,
// for one of them may be far longer than the others.
template <int KEYS>
__device__ __forceinline__ int block_of_all(const ShapeParams& shape, const Sequence& s, int index, int block) {
  return (PACKED ? s.k_start / KEYS + index : index * shape.k_blocks) + block;
}

// The number of a sequence's first block of QUERIES queries, counted the same way.
template <int QUERIES>
__device__ __forceinline__ int first_query_block(const ShapeParams& shape, const Sequence& s, int index) {
  return PACKED ? s.q_start / QUERIES + index : index * shape.q_blocks;
}

// The keys that queries first .. last see lie in [lo, hi), and each of them sees all of [full_lo, full_hi). All but hi
// are multiples of BLOCK_N.
struct KeySpans {
  int lo = 0;
  int full_lo = 0;
  int full_hi;
  int hi;

  __device__ __forceinline__ KeySpans(const Sequence& s, const MaskParams& mask, int first, int last) {
    hi = full_hi = s.k_len;
    if constexpr (HAS_LEFT) {
      lo = max(first + s.offset() - mask.left, 0) / BLOCK_N * BLOCK_N;
      full_lo = ceil_div(max(last + s.offset() - mask.left, 0), BLOCK_N) * BLOCK_N;
    }
    if constexpr (HAS_RIGHT) {
      hi = min(max(last + s.offset() + mask.right + 1, 0), s.k_len);
      full_hi = min(max(first + s.offset() + mask.right + 1, 0), s.k_len);
    }
    full_lo = min(full_lo, ceil_div(hi, BLOCK_N) * BLOCK_N);
    full_hi = max(full_lo, full_hi / BLOCK_N * BLOCK_N);
  }

  // The part of the spans that falls to one of several blocks; from and to are multiples of BLOCK_N.
  __device__ __forceinline__ void clip(int from, int to) {
    lo = max(lo, from);
    hi = min(hi, to);
    full_lo = min(max(full_lo, from), to);
    full_hi = min(max(full_hi, from), to);
  }
};

// The keys that `pairs` pairs of reach at `reach` have, of one block of queries: the first, and the end, in tiles of
// KEYS.
template <int KEYS>
struct KeysInReach {
  int first;
  int end;

  __device__ __forceinline__ KeysInReach(const int32_t* reach, int pairs) {
    first = reach[0];
    end = reach[1];
    for (int n = 1; n < pairs; ++n) {
      first = min(first, reach[2 * n]);
      end = max(end, reach[2 * n + 1]);
    }
    first = first / KEYS * KEYS;
    end = ceil_div(end, KEYS) * KEYS;
  }
};

// The columns of row i that are allowed, from least to most, counted from column j0.
struct Allowed {
  int least;
  int most;

  __device__ __forceinline__ Allowed(const Sequence& s, const MaskParams& mask, int i, int j0) {
    least = HAS_LEFT ? i + s.offset() - mask.left - j0 : 0;
    most = s.k_len - 1 - j0;
    if constexpr (HAS_RIGHT) most = min(most, i + s.offset() + mask.right - j0);
  }

  __device__ __forceinline__ bool operator()(int column) const {
    return column <= most && (!HAS_LEFT || column >= least);
  }
};

}  // namespace posattn
