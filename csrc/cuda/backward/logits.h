// Logits of one warp's part of a tile, keys by queries, recomputed from the products with what the plan adds.
#pragma once
#include "backward/segments.h"
#include "bias/dense.h"

namespace posattn {

// One query head's share of the operands.
struct HeadBias {
  float slope;
  const float* table;
  const float* segment_slope;
  const float* segment_intercept;

  __device__ __forceinline__ HeadBias(const BiasParams& bias, int batch, int head) {
    if constexpr (HAS_SLOPE) slope = bias.slope[batch * bias.slope_batch + head];
    if constexpr (HAS_TABLE) table = bias.table + head * bias.table_head;
    if constexpr (HAS_PROFILE) {
      segment_slope = bias.segment_slope + head * (KNOTS + 1);
      segment_intercept = bias.segment_intercept + head * (KNOTS + 1);
    }
  }
};

constexpr bool STRIPS = (HAS_TABLE || HAS_PROFILE) && !EXPLICIT;

// What a stage of the pipeline holds of a tile's queries and distances, in floats: the log-sum-exp in base 2, -delta,
// the row scale, and strips of the table and of psi, from at most three below the least distance of the tile to the
// greatest.
struct RowStage {
  static constexpr int STRIP = BLOCK_M + BLOCK_N + 4;
  static constexpr int LSE2 = 0;
  static constexpr int MINUS_DELTA = BLOCK_M;
  static constexpr int SCALE = 2 * BLOCK_M;
  static constexpr int TABLE = SCALE + (HAS_PROFILE ? BLOCK_M : 0);
  static constexpr int PSI = TABLE + (HAS_TABLE && STRIPS ? STRIP : 0);
  static constexpr int FLOATS = PSI + (HAS_PROFILE && STRIPS ? STRIP : 0);
};

// Everything on a warp's logits that is looked up by distance, row or position.
struct Operands {
  Banded distance;
  Banded table;
  Banded psi;
  float scale[Logits::EIGHTS][2];
  int64_t q_position[Logits::EIGHTS][2];
  int64_t k_position[Logits::GROUPS][2];

