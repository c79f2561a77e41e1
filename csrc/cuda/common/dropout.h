// Dropout's keep mask: Philox4x32-10 (Salmon et al. 2011), the same numbers as every other backend draws.
//
// Element (b, h, i, j) is kept where lane j & 3 of the counter (j >> 2, i, b * Hq + h, 0) is at least the threshold. i
// and j count in the tensors' token axes.
#pragma once
#include "common/mask.h"

namespace posattn {

struct Dropout {
  uint32_t threshold, key_low, key_high, bh;

  __device__ __forceinline__ Dropout(const DropoutParams& p, uint32_t bh) : threshold(p.threshold), bh(bh) {
    const uint64_t seed = HAS_DROPOUT ? static_cast<uint64_t>(__ldg(p.seed)) : 0;
    key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  }

  __device__ __forceinline__ void words(uint32_t (&word)[4], uint32_t i, uint32_t group) const {
    uint32_t k0 = key_low, k1 = key_high;
    word[0] = group, word[1] = i, word[2] = bh, word[3] = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t a = word[0], c = word[2];
      word[0] = __umulhi(0xCD9E8D57u, c) ^ word[1] ^ k0;
      word[2] = __umulhi(0xD2511F53u, a) ^ word[3] ^ k1;
      word[1] = 0xCD9E8D57u * c;
      word[3] = 0xD2511F53u * a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // Whether elements (i, j) and (i, j + 1) are kept. An odd j may need two counters; only where keys are not aligned is
  // there one.
  __device__ __forceinline__ void pair(bool (&keep)[2], uint32_t i, uint32_t j) const {
    uint32_t word[4];
    words(word, i, j >> 2);
    const uint32_t at = j & 3;
    keep[0] = (at == 0 ? word[0] : at == 1 ? word[1] : at == 2 ? word[2] : word[3]) >= threshold;
    if (UNALIGNED_KEYS && at == 3) words(word, i, (j >> 2) + 1);
    keep[1] = (at == 3 ? word[0] : at == 0 ? word[1] : at == 1 ? word[2] : word[3]) >= threshold;
  }
};

}  // namespace posattn
