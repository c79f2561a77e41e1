// Where a warp's part of the logits lies, keys by queries, and which of its elements share a distance.
//
// Lane 4 g + t holds, of each fragment, keys g and g + 8 at queries 2t and 2t + 1. So the distances that it meets
// differ by 8 from band to band: a lane's 4 GROUPS EIGHTS logits have only 2 BANDS distances, and whatever depends on
// the distance alone is computed or looked up once a band and parity, not once an element.
#pragma once
#include "backward/warps.h"
#include "common/mask.h"

namespace posattn {

constexpr int BANDS = Logits::EIGHTS + 2 * Logits::GROUPS - 1;
constexpr int BANDS_BEFORE = 2 * Logits::GROUPS - 1;  // bands below the distance of the warp's first query and key

__device__ constexpr int band(int group, int n, int e) {
  return n - 2 * group - (e >> 1) + BANDS_BEFORE;
}

using Banded = float[BANDS][2];

// A slope's bias is a sum of a number for the query and one for the key where no visible distance is negative.
constexpr bool SLOPE_IS_LINEAR = HAS_SLOPE && LINEAR && !EXPLICIT;
// The query's number, counted from its block's first, is in the log-sum-exp already.
constexpr bool LSE_HAS_SLOPE = SLOPE_IS_LINEAR && SM90;
// Its gradient's sums over queries are then more columns of the product dK += dS^T Q, unless softcap makes that dS
// another.
constexpr bool SLOPE_BY_PRODUCT = WANT_SLOPE && SLOPE_IS_LINEAR && !HAS_SOFTCAP;

// A warp's part of the logits: its first query and key inside the sequence, and the lane.
struct LogitPlace {
  int i0;
  int j0;
  int g;
  int t;

  __device__ __forceinline__ int query(int n, int e) const { return i0 + 8 * n + 2 * t + (e & 1); }
  __device__ __forceinline__ int key(int group, int e) const { return j0 + 16 * group + g + 8 * (e >> 1); }
  // In the tensors' token axes; past the end, the last one.
  __device__ __forceinline__ int64_t query_token(const Sequence& s, int n, int e) const {
    return s.q_start + min(query(n, e), s.q_len - 1);
  }
  __device__ __forceinline__ int64_t key_token(const Sequence& s, int group, int e) const {
    return s.k_start + min(key(group, e), s.k_len - 1);
  }
  // The distance of band 0, parity 0, of implicit positions; the others are 8 band + parity more.
  __device__ __forceinline__ int first_distance(int shift) const {
    return i0 + shift - j0 + 2 * t - g - 8 * BANDS_BEFORE;
  }
};

template <class F>
__device__ __forceinline__ void for_bands(F f) {
#pragma unroll
  for (int k = 0; k < BANDS; ++k) {
#pragma unroll
    for (int c = 0; c < 2; ++c) f(k, c);
  }
}

// f(group, n, e) for every element of a warp's logits.
template <class F>
__device__ __forceinline__ void for_logits(F f) {
#pragma unroll
  for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
    for (int n = 0; n < Logits::EIGHTS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(group, n, e);
    }
  }
}

}  // namespace posattn
