// Gradients of the operands, from the gradient dS of a warp's logits.
//
// Table and psi: dS is first added up over bands, where elements share a lane and a distance. A strip of shared memory
// of the warp's own then holds, for each of the eight rows g of a fragment, the sums by column; row g lies g distances
// lower than row 0, so adding the strip up along its diagonals gives one sum a distance, and one addition to global
// memory for each. No element is added to shared or global memory by itself.
//
// A profile's line in the tile's lowest segment is a constant, so its sums are kept free of it until the segment
// changes. Tiles with knots inside, which are few, add each element with the slope it has.
//
// A head has one slice of sums, to which warps add in any order, or (ORDERED) one for each warp of each key block.
#pragma once
#include "backward_logits.h"

namespace posattn {

constexpr bool SUMS_BY_DISTANCE = (WANT_TABLE || WANT_PSI) && !EXPLICIT;

struct Strip {
  static constexpr int PAD = 8;
  static constexpr int PITCH = 8 * BANDS + 2 * PAD;
  static constexpr int ROWS = STRIP_ROWS;  // stored at a time: 8, or 4 to save shared memory
  static constexpr int FLOATS = SUMS_BY_DISTANCE ? ROWS * PITCH : 0;
  static constexpr int SUMS = 8 * BANDS + 7;
  // Eight rows of fragments, two words a lane, meet all banks but once.
  static_assert(PITCH % 32 == 8 || PITCH % 32 == 24);
  static_assert(ROWS == 8 || ROWS == 4);

  float* memory;
  int g;
  int t;
  int lane;

  __device__ __forceinline__ Strip(float* of_block, int warp, int lane)
      : memory(of_block + warp * FLOATS), g(lane / 4), t(lane % 4), lane(lane) {
    if constexpr (SUMS_BY_DISTANCE) {
      for (int x = lane; x < ROWS * 2 * PAD; x += WARP) {
        const int column = x % (2 * PAD);
        memory[x / (2 * PAD) * PITCH + (column < PAD ? column : column + 8 * BANDS)] = 0.0f;
      }
      ptx::bar_warp_sync();
    }
  }

  // Adds `factor` times the sums of `sums` by distance to `to`, whose entry 0 is the least distance of the warp's tile.
  __device__ __forceinline__ void add(const Banded& sums, float factor, float* to) const {
    float total[ceil_div(SUMS, WARP)] = {};
#pragma unroll
    for (int first = 0; first < 8; first += ROWS) {
      if (first) ptx::bar_warp_sync();
      if (ROWS == 8 || (g >= first && g < first + ROWS)) {
#pragma unroll
        for (int k = 0; k < BANDS; ++k) {
          const float* to = memory + (g - first) * PITCH + PAD + 8 * k + 2 * t;
          ptx::st_shared_v2(ptx::shared_address(to), sums[k][0], sums[k][1]);
        }
      }
      ptx::bar_warp_sync();
      // Column x + row - 7 of a row belongs to sum x.
#pragma unroll
      for (int x = 0; x < SUMS; x += WARP) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          if (x + WARP <= SUMS || x + lane < SUMS) {
            total[x / WARP] += memory[row * PITCH + PAD - 7 + first + row + x + lane];
          }
        }
      }
    }
    ptx::bar_warp_sync();
#pragma unroll
    for (int x = 0; x < SUMS; x += WARP) {
      if (x + WARP <= SUMS || x + lane < SUMS) ptx::red_add(to + x + lane, factor * total[x / WARP]);
    }
  }
};

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

// One lane's B operand of three columns: ones, a query's number in its eight, and ones in the second eight.
__device__ __forceinline__ uint2 slope_columns(int lane) {
  const float number = 2 * (lane % 4);
  const uint32_t ones = pack(1.0f, 1.0f);
  const uint32_t first = lane / 4 == 0 ? ones : lane / 4 == 1 ? pack(number, number + 1.0f) : 0;
  return {first, lane / 4 == 2 ? ones : first};
}

// The sums of one warp over the query blocks of one head.
struct Sums {
  const BackwardParams& p;
  int lane;
  int first_head;           // of the sequence, among the heads of all
  int warp_of_head;         // the warp among those of all key blocks
  float slope = 0.0f;       // this lane's
  int segment = -1;         // of the two sums that follow
  float steepness = 0.0f;   // its slope
  float in_segment = 0.0f;  // sum of dS, this lane's
  float moment = 0.0f;      // sum of dS y

