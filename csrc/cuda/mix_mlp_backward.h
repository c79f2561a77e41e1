// DAPE's MLP backwards, on the positions that one warp takes: from the gradient of the logits to that of the inputs,
// and the sums for the weights.
//
// The hidden layer is computed again from x. What leaves a product as [positions, units] is at once the operand of the
// next product over units; for the sums over positions it is turned, 8 x 8 elements at a time, in registers.
#pragma once
#include "mix_mlp.h"

namespace posattn::mix {

// The gradient of a hidden unit before its activation: what arrives, times 0.01 where the unit is negative.
__device__ __forceinline__ uint32_t leaky_gradient(uint32_t gradient, uint32_t active) {
  const uint32_t less = leak(gradient);
  const uint32_t negative = ptx::prmt(active, 0, 0xbb99);  // each half all ones where its sign is set
  return (gradient & ~negative) | (less & negative);
}

// An A operand [positions, units] as the A operand [units, positions].
__device__ __forceinline__ void turn_operand(uint32_t (&to)[4], const uint32_t (&from)[4]) {
  to[0] = ptx::movmatrix_trans(from[0]);
  to[1] = ptx::movmatrix_trans(from[2]);
  to[2] = ptx::movmatrix_trans(from[1]);
  to[3] = ptx::movmatrix_trans(from[3]);
}

struct MlpBackward {
  uint32_t w2[2 * WIDTH_PAIRS][HEAD_BLOCKS];   // (heads 8 a + 2t.., unit 8 n + g)
  uint32_t w1[INPUT_BLOCKS][2 * WIDTH_PAIRS];  // (units 8 n + 2t.., input 8 b + g)
  float dw1[WIDTH_PAIRS][INPUT_BLOCKS][4];     // (unit 16 u + g, inputs 8 b + 2t..), the same for unit 16 u + g + 8
  float dw2[WIDTH_PAIRS][HEAD_BLOCKS][4];      // (unit 16 u + g, heads 8 a + 2t..)
  float db1[WIDTH_PAIRS][4];                   // the same in every column

  __device__ __forceinline__ MlpBackward(const MixParams& p, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < 2 * WIDTH_PAIRS; ++n) {
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        const int head = 8 * a + 2 * lane.t, unit = 8 * n + lane.g;
        w2[n][a] =
            pack(padded_element(p.w2, head, HEADS, unit, WIDTH), padded_element(p.w2, head + 1, HEADS, unit, WIDTH));
      }
#pragma unroll
      for (int b = 0; b < INPUT_BLOCKS; ++b) {
        const int unit = 8 * n + 2 * lane.t, input = 8 * b + lane.g;
        w1[b][n] = pack(padded_element(p.w1, unit, WIDTH, input, INPUTS),
                        padded_element(p.w1, unit + 1, WIDTH, input, INPUTS));
      }
    }
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        db1[u][e] = 0.0f;
#pragma unroll
        for (int b = 0; b < INPUT_BLOCKS; ++b) dw1[u][b][e] = 0.0f;
#pragma unroll
        for (int a = 0; a < HEAD_BLOCKS; ++a) dw2[u][a][e] = 0.0f;
      }
    }
  }

  // Sixteen positions at `at` of x and ds; the gradient of the inputs goes to `to` as pairs (see store_pairs).
  __device__ __forceinline__ void run(const Mlp& mlp, const InputReader& x, const PlaneReader<HEADS, false>& ds, int at,
                                      uint32_t to) {
    uint32_t z[INPUT_BLOCKS][2], g[HEAD_BLOCKS][2], before[WIDTH_PAIRS][4];
    x.by_position(z, at);
    ds.by_position(g, at);
    uint32_t x_planes[INPUT_BLOCKS][2], g_planes[HEAD_BLOCKS][2];
    x.by_plane(x_planes, at);
    ds.by_plane(g_planes, at);
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
      uint32_t active[4], turned[4];
      mlp.activate(active, z, u);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float dh[4];
        multiply_planes(dh, g, w2[2 * u + n]);
        before[u][2 * n] = leaky_gradient(pack(dh[0], dh[1]), active[2 * n]);
        before[u][2 * n + 1] = leaky_gradient(pack(dh[2], dh[3]), active[2 * n + 1]);
      }
      turn_operand(turned, active);
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) mma(dw2[u][a], turned, g_planes[a][0], g_planes[a][1]);
      turn_operand(turned, before[u]);
#pragma unroll
      for (int b = 0; b < INPUT_BLOCKS; ++b) mma(dw1[u][b], turned, x_planes[b][0], x_planes[b][1]);
      if constexpr (!ONES) mma(db1[u], turned, PAIR_OF_ONES, PAIR_OF_ONES);
    }
    float dz[INPUT_BLOCKS][4];
#pragma unroll
    for (int b = 0; b < INPUT_BLOCKS; ++b) {
#pragma unroll
      for (int u = 0; u < WIDTH_PAIRS; ++u) {
        if (u == 0) {
          mma_to(dz[b], before[u], w1[b][0], w1[b][1], ZEROS);
        } else {
          mma_to(dz[b], before[u], w1[b][2 * u], w1[b][2 * u + 1], dz[b]);
        }
      }
    }
    store_pairs(to, dz);
  }

  // This warp's sums to its slot. x_factor: of inputs that are dot products not yet scaled.
  __device__ __forceinline__ void store(float* to_w1, float* to_b1, float* to_w2, float x_factor,
                                        const Lane& lane) const {
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int unit = 16 * u + lane.g + e / 2 * 8, column = 2 * lane.t + e % 2;
        if (unit >= WIDTH) continue;
        if (!ONES && column == 0) to_b1[unit] = db1[u][e];
#pragma unroll
        for (int b = 0; b < INPUT_BLOCKS; ++b) {
          const int input = 8 * b + column;
          if (ONES && input == INPUTS) to_b1[unit] = dw1[u][b][e];
          if (input < INPUTS) to_w1[unit * INPUTS + input] = dw1[u][b][e] * (input < HEADS ? x_factor : 1.0f);
        }
#pragma unroll
        for (int a = 0; a < HEAD_BLOCKS; ++a) {
          if (8 * a + column < HEADS) to_w2[(8 * a + column) * WIDTH + unit] = dw2[u][a][e];
        }
      }
    }
  }
};

}  // namespace posattn::mix
