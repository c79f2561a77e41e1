// Online softmax of one warp's logits in base 2, on the fragments of mma.m16n8k16: GROUPS times 16 rows, of which a
// lane holds row lane / 4 + 8 a (a < 2 GROUPS) at columns 8 n + 2 (lane % 4) and the next.
//
// What is summed is exp2(z), where z is the logit in base 2 less the row's reference m. The reference is not the
// running maximum: it moves, and with it sums and outputs are rescaled, only when a logit of the warp exceeds it by
// more than SLACK, so weights reach 2^SLACK at most. Nothing changes in exact arithmetic; float32 sums and 16-bit
// weights keep their relative precision, and most tiles need neither the maximum of whole rows nor a rescaling of the
// output. And since m is known before a tile's logits are, it can be part of what is added to them.
#pragma once
#include "common/element.h"

namespace posattn {

constexpr float SLACK = 8.0f;

template <int GROUPS>
struct Softmax {
  static constexpr int ROWS = 2 * GROUPS;
  float m[ROWS];      // 0 until a row has seen a key
  float limit[ROWS];  // of z: SLACK, or LOWEST until a row has seen a key
  float l[ROWS];      // this lane's part of the row sum

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      m[a] = 0.0f;
      limit[a] = LOWEST;
      l[a] = 0.0f;
    }
  }

  __device__ __forceinline__ bool fresh(int a) const { return limit[a] == LOWEST; }

  // The reference, below every logit for a row that has seen no key.
  __device__ __forceinline__ float reference(int a) const { return fresh(a) ? LOWEST : m[a]; }

  // Logits s (times `factor` in base 2) become weights; out is rescaled where a reference moves.
  template <int N8, int OUT8>
  __device__ __forceinline__ void update(float (&s)[GROUPS][N8][4], float (&out)[GROUPS][OUT8][4], float factor) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
      for (int n = 0; n < N8; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) s[g][n][x] = fmaf(s[g][n][x], factor, -m[2 * g + x / 2]);
      }
    }
    weigh(s, out);
  }

  // The same from z.
  template <int N8, int OUT8>
  __device__ __forceinline__ void weigh(float (&z)[GROUPS][N8][4], float (&out)[GROUPS][OUT8][4]) {
    float top[ROWS];
    bool moves = false;
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      top[a] = fmaxf(z[a / 2][0][a % 2 * 2], z[a / 2][0][a % 2 * 2 + 1]);
#pragma unroll
      for (int n = 1; n < N8; ++n) {
        top[a] = fmaxf(top[a], fmaxf(z[a / 2][n][a % 2 * 2], z[a / 2][n][a % 2 * 2 + 1]));
      }
      moves |= top[a] > limit[a];
    }
    if (ptx::vote_any(moves)) move(top, z, out);
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
#pragma unroll
      for (int n = 0; n < N8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = z[a / 2][n][a % 2 * 2 + e];
          x = ptx::ex2_approx(x);
          l[a] += x;
        }
      }
    }
  }

  // Moves every row's reference up to its maximum.
  template <int N8, int OUT8>
  __device__ __forceinline__ void move(float (&top)[ROWS], float (&z)[GROUPS][N8][4], float (&out)[GROUPS][OUT8][4]) {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      top[a] = fmaxf(top[a], ptx::shfl_bfly(top[a], 1));
      top[a] = fmaxf(top[a], ptx::shfl_bfly(top[a], 2));
    }
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      if (top[a] == -infinity()) continue;
      const float before = m[a];
      rescale(a, fresh(a) ? top[a] : fmaxf(m[a], m[a] + top[a]), out);
      const float step = m[a] - before;
#pragma unroll
      for (int n = 0; n < N8; ++n) {
        z[a / 2][n][a % 2 * 2] -= step;
        z[a / 2][n][a % 2 * 2 + 1] -= step;
      }
    }
  }

  template <int OUT8>
  __device__ __forceinline__ void rescale(int a, float to, float (&out)[GROUPS][OUT8][4]) {
    const float alpha = fresh(a) ? 1.0f : ptx::ex2_approx(m[a] - to);
    m[a] = to;
    limit[a] = SLACK;
    l[a] *= alpha;
#pragma unroll
    for (int n = 0; n < OUT8; ++n) {
      out[a / 2][n][a % 2 * 2] *= alpha;
      out[a / 2][n][a % 2 * 2 + 1] *= alpha;
    }
  }

  // A key of its own for every row, with logit `sink` and no value.
  template <int OUT8>
  __device__ __forceinline__ void add_sink(int a, float sink, float (&out)[GROUPS][OUT8][4], bool first_lane) {
    rescale(a, fmaxf(reference(a), sink * LOG2E), out);
    if (first_lane) l[a] += ptx::ex2_approx(sink * LOG2E - m[a]);
  }

  // The lanes' parts added up: afterwards each lane holds the sum of its rows.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      l[a] += ptx::shfl_bfly(l[a], 1);
      l[a] += ptx::shfl_bfly(l[a], 2);
    }
  }

  __device__ __forceinline__ float lse(int a) const {
    return l[a] == 0.0f ? -infinity() : (m[a] + ptx::lg2_approx(l[a])) * LN2;
  }
};

}  // namespace posattn