  __device__ __forceinline__ Sums(const BackwardParams& p, int lane, int first_head, int warp_of_head)
      : p(p), lane(lane), first_head(first_head), warp_of_head(warp_of_head) {}

  // The slice of a head's sums that this warp adds to.
  __device__ __forceinline__ int64_t slice_of(int head) const {
    return ORDERED ? int64_t{first_head + head} * (p.shape.k_blocks * WARPS) + warp_of_head : first_head + head;
  }

  __device__ __forceinline__ float* distances(float* sums, const LogitPlace& at, int shift, int head) const {
    const int least = at.i0 + shift - at.j0 - (WARP_KEYS - 1);
    return sums + slice_of(head) * p.diagonals + (least - p.first_distance);
  }

  __device__ __forceinline__ void add_to_segment(int head, int m, float sum, float sum_y) {
    sum = add_over_warp(sum);
    sum_y = add_over_warp(sum_y);
    if (lane == 0) {
      float* to = p.dsegments + slice_of(head) * (2 * (KNOTS + 1)) + m;
      ptx::red_add(to, sum);
      ptx::red_add(to + KNOTS + 1, sum_y);
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
      if (lane == 0) p.dslope[int64_t{first_head + head} * (p.shape.k_blocks * WARPS) + warp_of_head] = -sum;
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
    if constexpr (WANT_TABLE) {
      if constexpr (EXPLICIT) {
        float* to = p.dtable + int64_t{first_head + head_index} * (p.bias.table_last - p.bias.table_first + 1);
        for_logits([&](int group, int n, int e) {
          ptx::red_add(to + of.entry(group, n, e, p.bias.table_first, p.bias.table_last), ds[group][n][e]);
        });
      } else {
        Banded sums = {};
        for_logits([&](int group, int n, int e) { sums[band(group, n, e)][e & 1] += ds[group][n][e]; });
        strip.add(sums, 1.0f, distances(p.dtable, at, sequence.shift(), head_index));
      }
    }
    if constexpr (WANT_LINES || WANT_PSI) add_profile(ds, sequence, at, of, head, range, strip, head_index, row);
    if constexpr (WANT_DENSE != 0) {
      for_logits([&](int group, int n, int e) {
        const int i = at.query(n, e), j = at.key(group, e);
        if (i < sequence.q_len && j < sequence.k_len) {
          float* to = p.ddense + pair_offset(p.ddense_strides, sequence.batch, head_index, sequence.q_start + i,
                                             sequence.k_start + j);
          if constexpr (WANT_DENSE == 1) {
            *to = ds[group][n][e];
          } else {
            ptx::red_add(to, ds[group][n][e]);
          }
        }
      });
    }
  }

  // The slope's sum from dS^T rounded, as A operands: products with three columns, which hold ones, the query's number
  // in its eight, and ones in the second eight of a step.
  __device__ __forceinline__ void add_slope(const uint32_t (&ds)[Logits::GROUPS][Logits::EIGHTS / 2][4],
                                            const uint2& columns, const LogitPlace& at, int shift) {
    // A lane with t = 0 holds the first two columns, one with t = 1 the third.
    const float first = static_cast<float>(at.i0 + shift - at.j0 - at.g);
#pragma unroll
    for (int group = 0; group < Logits::GROUPS; ++group) {
#pragma unroll
      for (int step = 0; step < Logits::EIGHTS / 2; ++step) {
        float product[4] = {};
        mma(product, ds[group][step], columns.x, columns.y);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float distance = first - static_cast<float>(16 * group + 8 * half - 16 * step);
          slope = fmaf(product[2 * half], at.t == 0 ? distance : 8.0f, slope + product[2 * half + 1]);
        }
      }
    }
  }

