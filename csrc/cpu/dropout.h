// Counter-based dropout: element (b, h, i, j) is kept or dropped by Philox4x32-10 alone (Salmon et al. 2011), so the
// backward pass finds the forward pass's mask without storing it.
#pragma once

#include "logits.h"

namespace posattn::POSATTN_ISA {

struct Dropout {
  uint32_t key0 = 0, key1 = 0;
  uint64_t threshold = 0;  // kept words are at least this
  float keep_scale = 1.0F;

  explicit Dropout(const Problem& p)
      : key0(static_cast<uint32_t>(p.seed)),
        key1(static_cast<uint32_t>(p.seed >> 32)),
        threshold(least_at(p.dropout_p * 4294967296.0)),
        keep_scale(static_cast<float>(1.0 / (1.0 - p.dropout_p))) {}

  static uint64_t least_at(double bound) {
    const auto whole = static_cast<uint64_t>(bound);
    return static_cast<double>(whole) < bound ? whole + 1 : whole;
  }

  // factor[c] = 0 where key j + c of row i is dropped, else 1 / (1 - p); i and j count in the tensors, not in a
  // sequence. A Philox block's four words belong to four neighbouring keys.
  void row(float* factor, int64_t bh, int64_t i, int64_t j, int64_t n) const {
    for (int64_t block = j / 4; block * 4 < j + n; ++block) {
      uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(i), c2 = static_cast<uint32_t>(bh), c3 = 0;
      uint32_t k0 = key0, k1 = key1;
      for (int round = 0; round < 10; ++round) {
        uint64_t a = static_cast<uint64_t>(0xD2511F53U) * c0, b = static_cast<uint64_t>(0xCD9E8D57U) * c2;
        uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a), c0 = n0, c2 = n2;
        k0 += 0x9E3779B9U, k1 += 0xBB67AE85U;
      }
      const uint32_t lanes[4] = {c0, c1, c2, c3};
      for (int lane = 0; lane < 4; ++lane) {
        int64_t at = block * 4 + lane - j;
        if (at >= 0 && at < n) factor[at] = lanes[lane] >= threshold ? keep_scale : 0.0F;
      }
    }
  }
};

}  // namespace posattn::POSATTN_ISA
