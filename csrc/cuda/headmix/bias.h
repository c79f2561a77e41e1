// A bias one logit at a time: the outer bias of forward and backward, and in the backward pass the operands of the
// inner one that are not functions of the distance alone.
#pragma once
#include "bias/dense.h"
#include "bias/gather.h"
#include "headmix/smem_layout.h"

namespace posattn::headmix {

// Which operands a bias has, for code that serves both biases of a plan.
struct Inner {
  static constexpr bool SLOPE = HAS_SLOPE, SIGN = SIGNED, TABLE = HAS_TABLE, PROFILE = HAS_PROFILE;
  static constexpr int DENSE_TYPE = DENSE;
};
struct Outer {
  static constexpr bool SLOPE = OUTER_SLOPE, SIGN = OUTER_SIGNED, TABLE = OUTER_TABLE, PROFILE = OUTER_PROFILE;
  static constexpr int DENSE_TYPE = OUTER_DENSE;
};
constexpr bool HAS_OUTER = OUTER_SLOPE || OUTER_TABLE || OUTER_PROFILE || OUTER_DENSE != NO_DENSE;

template <int TYPE>
__device__ __forceinline__ float dense_element(const void* bias, int64_t at) {
  if constexpr (TYPE == DENSE_FLOAT32) {
    return static_cast<const float*>(bias)[at];
  } else {
    const uint16_t x = static_cast<const uint16_t*>(bias)[at];
    return TYPE == DENSE_FLOAT16 ? ptx::cvt_f32_f16(x) : bf16_to_float(x);
  }
}

// Knots below y, of p.num_knots ascending ones.
__device__ __forceinline__ int segment_of(const BiasParams& p, float y) {
  int low = 0, high = p.num_knots;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.knots[middle] < y) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One pair of a query and a key; those past the end are taken as the last one.
struct Pair {
  int64_t query, key;  // positions
  int64_t i, j;        // tokens in the tensors

  __device__ __forceinline__ Pair(const PositionParams& positions, const Sequence& s, int i, int j)
      : i(s.q_start + min(i, s.q_len - 1)), j(s.k_start + min(j, s.k_len - 1)) {
    query = EXPLICIT ? positions.q[s.batch * positions.q_batch + this->i] : this->i - s.q_start + s.offset();
    key = EXPLICIT ? positions.k[s.batch * positions.k_batch + this->j] : this->j - s.k_start;
  }
  __device__ __forceinline__ int64_t distance() const { return query - key; }
};

template <class Kind>
__device__ __forceinline__ float bias_of(const BiasParams& p, int batch, int h, const Pair& at) {
  const int64_t d = at.distance();
  float bias = 0.0f;
  if constexpr (Kind::SLOPE) {
    bias = -p.slope[batch * p.slope_batch + h] * static_cast<float>(Kind::SIGN || d >= 0 ? d : -d);
  }
  if constexpr (Kind::TABLE) bias += p.table[h * p.table_head + RowBias::clamped(d, p.table_first, p.table_last)];
  if constexpr (Kind::PROFILE) {
    const float y = p.psi[RowBias::clamped(d, p.psi_first, p.psi_last)] *
                    p.row_scale[RowBias::clamped(at.query, p.row_first, p.row_last)];
    const int line = h * (p.num_knots + 1) + segment_of(p, y);
    bias += fmaf(p.segment_slope[line], y, p.segment_intercept[line]);
  }
  if constexpr (Kind::DENSE_TYPE != NO_DENSE) {
    bias += dense_element<Kind::DENSE_TYPE>(p.dense, pair_offset(p.dense_strides, batch, h, at.i, at.j));
  }
  return bias;
}

// Where a lane's logits lie is common/logits.h's Place: rows row + 8 a, columns column + 8 n + e. s is in base 2.
__device__ __forceinline__ void add_outer(float (&s)[GROUPS][N8][4], const BiasParams& p,
                                          const PositionParams& positions, const Sequence& sequence, int h, int row,
                                          int column) {
  if constexpr (HAS_OUTER) {
#pragma unroll
    for (int x = 0; x < GROUPS * N8 * 4; ++x) {
      const int r = x / 4 / N8, n = x / 4 % N8, e = x % 4;
      const Pair at(positions, sequence, row + 16 * r + e / 2 * 8, column + 8 * n + e % 2);
      s[r][n][e] = fmaf(bias_of<Outer>(p, sequence.batch, h, at), LOG2E, s[r][n][e]);
    }
  }
}

}  // namespace posattn::headmix