  // With y = psi * scale in segment m: dA[m] += dS y, dC[m] += dS, dpsi += dS A[m] scale, dscale += dS A[m] psi.
  __device__ __forceinline__ void add_profile(const Fragments<Logits>& ds, const Sequence& sequence,
                                              const LogitPlace& at, const Operands& of, const HeadBias& head,
                                              const SegmentRange& range, const Strip& strip, int head_index,
                                              int64_t row) {
    if (range.low != segment) {
      if constexpr (WANT_LINES) leave_segment(head_index);
      segment = range.low;
      steepness = head.segment_slope[segment];
    }
    float rows[2 * Logits::EIGHTS] = {};  // by query: sums of dS psi
    Banded sums = {};                     // by distance: sums of dS scale
    float factor = steepness;
    for_logits([&](int group, int n, int e) {
      const float d = ds[group][n][e];
      if constexpr (WANT_LINES) {
        in_segment += d;
        rows[2 * n + (e & 1)] = fmaf(d, of.psi_at(p.bias, group, n, e), rows[2 * n + (e & 1)]);
      }
      if constexpr (WANT_PSI && !EXPLICIT) {
        float& sum = sums[band(group, n, e)][e & 1];
        sum = fmaf(d, of.scale[n][e & 1], sum);
      }
    });
    if constexpr (WANT_LINES) {
#pragma unroll
      for (int x = 0; x < 2 * Logits::EIGHTS; ++x) moment = fmaf(rows[x], of.scale[x / 2][x % 2], moment);
    }
    if (range.high > range.low) {
      if constexpr (WANT_LINES) move_past_knots(ds, of, range, head_index);
      // The same sums once more, each element with the slope of its own segment.
      factor = 1.0f;
#pragma unroll
      for (int x = 0; x < 2 * Logits::EIGHTS; ++x) rows[x] = 0.0f;
      for_bands([&](int k, int c) { sums[k][c] = 0.0f; });
      for_logits([&](int group, int n, int e) {
        const float y = of.y_at(p.bias, group, n, e);
        float steep = steepness;
        for (int m = range.low; m < range.high && y > p.bias.knots[m]; ++m) steep = head.segment_slope[m + 1];
        const float d = ds[group][n][e] * steep;
        if constexpr (WANT_LINES) {
          rows[2 * n + (e & 1)] = fmaf(d, of.psi_at(p.bias, group, n, e), rows[2 * n + (e & 1)]);
        }
        if constexpr (WANT_PSI && !EXPLICIT) sums[band(group, n, e)][e & 1] += d * of.scale[n][e & 1];
      });
    }
    if constexpr (WANT_LINES) {
      constexpr int KEPT = Logits::EIGHTS <= 4 ? 1 : Logits::EIGHTS / 4;
      const int first = add_over_rows(rows, lane);
      const bool one = Logits::EIGHTS >= 4 || (lane & 4) == 0;  // with four sums two lanes hold each
      float* to = p.drow_scale + (ORDERED ? int64_t{warp_of_head} * p.shape.heads * p.rows : 0) + row;
#pragma unroll
      for (int x = 0; x < KEPT; ++x) {
        const int i = 8 * ((first + x) / 2) + 2 * at.t + (first + x) % 2;
        if (one && at.i0 + i < sequence.q_len) ptx::red_add(to + i, factor * rows[x]);
      }
    }
    if constexpr (WANT_PSI) {
      if constexpr (EXPLICIT) {
        float* to = p.dpsi + int64_t{first_head + head_index} * (p.bias.psi_last - p.bias.psi_first + 1);
        for_logits([&](int group, int n, int e) {
          const float y = of.y_at(p.bias, group, n, e);
          float steep = steepness;
          for (int m = range.low; m < range.high && y > p.bias.knots[m]; ++m) steep = head.segment_slope[m + 1];
          ptx::red_add(to + of.entry(group, n, e, p.bias.psi_first, p.bias.psi_last),
                       ds[group][n][e] * steep * of.scale[n][e & 1]);
        });
      } else {
        strip.add(sums, factor, distances(p.dpsi, at, sequence.shift(), head_index));
      }
    }
  }

  // The running sums count every element in the lowest segment; those past a knot belong to the next.
  __device__ __forceinline__ void move_past_knots(const Fragments<Logits>& ds, const Operands& of,
                                                  const SegmentRange& range, int head) {
    for (int m = range.low; m < range.high; ++m) {
      const float knot = p.bias.knots[m];
      float past = 0.0f, past_y = 0.0f;
      for_logits([&](int group, int n, int e) {
        const float y = of.y_at(p.bias, group, n, e);
        if (y > knot) {
          past += ds[group][n][e];
          past_y = fmaf(ds[group][n][e], y, past_y);
        }
      });
      add_to_segment(head, m, -past, -past_y);
      add_to_segment(head, m + 1, past, past_y);
    }
  }
};

}  // namespace posattn