  __device__ __forceinline__ Operands(const BackwardParams& p, const Sequence& s, const LogitPlace& at,
                                      const float* rows, int strip, int column) {
    if constexpr (EXPLICIT) {
      const int64_t* q = p.positions.q + s.batch * p.positions.q_batch;
      const int64_t* k = p.positions.k + s.batch * p.positions.k_batch;
#pragma unroll
      for (int n = 0; n < Logits::EIGHTS; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) q_position[n][e] = q[at.query_token(s, n, e)];
      }
#pragma unroll
      for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
        for (int e = 0; e < 2; ++e) k_position[group][e] = k[at.key_token(s, group, 2 * e)];
      }
    } else {
      if constexpr (HAS_SLOPE && (!SLOPE_IS_LINEAR || (WANT_SLOPE && !SLOPE_BY_PRODUCT))) {
        // One conversion for all: the other distances are small whole numbers away, exact in float32 as far as 2^24.
        const float first = static_cast<float>(at.first_distance(s.offset()));
        for_bands([&](int k, int c) { distance[k][c] = first + static_cast<float>(8 * k + c); });
      }
      if constexpr (HAS_TABLE) {
        for_bands([&](int k, int c) { table[k][c] = rows[RowStage::TABLE + strip + 8 * k + c]; });
      }
      if constexpr (HAS_PROFILE) {
        for_bands([&](int k, int c) { psi[k][c] = rows[RowStage::PSI + strip + 8 * k + c]; });
      }
    }
    if constexpr (HAS_PROFILE) {
#pragma unroll
      for (int n = 0; n < Logits::EIGHTS; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(rows + RowStage::SCALE + column + 8 * n);
        scale[n][0] = pair.x;
        scale[n][1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ int64_t apart(int group, int n, int e) const {
    return q_position[n][e & 1] - k_position[group][e >> 1];
  }
  __device__ __forceinline__ int entry(int group, int n, int e, int first, int last) const {
    const int64_t d = apart(group, n, e);
    return static_cast<int>(d < first ? 0 : d > last ? last - first : d - first);
  }

  // |d|, or d if the slope is signed.
  __device__ __forceinline__ float distance_of(int group, int n, int e) const {
    float d;
    if constexpr (EXPLICIT) {
      d = static_cast<float>(apart(group, n, e));
    } else {
      d = distance[band(group, n, e)][e & 1];
    }
    return SIGNED ? d : fabsf(d);
  }

  __device__ __forceinline__ float table_at(const BiasParams& bias, const HeadBias& head, int group, int n,
                                            int e) const {
    if constexpr (EXPLICIT) {
      return __ldg(head.table + entry(group, n, e, bias.table_first, bias.table_last));
    } else {
      return table[band(group, n, e)][e & 1];
    }
  }

  __device__ __forceinline__ float psi_at(const BiasParams& bias, int group, int n, int e) const {
    if constexpr (EXPLICIT) {
      return __ldg(bias.psi + entry(group, n, e, bias.psi_first, bias.psi_last));
    } else {
      return psi[band(group, n, e)][e & 1];
    }
  }

  __device__ __forceinline__ float y_at(const BiasParams& bias, int group, int n, int e) const {
    return psi_at(bias, group, n, e) * scale[n][e & 1];
  }

  // The range of explicit positions, from the elements themselves.
  __device__ __forceinline__ SegmentRange segments(const BiasParams& bias) const {
    float least = infinity(), most = -infinity();
    for_logits([&](int group, int n, int e) {
      const float y = y_at(bias, group, n, e);
      least = fminf(least, y);
      most = fmaxf(most, y);
    });
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
      least = fminf(least, ptx::shfl_bfly(least, mask));
      most = fmaxf(most, ptx::shfl_bfly(most, mask));
    }
    return SegmentRange(bias, least, most);
  }
};

// s += the profile in base 2, of several segments: the line of each element's own, since a line bent by changes of
// slope would cancel where a steep segment lies before a flat one.
__device__ __forceinline__ void add_segments(Fragments<Logits>& s, const BackwardParams& p, const Operands& of,
                                             const HeadBias& head, const SegmentRange& segments) {
  // By eighths of the queries: beside s this holds the values of one.
#pragma unroll
  for (int n = 0; n < Logits::EIGHTS; ++n) {
    float y[4 * Logits::GROUPS], value[4 * Logits::GROUPS];
    const float first = head.segment_slope[segments.low], level = head.segment_intercept[segments.low];
#pragma unroll
    for (int x = 0; x < 4 * Logits::GROUPS; ++x) {
      y[x] = of.y_at(p.bias, x / 4, n, x % 4);
      value[x] = fmaf(y[x], first, level);
    }
#pragma unroll 1
    for (int m = segments.low; m < segments.high; ++m) {
      const float knot = p.bias.knots[m], slope = head.segment_slope[m + 1], intercept = head.segment_intercept[m + 1];
#pragma unroll
      for (int x = 0; x < 4 * Logits::GROUPS; ++x) value[x] = y[x] > knot ? fmaf(y[x], slope, intercept) : value[x];
    }
#pragma unroll
    for (int x = 0; x < 4 * Logits::GROUPS; ++x) s[x / 4][n][x % 4] = fmaf(value[x], LOG2E, s[x / 4][n][x % 4]);
  }
}

// The products s become logits in base 2, less the log-sum-exp of their query; slack is softcap's derivative.
__device__ __forceinline__ void add_terms(Fragments<Logits>& s, Fragments<Logits>& slack, const BackwardParams& p,
                                          const Sequence& sequence, const LogitPlace& at, const Operands& of,
                                          const HeadBias& head, const SegmentRange& segments, int head_index,
                                          const float* lse2) {
  float rows[Logits::EIGHTS][2];  // of a query: -lse2, and the profile's line
  float lines[Logits::EIGHTS][2];
  // The line that all elements have in common.
  const bool straight = HAS_PROFILE && segments.low == segments.high;
  const float steepness = straight ? head.segment_slope[segments.low] * LOG2E : 0.0f;
  const float intercept = straight ? head.segment_intercept[segments.low] * LOG2E : 0.0f;
#pragma unroll
  for (int n = 0; n < Logits::EIGHTS; ++n) {
    const float2 pair = *reinterpret_cast<const float2*>(lse2 + 8 * n);
    rows[n][0] = HAS_PROFILE ? intercept - pair.x : -pair.x;
    rows[n][1] = HAS_PROFILE ? intercept - pair.y : -pair.y;
    if constexpr (HAS_PROFILE) {
      lines[n][0] = steepness * of.scale[n][0];
      lines[n][1] = steepness * of.scale[n][1];
    }
  }
  const float slope = HAS_SLOPE ? -head.slope * LOG2E : 0.0f;
  float keys[Logits::GROUPS][2];
  if constexpr (SLOPE_IS_LINEAR) {
    // slope (i - j) in two parts, one for each query and one for each key.
    if constexpr (!LSE_HAS_SLOPE) {
#pragma unroll
      for (int n = 0; n < Logits::EIGHTS; ++n) {
        rows[n][0] = fmaf(slope, static_cast<float>(8 * n), rows[n][0]);
        rows[n][1] = fmaf(slope, static_cast<float>(8 * n + 1), rows[n][1]);
      }
    }
    const int query = at.i0 + (LSE_HAS_SLOPE ? 0 : 2 * at.t);
    const float first = static_cast<float>(query + sequence.offset() - at.j0 - at.g);
#pragma unroll
    for (int x = 0; x < 2 * Logits::GROUPS; ++x) keys[x / 2][x % 2] = slope * (first - static_cast<float>(8 * x));
  }
  for_logits([&](int group, int n, int e) {
    float term = rows[n][e & 1];
    if constexpr (SLOPE_IS_LINEAR) {
      term += keys[group][e >> 1];
    } else if constexpr (HAS_SLOPE) {
      term = fmaf(slope, of.distance_of(group, n, e), term);
    }
    if constexpr (HAS_TABLE) term = fmaf(of.table_at(p.bias, head, group, n, e), LOG2E, term);
    if constexpr (HAS_PROFILE) term = fmaf(lines[n][e & 1], of.psi_at(p.bias, group, n, e), term);
    if constexpr (DENSE != NO_DENSE) {
      const int64_t place = pair_offset(p.bias.dense_strides, sequence.batch, head_index,
                                        at.query_token(sequence, n, e), at.key_token(sequence, group, e));
      term = fmaf(dense_at(p.bias.dense, place), LOG2E, term);
    }
    float& x = s[group][n][e];
    if constexpr (HAS_SOFTCAP) {
      // tanh z = 1 - 2 / (1 + e^2z), right at both ends.
      const float y = x * (p.scale / p.softcap);
      const float tanh = 1.0f - 2.0f / (1.0f + ptx::ex2_approx(y * (2.0f * LOG2E)));
      slack[group][n][e] = 1.0f - tanh * tanh;
      x = fmaf(tanh, p.softcap * LOG2E, term);
    } else {
      x = fmaf(x, p.scale2, term);
    }
  });
  if constexpr (HAS_PROFILE) {
    if (!straight) add_segments(s, p, of, head, segments);
  }
}

// -inf where the query may not see the key.
__device__ __forceinline__ void mask_logits(Fragments<Logits>& s, const BackwardParams& p, const Sequence& sequence,
                                            const LogitPlace& at, int head, bool border) {
  if (border) {
    const int offset = sequence.offset();
#pragma unroll
    for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The queries that see this key, counted from the lane's first one.
        const int j = at.key(group, 2 * half);
        const int here = j - offset - at.i0 - 2 * at.t;
        const int least = j >= sequence.k_len ? BLOCK_M : HAS_RIGHT ? here - p.mask.right : 0;
        const int most = HAS_LEFT ? here + p.mask.left : BLOCK_M;
#pragma unroll
        for (int n = 0; n < Logits::EIGHTS; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 8 * n + e;
            if (i < least || (HAS_LEFT && i > most)) s[group][n][2 * half + e] = -infinity();
          }
        }
      }
    }
  }
  if constexpr (HAS_BOOLEAN) {
    const PairStrides& stride = p.mask.boolean_strides;
    const uint8_t* boolean = p.mask.boolean + sequence.batch * stride.batch + head * stride.head;
    for_logits([&](int group, int n, int e) {
      const int64_t i = sequence.q_start + min(at.query(n, e), sequence.q_len - 1);
      const int64_t j = sequence.k_start + min(at.key(group, e), sequence.k_len - 1);
      if (!__ldg(boolean + i * stride.query + j * stride.key)) s[group][n][e] = -infinity();
    });
  }
}

}  // namespace posattn
