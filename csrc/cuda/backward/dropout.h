// Dropout on a warp's logits, keys by queries.
//
// A counter gives words to four neighbouring keys of one query, which here are the keys of four lanes (g mod 4). Each
// of them computes a quarter of their counters, and they exchange words by a transposition. Where keys
// may begin anywhere, each element computes its own counter.
#pragma once
#include "backward/bands.h"
#include "common/dropout.h"

namespace posattn {

// Lane r of the four holds row r of a 4 x 4 matrix before, and column r after.
__device__ __forceinline__ void transpose(uint32_t (&v)[4], int r) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (x & bit) continue;
      const bool upper = r & bit;
      const uint32_t received = ptx::shfl_bfly(upper ? v[x] : v[x + bit], 4 * bit);
      v[x] = upper ? received : v[x];
      v[x + bit] = upper ? v[x + bit] : received;
    }
  }
}

// What is kept of weights and of their gradients is scaled, what is dropped is zero.
__device__ __forceinline__ void drop(Fragments<Logits>& weights, Fragments<Logits>& grads, const BackwardParams& p,
                                     const Sequence& sequence, const LogitPlace& at, int head) {
  const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + head);
  const auto apply = [&](int group, int n, int e, uint32_t word) {
    const float factor = word >= dropout.threshold ? p.dropout.keep_scale : 0.0f;
    weights[group][n][e] *= factor;
    grads[group][n][e] *= factor;
  };
  if constexpr (UNALIGNED_KEYS) {
    for_logits([&](int group, int n, int e) {
      const uint32_t j = sequence.k_start + at.key(group, e);
      uint32_t word[4];
      dropout.words(word, sequence.q_start + at.query(n, e), j >> 2);
      const uint32_t low = j & 1 ? word[1] : word[0], high = j & 1 ? word[3] : word[2];
      apply(group, n, e, j & 2 ? high : low);
    });
  } else {
    const int r = at.g & 3;
#pragma unroll
    for (int x = 0; x < 2 * Logits::GROUPS; ++x) {
      const uint32_t keys = at.key(x / 2, x % 2 * 2) >> 2;
#pragma unroll
      for (int four = 0; four < Logits::EIGHTS / 2; ++four) {
        uint32_t word[4];
        dropout.words(word, at.query(2 * four + r / 2, r % 2), keys);
        transpose(word, r);
#pragma unroll
        for (int y = 0; y < 4; ++y) apply(x / 2, 2 * four + y / 2, x % 2 * 2 + y % 2, word[y]);
      }
    }
  }
}

}  // namespace posattn
