// Online softmax of one warp's logits in base 2, on the fragments of mma.m16n8k16: GROUPS times 16 rows, of which a
// lane holds row lane / 4 + 8 a (a < 2 GROUPS) at columns 8 n + 2 (lane % 4) and the next.
//
// The reference m of a row is not its running maximum: it moves, and with it sums and outputs are rescaled, only when a
// logit of the warp exceeds it by more than SLACK, after which weights reach 2^SLACK at most. Nothing changes in exact
// arithmetic; float32 sums and 16-bit weights keep their relative precision, and most tiles need neither the maximum of
// whole rows nor a rescaling of the output.
#pragma once
#include "element.h"

namespace posattn {

constexpr float SLACK = 8.0f;

template <int GROUPS>
struct Softmax {
  static constexpr int ROWS = 2 * GROUPS;
  float m[ROWS];
  float l[ROWS];  // this lane's part of the row sum

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      m[a] = LOWEST;
      l[a] = 0.0f;
    }
  }

  // Logits s (times `factor` in base 2) become weights; out is rescaled where a reference moves.
  template <int N8, int OUT8>
  __device__ __forceinline__ void update(float (&s)[GROUPS][N8][4], float (&out)[GROUPS][OUT8][4], float factor) {
    float top[ROWS];
    bool moves = false;
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      top[a] = fmaxf(s[a / 2][0][a % 2 * 2], s[a / 2][0][a % 2 * 2 + 1]);
#pragma unroll
      for (int n = 1; n < N8; ++n) {
        top[a] = fmaxf(top[a], fmaxf(s[a / 2][n][a % 2 * 2], s[a / 2][n][a % 2 * 2 + 1]));
      }
      moves |= top[a] * factor - SLACK > m[a];
    }
    if (ptx::vote_any(moves)) move(top, out, factor);
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
#pragma unroll
      for (int n = 0; n < N8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[a / 2][n][a % 2 * 2 + e];
          x = ptx::ex2_approx(fmaf(x, factor, -m[a]));
          l[a] += x;
        }
      }
    }
  }

  template <int OUT8>
  __device__ __forceinline__ void move(float (&top)[ROWS], float (&out)[GROUPS][OUT8][4], float factor) {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      top[a] = fmaxf(top[a], ptx::shfl_bfly(top[a], 1));
      top[a] = fmaxf(top[a], ptx::shfl_bfly(top[a], 2));
      rescale(a, fmaxf(m[a], top[a] * factor), out);
    }
  }

  template <int OUT8>
  __device__ __forceinline__ void rescale(int a, float reference, float (&out)[GROUPS][OUT8][4]) {
    const float alpha = ptx::ex2_approx(m[a] - reference);
    m[a] = reference;
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
    rescale(a, fmaxf(m[a], sink * LOG2E), out);
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
