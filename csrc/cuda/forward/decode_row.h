// A row of decoding's packed tile: which query of which head it is, and the logits towards its keys.
#pragma once
#include "bias/dense.h"
#include "bias/gather.h"
#include "common/softcap.h"

namespace posattn {

// Rows past the last one repeat it and are not stored.
struct Row {
  int i;
  int h;
  RowBias bias;
  int64_t dense = 0;
  int64_t boolean = 0;

  __device__ __forceinline__ void start(const ForwardParams& p, const Sequence& s, int kv, int r) {
    const int row = min(r, s.q_len * p.shape.group - 1);
    i = row / p.shape.group;
    h = kv * p.shape.group + row % p.shape.group;
    bias.start(p.bias, p.positions, s, s.batch, h, i);
    if constexpr (DENSE != NO_DENSE) {
      dense = pair_offset(p.bias.dense_strides, s.batch, h, s.q_start + i, s.k_start);
    }
    if constexpr (HAS_BOOLEAN) {
      boolean = pair_offset(p.mask.boolean_strides, s.batch, h, s.q_start + i, s.k_start);
    }
  }

  // The logit towards key j at position `key` from the dot product x; j_in is j, or the last key where j lies past it.
  __device__ __forceinline__ float logit(const ForwardParams& p, const Sequence& s, float x, int j, int j_in,
                                         int64_t key) const {
    if constexpr (SCALE_BEFORE_BIAS) {
      x *= p.scale;
      if constexpr (HAS_SOFTCAP) x = capped(x, p.softcap);
      if constexpr (BY_DISTANCE) x += bias.at(p.bias, key);
      if constexpr (DENSE != NO_DENSE) x += dense_at(p.bias.dense, dense + j_in * p.bias.dense_strides.key);
    }
    bool visible = Allowed(s, p.mask, i, 0)(j);
    if constexpr (HAS_BOOLEAN) visible &= p.mask.boolean[boolean + j_in * p.mask.boolean_strides.key] != 0;
    return visible ? x : -infinity();
  }
};

}  // namespace posattn
