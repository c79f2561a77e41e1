// DAPE's MLP backwards, on the positions that one warp takes: from the gradient of the logits to that of the inputs,
// and the sums for the weights.
//
// The hidden layer is computed again from x, units by positions: as such it is at once the operand of the sums over
// positions. What the weights' gradients need transposed, and the gradient on its way to the inputs, go through
// registers, 8 x 8 elements at a time.
#pragma once
#include "headmix/mlp.h"

namespace posattn::headmix {

// The gradient of a hidden unit before its activation: what arrives, times 0.01 where the unit is negative.
__device__ __forceinline__ uint32_t leaky_gradient(uint32_t gradient, uint32_t active) {
  const uint32_t less = leak(gradient);
  const uint32_t negative = ptx::prmt(active, 0, 0xbb99);  // each half all ones where its sign is set
  return (gradient & ~negative) | (less & negative);
}

// d [units, eight positions] = weights [units, planes] by half of z's positions: a PlaneReader's operands serve as B,
// and a matrix of weights has the same registers as the B operand [planes, units] and as the A operand.
template <int EIGHTS>
__device__ __forceinline__ void multiply_units(float (&d)[4], const uint32_t (&low)[EIGHTS],
                                               const uint32_t (&high)[EIGHTS], const uint32_t (&z)[EIGHTS][2],
                                               int half) {
#pragma unroll
  for (int b = 0; b + 1 < EIGHTS; b += 2) {
    const uint32_t a[4] = {low[b], high[b], low[b + 1], high[b + 1]};
    if (b == 0) {
      mma_to(d, a, z[b][half], z[b + 1][half], ZEROS);
    } else {
      mma(d, a, z[b][half], z[b + 1][half]);
    }
  }
  if constexpr (EIGHTS % 2) {
    constexpr int LAST = EIGHTS - 1;
    const uint32_t a[2] = {low[LAST], high[LAST]};
    if constexpr (EIGHTS == 1) {
      mma_to(d, a, z[LAST][half], ZEROS);
    } else {
      mma_to(d, a, z[LAST][half], d);
    }
  }
}

// sums [units, planes] += units [units, positions] by z [positions, planes], whose operands are transposed for it.
template <int EIGHTS>
__device__ __forceinline__ void add_products(float (&sums)[EIGHTS][4], const uint32_t (&units)[4],
                                             const uint32_t (&z)[EIGHTS][2]) {
#pragma unroll
  for (int b = 0; b < EIGHTS; ++b) {
    mma(sums[b], units, ptx::movmatrix_trans(z[b][0]), ptx::movmatrix_trans(z[b][1]));
  }
}

// The A operand [units, positions] as the A operand [positions, units].
__device__ __forceinline__ void transpose_operand(uint32_t (&to)[4], const uint32_t (&from)[4]) {
  to[0] = ptx::movmatrix_trans(from[0]);
  to[1] = ptx::movmatrix_trans(from[2]);
  to[2] = ptx::movmatrix_trans(from[1]);
  to[3] = ptx::movmatrix_trans(from[3]);
}

struct MlpBackward {
  using Inputs = PlaneReader<PLANES, true, true>;
  using Gradients = PlaneReader<HEADS, false, true>;

  uint32_t w2[2 * WIDTH_PAIRS][HEAD_BLOCKS];   // (heads 8 a + 2t.., unit 8 n + g)
  uint32_t w1[INPUT_BLOCKS][2 * WIDTH_PAIRS];  // (units 8 n + 2t.., input 8 b + g)
  float dw1[WIDTH_PAIRS][INPUT_BLOCKS][4];     // (unit 16 u + g, inputs 8 b + 2t..), the same for unit 16 u + g + 8
  float dw2[WIDTH_PAIRS][HEAD_BLOCKS][4];      // (unit 16 u + g, heads 8 a + 2t..)
  float db1[WIDTH_PAIRS][4];                   // the same in every column
  uint32_t b1[2 * WIDTH_PAIRS];                // unit 8 n + g, twice
  uint32_t w1_forward[2 * WIDTH_PAIRS][INPUT_BLOCKS];  // (unit 8 n + g, inputs 8 b + 2t..)
  uint32_t w2_forward[2 * WIDTH_PAIRS][HEAD_BLOCKS];   // (units 8 n + 2t.., head 8 a + g)

  __device__ __forceinline__ MlpBackward(const HeadMixParams& p, float scale, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < 2 * WIDTH_PAIRS; ++n) {
      const float bias = padded_element(p.b1, 0, 1, 8 * n + lane.g, WIDTH);
      b1[n] = pack(bias, bias);
#pragma unroll
      for (int b = 0; b < INPUT_BLOCKS; ++b) w1_forward[n][b] = Mlp::pair_of_w1(p, scale, nullptr, n, b, lane);
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        const int head = 8 * a + 2 * lane.t, unit = 8 * n + lane.g;
        w2_forward[n][a] = Mlp::pair_of_w2(p, n, a, lane);
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

  // Hidden units 16 u .. of sixteen positions as the A operand [units, positions].
  __device__ __forceinline__ void activate(uint32_t (&active)[4], const uint32_t (&z)[INPUT_BLOCKS][2], int u) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float h[4];
      multiply_units(h, w1_forward[2 * u], w1_forward[2 * u + 1], z, half);
      active[2 * half] = leaky_relu(pack(h[0], h[1]), b1[2 * u]);
      active[2 * half + 1] = leaky_relu(pack(h[2], h[3]), b1[2 * u + 1]);
    }
  }

  // Sixteen positions at `at` of x forward; what the MLP adds to the logits goes to `to` as pairs (see store_pairs).
  __device__ __forceinline__ void run_forward(const Inputs& x, int at, uint32_t to) const {
    uint32_t z[INPUT_BLOCKS][2];
    x.read(z, at);
    float out[HEAD_BLOCKS][4];
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
      uint32_t active[4], transposed[4];
      activate(active, z, u);
      transpose_operand(transposed, active);
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        const uint32_t b0 = w2_forward[2 * u][a], b1 = w2_forward[2 * u + 1][a];
        if (u == 0) {
          mma_to(out[a], transposed, b0, b1, ZEROS);
        } else {
          mma_to(out[a], transposed, b0, b1, out[a]);
        }
      }
    }
    store_pairs(to, out);
  }

  // Sixteen positions at `at` of x and ds; the gradient of the inputs goes to `to` as pairs.
  __device__ __forceinline__ void run(const Inputs& x, const Gradients& ds, int at, uint32_t to) {
    uint32_t z[INPUT_BLOCKS][2], g[HEAD_BLOCKS][2], before[WIDTH_PAIRS][4];
    x.read(z, at);
    ds.read(g, at);
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
      uint32_t active[4], gradient[4];  // A operands [units, positions]
      activate(active, z, u);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dh[4];
        multiply_units(dh, w2[2 * u], w2[2 * u + 1], g, half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          gradient[2 * half + e] = leaky_gradient(pack(dh[2 * e], dh[2 * e + 1]), active[2 * half + e]);
        }
      }
      add_products(dw2[u], active, g);
      add_products(dw1[u], gradient, z);
      if constexpr (!ONES) mma(db1[u], gradient, PAIR_OF_ONES, PAIR_OF_ONES);
      transpose_operand(before[u], gradient);
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

}  // namespace posattn::headmix
