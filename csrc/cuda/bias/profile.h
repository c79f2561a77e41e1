// Profile: a piecewise linear function of y = psi[distance] * row_scale[position], on a warp's tile.
//
// Bounds of psi over runs of distances and of the row scale over runs of rows give the lowest and the highest segment
// that y can meet on the tile: never too narrow, as rounding is monotone. Most tiles hold no knot, and their line is
// one FMA a logit. Elsewhere each logit takes the line of its own segment, a comparison, an FMA and a selection a knot:
// a line bent by changes of slope would cancel where a steep segment lies before a flat one.
#pragma once
#include "common/mask.h"
#include "ptx/ptx.h"

namespace posattn {

// Segments low .. high of the profile, and the line that all logits of the tile have in common: 0 if there are several.
struct Segments {
  int low = 0;
  int high = 0;
  float slope = 0.0f;
  float intercept = 0.0f;
};

template <int GROUPS>
struct Profile {
  static constexpr int ROWS = 2 * GROUPS;
  static constexpr int WORDS = HAS_PROFILE ? ceil_div(KNOTS, WARP) : 1;

  float row_scale[ROWS];
  float knot[WORDS];  // this lane's
  float row_low = 0.0f;
  float row_high = 0.0f;
  const float* slopes = nullptr;
  const float* intercepts = nullptr;
  const float* knots = nullptr;

  // `row` is this lane's first row; the warp's first row is row - lane / 4.
  __device__ __forceinline__ Profile(const BiasParams& p, const Sequence& s, int h, int row, int lane) {
    if constexpr (HAS_PROFILE && !EXPLICIT) {
#pragma unroll
      for (int a = 0; a < ROWS; ++a) {
        const int position = min(row + 8 * a, s.q_len - 1) + s.offset();
        row_scale[a] = p.row_scale[min(max(position, p.row_first), p.row_last) - p.row_first];
      }
      bounds(row_low, row_high, p.row_bounds, row - lane / 4 + s.offset() - p.row_first, p.row_last - p.row_first);
      knots = p.knots;
      slopes = p.segment_slope + static_cast<int64_t>(h) * (KNOTS + 1);
      intercepts = p.segment_intercept + static_cast<int64_t>(h) * (KNOTS + 1);
#pragma unroll
      for (int w = 0; w < WORDS; ++w) knot[w] = w * WARP + lane < KNOTS ? knots[w * WARP + lane] : infinity();
    }
  }

  // Least and greatest of at least BOUNDS_BLOCK entries from `at` on, indices clamped to 0 .. last.
  __device__ static __forceinline__ void bounds(float& low, float& high, const float* pairs, int at, int last) {
    const int block = min(max(at, 0), last) / BOUNDS_BLOCK;
    low = pairs[2 * block];
    high = pairs[2 * block + 1];
  }

  __device__ __forceinline__ int below(float y) const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) count += __popc(ptx::vote_ballot(knot[w] < y));
    return count;
  }

  // The segments of the warp's tile, whose least distance is `least`.
  __device__ __forceinline__ Segments segments(const BiasParams& p, int least) const {
    Segments found;
    if constexpr (HAS_PROFILE) {
      float low, high;
      bounds(low, high, p.psi_bounds, least - p.psi_first, p.psi_last - p.psi_first);
      const float a = low * row_low, b = low * row_high, c = high * row_low, d = high * row_high;
      found.low = below(fminf(fminf(a, b), fminf(c, d)));
      found.high = below(fmaxf(fmaxf(a, b), fmaxf(c, d)));
      if (found.low == found.high) {
        found.slope = slopes[found.low];
        found.intercept = intercepts[found.low];
      }
    }
    return found;
  }

  // s += weight times the profile, on a tile of several segments.
  template <int N8>
  __device__ __forceinline__ void add_segments(float (&s)[GROUPS][N8][4], const float* psi, const Segments& segments,
                                               float weight) const {
    // By columns: beside s this holds the values of two of them.
#pragma unroll
    for (int n = 0; n < N8; ++n) {
      asm volatile("" ::: "memory");  // psi is read again: kept since the line was drawn, it would take 22 registers
      float y[2 * ROWS], value[2 * ROWS];
      const float first = slopes[segments.low], level = intercepts[segments.low];
#pragma unroll
      for (int x = 0; x < 2 * ROWS; ++x) {
        y[x] = psi[8 * (x / 2 - n) - x % 2] * row_scale[x / 2];
        value[x] = fmaf(y[x], first, level);
      }
#pragma unroll 1
      for (int m = segments.low; m < segments.high; ++m) {
        const float knot_m = knots[m], slope = slopes[m + 1], intercept = intercepts[m + 1];
#pragma unroll
        for (int x = 0; x < 2 * ROWS; ++x) value[x] = y[x] > knot_m ? fmaf(y[x], slope, intercept) : value[x];
      }
#pragma unroll
      for (int x = 0; x < 2 * ROWS; ++x) {
        float& to = s[x / 4][n][x % 4];
        to = fmaf(value[x], weight, to);
      }
    }
  }
};

}  // namespace posattn
