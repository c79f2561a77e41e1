// Gradients of the operands, from the gradient dS of a warp's logits.
//
// A profile's line in the tile's lowest segment is a constant, so what its slope and intercept need is summed as if all
// were in that segment. Tiles with knots inside, which are few, correct it element by element.
#pragma once
#include "backward/diagonals.h"
#include "backward/logits.h"

namespace posattn {

// Adds up N values over the eight rows g of fragments, N a power of two; lanes keep N / 8 sums (one if fewer). Returns
// the number of the sum that v[0] holds then; N / 8 follow it. With N < 8 several lanes hold the same one.
template <int N>
__device__ __forceinline__ int add_over_rows(float (&v)[N], int lane) {
  int kept = 0;
#pragma unroll
  for (int bit = 16, half = N / 2; bit >= 4; bit /= 2, half /= 2) {
    if (half >= 1) {
      const bool upper = lane & bit;
      if (upper) kept += half;
#pragma unroll
      for (int x = 0; x < half; ++x) {
        const float send = upper ? v[x] : v[x + half];
        const float keep = upper ? v[x + half] : v[x];
        v[x] = keep + ptx::shfl_bfly(send, bit);
      }
    } else {
      v[0] += ptx::shfl_bfly(v[0], bit);
    }
  }
  return kept;
}

__device__ __forceinline__ float add_over_warp(float x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x += ptx::shfl_bfly(x, bit);
  return x;
}

// One lane's B operands, for each 16 of 32 queries, of two columns: ones, and the query's number among the 32.
__device__ __forceinline__ uint4 slope_columns(int lane) {
  uint32_t column[4];
  for (int x = 0; x < 4; ++x) {
    const float number = 8 * x + 2 * (lane % 4);
    column[x] = lane / 4 == 0 ? pack(1.0f, 1.0f) : lane / 4 == 1 ? pack(number, number + 1.0f) : 0;
  }
  return {column[0], column[1], column[2], column[3]};
}

// The sum of dS is one more column of dK += dS^T Q, as the slope's are (see SLOPE_BY_PRODUCT).
constexpr bool INTERCEPT_BY_PRODUCT = WANT_LINES && !HAS_SOFTCAP && !SM90;

// The sums of one warp over the query blocks of one head.
struct Sums {
  const BackwardParams& p;
  int first_sum;            // of the sequence's slot, among the heads of all slots
  int warp_of_all;          // the warp among those of the key blocks of all sequences
  float slope = 0.0f;       // this lane's
  int segment = -1;         // of the two sums that follow
  float steepness = 0.0f;   // its slope
  float in_segment = 0.0f;  // sum of dS, this lane's
  float moment = 0.0f;      // sum of dS y

  __device__ __forceinline__ Sums(const BackwardParams& p, int sequence, int warp_of_all)
      : p(p), first_sum(sequence % p.slots * p.shape.heads), warp_of_all(warp_of_all) {}

  __device__ __forceinline__ GlobalSums global(void* sums) const { return GlobalSums(sums, p.units); }

  // Where the distances of the warp's tile begin among the sums of all.
  __device__ __forceinline__ int64_t distances(const LogitPlace& at, int shift, int head) const {
    const int least = at.i0 + shift - at.j0 - (WARP_KEYS - 1);
    return int64_t{first_sum + head} * p.diagonals + (least - p.first_distance);
  }

  __device__ __forceinline__ void add_to_segment(int head, int m, float sum, float sum_y) {
    sum = add_over_warp(sum);
    sum_y = add_over_warp(sum_y);
    if (ptx::tid_x() % WARP == 0) {
      const int64_t at = int64_t{first_sum + head} * (2 * (KNOTS + 1)) + m;
      global(p.dsegments).add(at, sum);
      global(p.dsegments).add(at + KNOTS + 1, sum_y);
    }
  }

  __device__ __forceinline__ void leave_segment(int head) {
    if (segment >= 0) add_to_segment(head, segment, in_segment, moment);
    in_segment = moment = 0.0f;
  }

  // After the last block of a head.
  __device__ __forceinline__ void finish_head(int head) {
    if constexpr (WANT_SLOPE) {
      const float sum = add_over_warp(slope);
      const int64_t at = int64_t{warp_of_all} * p.shape.heads + head;
      if (ptx::tid_x() % WARP == 0) p.dslope[at] = -sum;
      slope = 0.0f;
    }
    if constexpr (WANT_LINES) {
      leave_segment(head);
      segment = -1;
    }
  }

