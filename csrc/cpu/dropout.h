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
    const bool none = threshold >> 32 != 0;  // no word reaches it
    const auto least = static_cast<uint32_t>(threshold);
    uint32_t found[4 * BLOCKS];
    for (int64_t block = j / 4; block * 4 < j + n; block += BLOCKS) {
      words(found, bh, i, block);
      const int64_t begin = imax(j - block * 4, 0), end = imin(j + n - block * 4, 4 * BLOCKS);
      float* to = factor + (block * 4 - j);
      for (int64_t c = begin; c < end; ++c) to[c] = !none && found[c] >= least ? keep_scale : 0.0F;
    }
  }

private:
  // One counter a 64-bit lane, of which the upper half holds anything: multiplications read the lower one alone. So a
  // round needs no shuffle, and a key takes a cycle where one block at a time took 15.
  typedef uint64_t vq __attribute__((vector_size(POSATTN_VECTOR_BYTES)));
  static constexpr int LANES = POSATTN_VECTOR_BYTES / 8, VECTORS = 2, BLOCKS = LANES * VECTORS;

  static POSATTN_INLINE vq set_lanes(uint32_t x) { return vq{} + static_cast<uint64_t>(x); }

  // Products of the lower halves.
  static POSATTN_INLINE vq multiply(vq a, vq b) {
#if defined(__AVX512F__)
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFFU) * (b & 0xFFFFFFFFU);
#endif
  }

  // The words of the blocks from `first` on.
  void words(uint32_t* found, int64_t bh, int64_t i, int64_t first) const {
    const vq m0 = set_lanes(0xD2511F53U), m2 = set_lanes(0xCD9E8D57U);
    constexpr uint64_t NUMBERS[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    vq lanes;
    memcpy(&lanes, NUMBERS, sizeof(lanes));
    vq c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      c0[v] = lanes + (static_cast<uint64_t>(first) + static_cast<uint64_t>(v * LANES));
      c1[v] = set_lanes(static_cast<uint32_t>(i)), c2[v] = set_lanes(static_cast<uint32_t>(bh)), c3[v] = vq{};
    }
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      const vq key = set_lanes(k0), other = set_lanes(k1);
      for (int v = 0; v < VECTORS; ++v) {
        const vq a = multiply(m0, c0[v]), b = multiply(m2, c2[v]);
        c0[v] = (b >> 32) ^ c1[v] ^ key, c2[v] = (a >> 32) ^ c3[v] ^ other;
        c1[v] = b, c3[v] = a;
      }
      k0 += 0x9E3779B9U, k1 += 0xBB67AE85U;
    }
    for (int v = 0; v < VECTORS; ++v) {
      // Two words a number, in memory as they follow one another where the lower half comes first.
      static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
      uint64_t low[LANES], high[LANES], both[2 * LANES];
      const vq front = (c0[v] & 0xFFFFFFFFU) | (c1[v] << 32), back = (c2[v] & 0xFFFFFFFFU) | (c3[v] << 32);
      memcpy(low, &front, sizeof(low));
      memcpy(high, &back, sizeof(high));
      for (int l = 0; l < LANES; ++l) both[2 * l] = low[l], both[2 * l + 1] = high[l];
      memcpy(found + 4 * LANES * v, both, sizeof(both));
    }
  }
};

}  // namespace posattn::POSATTN_ISA
