// DAPE's MLP on tensor cores: sixteen positions (query, key) are the rows of a product, heads and hidden units the
// columns. The first layer's result, rounded and activated, is in the very registers that the second layer takes.
//
// Layer 1 takes INPUTS padded to a multiple of 8: twelve heads and their bias are one k16 step and one k8.
#pragma once
#include "element.h"
#include "mix_tile.h"

namespace posattn::mix {

// d = a b + c; over sixteen of the inner dimension, and over eight.
__device__ __forceinline__ void mma_to(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       const float (&c)[4]) {
  if constexpr (BF16) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1, c);
  } else {
    ptx::mma_m16n8k16_f16(d, a, b0, b1, c);
  }
}

__device__ __forceinline__ void mma_to(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
  if constexpr (BF16) {
    ptx::mma_m16n8k8_bf16(d, a, b, c);
  } else {
    ptx::mma_m16n8k8_f16(d, a, b, c);
  }
}

constexpr float ZEROS[4] = {};

// max(h, 0.01 h) of h + bias, two elements at once.
__device__ __forceinline__ uint32_t leaky_relu(uint32_t h, uint32_t bias) {
  if constexpr (BF16) {
    h = ptx::fma_rn_bf16x2(h, 0x3f803f80u, bias);
    return ptx::max_bf16x2(h, ptx::fma_rn_bf16x2(h, 0x3c243c24u, 0x80008000u));
  } else {
    h = ptx::fma_rn_f16x2(h, 0x3c003c00u, bias);
    return ptx::max_f16x2(h, ptx::fma_rn_f16x2(h, 0x211f211fu, 0x80008000u));
  }
}

// element (row, column) of a [rows, columns] matrix, zero outside
__device__ __forceinline__ float padded_element(const float* m, int row, int rows, int column, int columns) {
  return row < rows && column < columns ? m[row * columns + column] : 0.0f;
}

// The first layer can take dot products as they are where its weights are scaled instead: in bfloat16, whose range is
// float32's. SCALED says whether the inputs are logits.
constexpr bool SCALED = !BF16 || HAS_SOFTCAP || (HAS_INNER && !CONCAT);

// The MLP's weights as B operands, kept in registers. What it adds to a logit comes out in base 2, so w2 is scaled, and
// without b2: a constant along a row leaves the softmax alone and is added to the log-sum-exp.
struct Mlp {
  uint32_t w1[2 * WIDTH_PAIRS][INPUT_BLOCKS];  // (inputs 8 b + 2t.., unit 8 n + g)
  uint32_t b1[2 * WIDTH_PAIRS];                // units 8 n + 2t, 8 n + 2t + 1
  uint32_t w2[2 * WIDTH_PAIRS][HEAD_BLOCKS];   // (units 8 n + 2t.., head 8 a + g)