  __device__ __forceinline__ void add(const Fragments<Logits>& ds, const Sequence& sequence, const LogitPlace& at,
                                      const Operands& of, const HeadBias& head, const SegmentRange& range,
                                      const Strip& strip, int head_index, int64_t row) {
    if constexpr (WANT_SLOPE && !SLOPE_BY_PRODUCT) {
      for_logits([&](int group, int n, int e) { slope = fmaf(ds[group][n][e], of.distance_of(group, n, e), slope); });
    }
    if constexpr (WANT_TABLE && !TABLE_BY_PRODUCT) {
      if constexpr (EXPLICIT) {
        const int64_t first = int64_t{first_sum + head_index} * (p.bias.table_last - p.bias.table_first + 1);
        for_logits([&](int group, int n, int e) {
          const int entry = of.entry(group, n, e, p.bias.table_first, p.bias.table_last);
          global(p.dtable).add(first + entry, ds[group][n][e]);
        });
      } else {
        Banded sums;
        for_bands([&](int k, int c) {
          sums[k][c] = sum_of_band(k, c, [&](int group, int n, int e) { return ds[group][n][e]; });
        });
        strip.add(sums, global(p.dtable), distances(at, sequence.offset(), head_index));
      }
    }
    if constexpr (WANT_LINES || WANT_PSI) add_profile(ds, sequence, at, of, head, range, strip, head_index, row);
    if constexpr (WANT_DENSE != 0) {
      for_logits([&](int group, int n, int e) {
        const int i = at.query(n, e), j = at.key(group, e);
        if (i < sequence.q_len && j < sequence.k_len) {
          const int64_t place =
              pair_offset(p.ddense_strides, sequence.batch, head_index, sequence.q_start + i, sequence.k_start + j);
          if constexpr (WANT_DENSE == 1) {
            static_cast<float*>(p.ddense)[place] = ds[group][n][e];
          } else {
            global(p.ddense).add(place, ds[group][n][e]);
          }
        }
      });
    }
  }

  // A linear slope's sum on the mask's border, element by element. Under a steep slope the key at distance 0 has nearly
  // all of a row's weight, and its dS may be a million times the next key's: products would add it to both of their
  // sums, which cancel, but have rounded the others away.
  __device__ __forceinline__ void add_slope_on_border(const Fragments<Logits>& ds, const LogitPlace& at, int shift) {
    const float first = static_cast<float>(at.query(0, 0) + shift - at.key(0, 0));
    for_logits([&](int group, int n, int e) {
      const float distance = first + static_cast<float>(8 * n + (e & 1) - 16 * group - 8 * (e >> 1));
      slope = fmaf(ds[group][n][e], distance, slope);
    });
  }

