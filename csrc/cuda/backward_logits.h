// Logits of one warp's part of a tile, keys by queries, recomputed from the products with what the plan adds.
//
// Lane 4 g + t holds, of each fragment, keys g and g + 8 at queries 2t and 2t + 1. So the distances that it meets
// differ by 8 from band to band: a lane's 4 GROUPS EIGHTS logits have only 2 BANDS distances, and whatever depends on
// the distance alone is computed or looked up once a band and parity, not once an element.
#pragma once
#include "backward_warps.h"
#include "dense.h"
#include "mask.h"

namespace posattn {

constexpr int BANDS = Logits::EIGHTS + 2 * Logits::GROUPS - 1;
constexpr int BANDS_BEFORE = 2 * Logits::GROUPS - 1;  // bands below the distance of the warp's first query and key

__device__ constexpr int band(int group, int n, int e) {
  return n - 2 * group - (e >> 1) + BANDS_BEFORE;
}

using Banded = float[BANDS][2];

// A slope's bias is a sum of a number for the query and one for the key where no visible distance is negative.
constexpr bool SLOPE_IS_LINEAR = HAS_SLOPE && LINEAR && !EXPLICIT;
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

// The segments of the profile that a warp's logits can meet, from the lowest to the highest.
struct SegmentRange {
  int low = 0;
  int high = 0;

  SegmentRange() = default;

  __device__ __forceinline__ SegmentRange(const BiasParams& bias, float least, float most) {
#pragma unroll 1
    for (int m = 0; m < KNOTS; ++m) {
      const float knot = __ldg(bias.knots + m);
      low += knot < least;
      high += knot < most;
    }
  }
};

// The ranges of 32 blocks of queries at a time, one for each lane, so that a step takes one shuffle.
//
// They come from the host's bounds of psi over the tile's distances and of the row scale over its rows: too wide at
// worst.
struct SegmentRanges {
  uint32_t packed = 0;

  // `at` is the warp's place in the first of the blocks.
  __device__ __forceinline__ void find(const BiasParams& bias, const LogitPlace& at, int shift, int lane) {
    static_assert(8 * BANDS + 7 <= BOUNDS_BLOCK && WARP_QUERIES <= BOUNDS_BLOCK);
    const int i0 = at.i0 + lane * BLOCK_M;
    const float2 psi = bounds(bias.psi_bounds, i0 + shift - at.j0 - (WARP_KEYS - 1), bias.psi_first, bias.psi_last);
    const float2 row = bounds(bias.row_bounds, i0 + shift, bias.row_first, bias.row_last);
    const float a = psi.x * row.x, b = psi.x * row.y, c = psi.y * row.x, d = psi.y * row.y;
    const SegmentRange range(bias, fminf(fminf(a, b), fminf(c, d)), fmaxf(fmaxf(a, b), fmaxf(c, d)));
    packed = range.low | range.high << 16;
  }

  __device__ __forceinline__ SegmentRange of(int block) const {
    const uint32_t both = ptx::shfl_idx(packed, block);
    SegmentRange range;
    range.low = both & 0xffff;
    range.high = both >> 16;
    return range;
  }

private:
  __device__ static __forceinline__ float2 bounds(const float* of, int index, int first, int last) {
    const int block = (min(max(index, first), last) - first) / BOUNDS_BLOCK;
    return __ldg(reinterpret_cast<const float2*>(of) + block);
  }
};

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
        const float first = static_cast<float>(at.first_distance(s.shift()));
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

// The products s become logits in base 2, less the log-sum-exp of their query; slack is softcap's derivative.
__device__ __forceinline__ void add_terms(Fragments<Logits>& s, Fragments<Logits>& slack, const BackwardParams& p,
                                          const Sequence& sequence, const LogitPlace& at, const Operands& of,
                                          const HeadBias& head, const SegmentRange& segments, int head_index,
                                          const float* lse2) {
  float rows[Logits::EIGHTS][2];  // of a query: -lse2, and the profile's line
  float lines[Logits::EIGHTS][2];
  const float steepness = HAS_PROFILE ? head.segment_slope[segments.low] * LOG2E : 0.0f;
  const float intercept = HAS_PROFILE ? head.segment_intercept[segments.low] * LOG2E : 0.0f;
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
#pragma unroll
    for (int n = 0; n < Logits::EIGHTS; ++n) {
      rows[n][0] = fmaf(slope, static_cast<float>(8 * n), rows[n][0]);
      rows[n][1] = fmaf(slope, static_cast<float>(8 * n + 1), rows[n][1]);
    }
    const float first = static_cast<float>(at.i0 + 2 * at.t + sequence.shift() - at.j0 - at.g);
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
    // Each knot inside the tile bends the line from it on.
    float before = head.segment_slope[segments.low];
    for (int m = segments.low; m < segments.high; ++m) {
      const float after = head.segment_slope[m + 1], knot = p.bias.knots[m];
      const float bend = (after - before) * LOG2E;
      for_logits([&](int group, int n, int e) {
        s[group][n][e] = fmaf(bend, fmaxf(of.y_at(p.bias, group, n, e) - knot, 0.0f), s[group][n][e]);
      });
      before = after;
    }
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