  __device__ __forceinline__ Mlp(const MixParams& p, float scale, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < 2 * WIDTH_PAIRS; ++n) {
#pragma unroll
      for (int b = 0; b < INPUT_BLOCKS; ++b) {
        const int unit = 8 * n + lane.g, input = 8 * b + 2 * lane.t;
        const float x = SCALED || input >= HEADS ? 1.0f : scale, y = SCALED || input + 1 >= HEADS ? 1.0f : scale;
        w1[n][b] = pack(x * padded_element(p.w1, unit, WIDTH, input, INPUTS),
                        y * padded_element(p.w1, unit, WIDTH, input + 1, INPUTS));
      }
      const int at = 8 * n + 2 * lane.t;
      b1[n] = pack(padded_element(p.b1, 0, 1, at, WIDTH), padded_element(p.b1, 0, 1, at + 1, WIDTH));
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        const int head = 8 * a + lane.g, unit = 8 * n + 2 * lane.t;
        w2[n][a] = pack(LOG2E * padded_element(p.w2, head, HEADS, unit, WIDTH),
                        LOG2E * padded_element(p.w2, head, HEADS, unit + 1, WIDTH));
      }
    }
  }

  // out[a] = heads 8 a .. of the positions whose inputs are z.
  __device__ __forceinline__ void run(float (&out)[HEAD_BLOCKS][4], const uint32_t (&z)[INPUT_BLOCKS][2]) const {
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
      float h[2][4];  // [positions, hidden units 16 u + 8 n ..]
      hidden(h[0], z, 2 * u);
      hidden(h[1], z, 2 * u + 1);
      const uint32_t b = b1[2 * u], c = b1[2 * u + 1];
      const uint32_t active[4] = {leaky_relu(pack(h[0][0], h[0][1]), b), leaky_relu(pack(h[0][2], h[0][3]), b),
                                  leaky_relu(pack(h[1][0], h[1][1]), c), leaky_relu(pack(h[1][2], h[1][3]), c)};
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        const uint32_t b0 = w2[2 * u][a], b1 = w2[2 * u + 1][a];
        if (u == 0) {
          mma_to(out[a], active, b0, b1, ZEROS);
        } else {
          mma_to(out[a], active, b0, b1, out[a]);
        }
      }
    }
  }

  __device__ __forceinline__ void hidden(float (&h)[4], const uint32_t (&z)[INPUT_BLOCKS][2], int n) const {
#pragma unroll
    for (int b = 0; b + 1 < INPUT_BLOCKS; b += 2) {
      const uint32_t both[4] = {z[b][0], z[b][1], z[b + 1][0], z[b + 1][1]};
      if (b == 0) {
        mma_to(h, both, w1[n][b], w1[n][b + 1], ZEROS);
      } else {
        mma_to(h, both, w1[n][b], w1[n][b + 1], h);
      }
    }
    if constexpr (INPUT_BLOCKS == 1) {
      mma_to(h, z[0], w1[n][0], ZEROS);
    } else if constexpr (INPUT_BLOCKS % 2) {
      mma_to(h, z[INPUT_BLOCKS - 1], w1[n][INPUT_BLOCKS - 1], h);
    }
  }
};

// Rows of x as A operands. Positions lie along the rows of x and inputs across them, so ldmatrix transposes.
struct InputReader {
  uint32_t rows[ceil_div(INPUT_BLOCKS, 2)];  // this lane's row for input blocks 2 b and 2 b + 1

  __device__ __forceinline__ InputReader(uint32_t x, const Lane& lane) {
#pragma unroll
    for (int b = 0; b < ceil_div(INPUT_BLOCKS, 2); ++b) {
      // Inputs past the last one meet weights of zero.
      const int input = min(16 * b + lane.lane / 16 * 8 + lane.lane % 8, INPUTS - 1);
      rows[b] = x + input * X_HEAD + lane.lane / 8 % 2 * (8 * X_ROW);
    }
  }

  __device__ __forceinline__ void read(uint32_t (&z)[INPUT_BLOCKS][2], int at) const {
#pragma unroll
    for (int b = 0; b < INPUT_BLOCKS; b += 2) {
      if (b + 1 < INPUT_BLOCKS) {
        uint32_t both[4];
        ptx::ldmatrix_x4_trans(both, rows[b / 2] + at);
        z[b][0] = both[0], z[b][1] = both[1], z[b + 1][0] = both[2], z[b + 1][1] = both[3];
      } else {
        ptx::ldmatrix_x2_trans(z[b], rows[b / 2] + at);
      }
    }
  }
};

// All positions of the tile in x, shared out among the warps, through the MLP into `mix`.
__device__ __forceinline__ void mix_tile(const Mlp& mlp, const InputReader& inputs, uint32_t mix, const Lane& lane) {
  const uint32_t to = mix + 2 * lane.t * MIX_HEAD + 4 * lane.g;
#pragma unroll
  for (int step = 0; step < ceil_div(POSITION_TILES, WARPS); ++step) {
    if (POSITION_TILES % WARPS != 0 && step * WARPS + lane.warp >= POSITION_TILES) break;
    const Position at = position(step, lane.warp);
    uint32_t z[INPUT_BLOCKS][2];
    inputs.read(z, at.x);
    float out[HEAD_BLOCKS][4];
    mlp.run(out, z);
#pragma unroll
    for (int a = 0; a < HEAD_BLOCKS; ++a) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        ptx::st_shared(to + at.mix + (8 * a + e) * MIX_HEAD, pack(out[a][e], out[a][e + 2]));
      }
    }
  }
}

}  // namespace posattn::mix