  // The slope's sum from dS^T rounded, as A operands: products with slope_columns, whose sums the lanes with t = 0
  // hold.
  __device__ __forceinline__ void add_slope(const uint32_t (&ds)[Logits::GROUPS][Logits::EIGHTS / 2][4],
                                            const uint4& columns, const LogitPlace& at, int shift) {
    const float first = static_cast<float>(at.i0 + shift - at.j0 - at.g);
#pragma unroll
    for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
      for (int n = 0; n < Logits::EIGHTS; n += 4) {
        float product[4] = {};
        mma(product, ds[group][n / 2], columns.x, columns.y);
        if constexpr (Logits::EIGHTS % 4 == 0) mma(product, ds[group][n / 2 + 1], columns.z, columns.w);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float distance = first - static_cast<float>(16 * group + 8 * half - 8 * n);
          slope = fmaf(product[2 * half], distance, slope + product[2 * half + 1]);
        }
      }
    }
  }

  // The sum of dS for the intercept, from dS^T rounded: a product with ones, which all four lanes of a row hold. With
  // zeros where there are several segments, so that the loop has no branch around it: add_profile has their sums.
  __device__ __forceinline__ void add_intercept(const uint32_t (&ds)[Logits::GROUPS][Logits::EIGHTS / 2][4],
                                                const SegmentRange& range) {
    const uint32_t ones = range.low == range.high ? pack(1.0f, 1.0f) : 0;
    float product[4] = {};
#pragma unroll
    for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
      for (int step = 0; step < Logits::EIGHTS / 2; ++step) mma(product, ds[group][step], ones, ones);
    }
    in_segment = fmaf(0.25f, product[0] + product[2], in_segment);
  }

  // With y = psi * scale in segment m: dA[m] += dS y, dC[m] += dS, dpsi += dS A[m] scale, dscale += dS A[m] psi.
  __device__ __forceinline__ void add_profile(const Fragments<Logits>& ds, const Sequence& sequence,
                                              const LogitPlace& at, const Operands& of, const HeadBias& head,
                                              const SegmentRange& range, const Strip& strip, int head_index,
                                              int64_t row) {
    float rows[2 * Logits::EIGHTS] = {};  // by query: sums of dS A[m] psi
    Banded sums = {};                     // by distance: sums of dS A[m] scale
    if (range.low == range.high) {
      if (range.low != segment) {
        if constexpr (WANT_LINES) leave_segment(head_index);
        segment = range.low;
        steepness = head.segment_slope[segment];
      }
#pragma unroll
      for (int x = 0; x < 2 * Logits::EIGHTS; ++x) {
        const int n = x / 2, c = x % 2;
        const float scale = of.scale[n][c], line = steepness * scale;
        float row = 0.0f;
#pragma unroll
        for (int y = 0; y < 2 * Logits::GROUPS; ++y) {
          const int group = y / 2, e = y % 2 * 2 + c;
          const float d = ds[group][n][e];
          if constexpr (WANT_LINES) {
            if constexpr (!INTERCEPT_BY_PRODUCT) in_segment += d;
            row = fmaf(d, of.psi_at(p.bias, group, n, e), row);
          }
          if constexpr (WANT_PSI && !EXPLICIT) {
            float& sum = sums[band(group, n, e)][c];
            sum = fmaf(d, line, sum);
          }
        }
        if constexpr (WANT_LINES) moment = fmaf(row, scale, moment);
        rows[x] = row * steepness;
      }
    } else {
#pragma unroll 1
      for (int m = range.low; m <= range.high; ++m) {
        const float steep = head.segment_slope[m];
        const float below = m > range.low ? p.bias.knots[m - 1] : -infinity();
        const float above = m < range.high ? p.bias.knots[m] : infinity();
        float in_this = 0.0f, in_this_y = 0.0f;
        for_logits([&](int group, int n, int e) {
          const float y = of.y_at(p.bias, group, n, e);
          const float d = y > below && y <= above ? ds[group][n][e] : 0.0f;
          if constexpr (WANT_LINES) {
            in_this += d;
            in_this_y = fmaf(d, y, in_this_y);
            rows[2 * n + (e & 1)] = fmaf(d * steep, of.psi_at(p.bias, group, n, e), rows[2 * n + (e & 1)]);
          }
          if constexpr (WANT_PSI && !EXPLICIT) {
            float& sum = sums[band(group, n, e)][e & 1];
            sum = fmaf(d * steep, of.scale[n][e & 1], sum);
          }
        });
        if constexpr (WANT_LINES) add_to_segment(head_index, m, in_this, in_this_y);
      }
    }
    if constexpr (WANT_LINES) {
      constexpr int KEPT = Logits::EIGHTS <= 4 ? 1 : Logits::EIGHTS / 4;
      const int lane = 4 * at.g + at.t, first = add_over_rows(rows, lane);
      const bool one = Logits::EIGHTS >= 4 || (lane & 4) == 0;  // with four sums two lanes hold each
#pragma unroll
      for (int x = 0; x < KEPT; ++x) {
        const int i = 8 * ((first + x) / 2) + 2 * at.t + (first + x) % 2;
        if (one && at.i0 + i < sequence.q_len) global(p.drow_scale).add(row + i, rows[x]);
      }
    }
    if constexpr (WANT_PSI) {
      if constexpr (EXPLICIT) {
        const int64_t first = int64_t{first_sum + head_index} * (p.bias.psi_last - p.bias.psi_first + 1);
        for_logits([&](int group, int n, int e) {
          const int entry = of.entry(group, n, e, p.bias.psi_first, p.bias.psi_last);
          const float steep = steepness_of(of, head, range, group, n, e);
          global(p.dpsi).add(first + entry, ds[group][n][e] * steep * of.scale[n][e & 1]);
        });
      } else {
        strip.add(sums, global(p.dpsi), distances(at, sequence.offset(), head_index));
      }
    }
  }

  // The slope of an element's own segment.
  __device__ __forceinline__ float steepness_of(const Operands& of, const HeadBias& head, const SegmentRange& range,
                                                int group, int n, int e) const {
    const float y = of.y_at(p.bias, group, n, e);
    float steep = head.segment_slope[range.low];
    for (int m = range.low; m < range.high && y > p.bias.knots[m]; ++m) steep = head.segment_slope[m + 1];
    return steep;
  }
};

}  // namespace posattn
