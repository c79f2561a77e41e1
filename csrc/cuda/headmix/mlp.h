// DAPE's MLP on tensor cores: sixteen positions (query, key) are the rows of a product, heads and hidden units the
// columns. The first layer's result, rounded and activated, is in the very registers that the second layer takes.
//
// Layer 1 takes INPUTS padded to a multiple of 8: twelve heads and their bias are one k16 step and one k8.
#pragma once
#include "common/element.h"
#include "headmix/smem_layout.h"

namespace posattn::headmix {

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

constexpr uint32_t PAIR_OF_ONES = BF16 ? 0x3f803f80u : 0x3c003c00u;

__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (BF16) {
    return ptx::fma_rn_bf16x2(a, b, c);
  } else {
    return ptx::fma_rn_f16x2(a, b, c);
  }
}

// 0.01 h, two elements at once.
__device__ __forceinline__ uint32_t leak(uint32_t h) {
  return fma_pair(h, BF16 ? 0x3c243c24u : 0x211f211fu, 0x80008000u);
}

// max(h, 0.01 h) of h + bias.
__device__ __forceinline__ uint32_t leaky_relu(uint32_t h, uint32_t bias) {
  if constexpr (!ONES) h = fma_pair(h, PAIR_OF_ONES, bias);
  if constexpr (BF16) {
    return ptx::max_bf16x2(h, leak(h));
  } else {
    return ptx::max_f16x2(h, leak(h));
  }
}

// The plane of ones, by all threads; a barrier must follow.
__device__ __forceinline__ void store_ones(uint32_t x) {
  if constexpr (ONES) {
    for (int at = threadIdx.x * 4; at < X_HEAD; at += THREADS * 4)
      ptx::st_shared(x + STORED * X_HEAD + at, PAIR_OF_ONES);
  }
}

// element (row, column) of a [rows, columns] matrix, zero outside
__device__ __forceinline__ float padded_element(const float* m, int row, int rows, int column, int columns) {
  return row < rows && column < columns ? m[row * columns + column] : 0.0f;
}

// d = z w for eights of planes (see PlaneReader), whole pairs of them as one product.
template <int EIGHTS>
__device__ __forceinline__ void multiply_planes(float (&d)[4], const uint32_t (&z)[EIGHTS][2],
                                                const uint32_t (&w)[EIGHTS]) {
#pragma unroll
  for (int b = 0; b + 1 < EIGHTS; b += 2) {
    const uint32_t both[4] = {z[b][0], z[b][1], z[b + 1][0], z[b + 1][1]};
    if (b == 0) {
      mma_to(d, both, w[b], w[b + 1], ZEROS);
    } else {
      mma_to(d, both, w[b], w[b + 1], d);
    }
  }
  if constexpr (EIGHTS == 1) {
    mma_to(d, z[0], w[0], ZEROS);
  } else if constexpr (EIGHTS % 2) {
    mma_to(d, z[EIGHTS - 1], w[EIGHTS - 1], d);
  }
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

  __device__ __forceinline__ Mlp(const HeadMixParams& p, float scale, const float* slopes, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < 2 * WIDTH_PAIRS; ++n) {
#pragma unroll
      for (int b = 0; b < INPUT_BLOCKS; ++b) {
        w1[n][b] = pair_of_w1(p, scale, slopes, n, b, lane);
      }
      const int at = 8 * n + 2 * lane.t;
      b1[n] = pack(padded_element(p.b1, 0, 1, at, WIDTH), padded_element(p.b1, 0, 1, at + 1, WIDTH));
#pragma unroll
      for (int a = 0; a < HEAD_BLOCKS; ++a) {
        w2[n][a] = pair_of_w2(p, n, a, lane);
      }
    }
  }

  __device__ static __forceinline__ uint32_t pair_of_w1(const HeadMixParams& p, float scale, const float* slopes, int n,
                                                        int b, const Lane& lane) {
    const int unit = 8 * n + lane.g, input = 8 * b + 2 * lane.t;
    return pack(weight_of(p, scale, slopes, unit, input), weight_of(p, scale, slopes, unit, input + 1));
  }

  __device__ static __forceinline__ uint32_t pair_of_w2(const HeadMixParams& p, int n, int a, const Lane& lane) {
    const int head = 8 * a + lane.g, unit = 8 * n + 2 * lane.t;
    return pack(LOG2E * padded_element(p.w2, head, HEADS, unit, WIDTH),
                LOG2E * padded_element(p.w2, head, HEADS, unit + 1, WIDTH));
  }

  // Of an input, or of ones: b1, then what its rounding leaves.
  __device__ static __forceinline__ float weight_of(const HeadMixParams& p, float scale, const float* slopes, int unit,
                                                    int input) {
    if (FOLD_SLOPE && input >= HEADS && input < INPUTS) {
      float sum = 0.0f;
      for (int h = 0; h < HEADS; ++h) sum -= padded_element(p.w1, unit, WIDTH, HEADS + h, COLUMNS) * slopes[h];
      return input < INPUTS - 1 ? sum : sum - low_float(pack(sum, 0.0f));
    }
    if (input < INPUTS) {
      const float w = padded_element(p.w1, unit, WIDTH, input, COLUMNS);
      return SCALED || input >= HEADS ? w : w * scale;
    }
    const float b = padded_element(p.b1, 0, 1, unit, WIDTH);
    return input == INPUTS ? b : input == INPUTS + 1 ? b - low_float(pack(b, 0.0f)) : 0.0f;
  }

  // out[a] = heads 8 a .. of the positions whose inputs are z.
  __device__ __forceinline__ void run(float (&out)[HEAD_BLOCKS][4], const uint32_t (&z)[INPUT_BLOCKS][2]) const {
#pragma unroll
    for (int u = 0; u < WIDTH_PAIRS; ++u) {
      uint32_t active[4];
      activate(active, z, u);
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

  // Hidden units 16 u .. as an A operand.
  __device__ __forceinline__ void activate(uint32_t (&active)[4], const uint32_t (&z)[INPUT_BLOCKS][2], int u) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float h[4];
      hidden(h, z, 2 * u + n);
      active[2 * n] = leaky_relu(pack(h[0], h[1]), b1[2 * u + n]);
      active[2 * n + 1] = leaky_relu(pack(h[2], h[3]), b1[2 * u + n]);
    }
  }

  __device__ __forceinline__ void hidden(float (&h)[4], const uint32_t (&z)[INPUT_BLOCKS][2], int n) const {
    multiply_planes(h, z, w1[n]);
  }
};

// COUNT planes of a tile ([heads or inputs][rows][columns]) as operands of eight planes each: eight columns of row i
// and of row i + 8 are sixteen positions. BY_HALF: positions g of two eights come in neighbouring registers, then those
// of positions g + 8, as a B operand takes them; else both of one eight do, as an A operand takes them.
template <int COUNT, bool OF_X, bool BY_HALF>
struct PlaneReader {
  static constexpr int EIGHTS = OF_X ? INPUT_BLOCKS : ceil_div(COUNT, 8);
  uint32_t rows[ceil_div(EIGHTS, 2)];  // this lane's row for eights 2 b and 2 b + 1

  __device__ __forceinline__ PlaneReader(uint32_t planes, const Lane& lane) {
    const int matrix = lane.lane / 8;
#pragma unroll
    for (int b = 0; b < ceil_div(EIGHTS, 2); ++b) {
      const bool by_half = BY_HALF && 2 * b + 1 < EIGHTS;
      const int second = by_half ? matrix % 2 : matrix / 2, half = by_half ? matrix / 2 : matrix % 2;
      // Planes past the last one meet weights of zero, or gradients that nobody reads.
      const int number = 16 * b + second * 8 + lane.lane % 8;
      const int plane = OF_X ? plane_of(number) : min(number, COUNT - 1);
      rows[b] = planes + plane * X_HEAD + half * (8 * X_ROW);
    }
  }

  // z[b]: (position g, planes 8 b + 2t..), the same for positions g + 8. Planes are columns there, so they are
  // transposed.
  __device__ __forceinline__ void read(uint32_t (&z)[EIGHTS][2], int at) const {
#pragma unroll
    for (int b = 0; b < EIGHTS; b += 2) {
      if (b + 1 < EIGHTS) {
        uint32_t both[4];
        ptx::ldmatrix_x4_trans(both, rows[b / 2] + at);
        z[b][0] = both[0], z[b][1] = both[BY_HALF ? 2 : 1];
        z[b + 1][0] = both[BY_HALF ? 1 : 2], z[b + 1][1] = both[3];
      } else {
        ptx::ldmatrix_x2_trans(z[b], rows[b / 2] + at);
      }
    }
  }
};

using InputReader = PlaneReader<PLANES, true, false>;

// Planes 8 a + 2t and 8 a + 2t + 1 of sixteen positions; a word holds positions g and g + 8. `to` is this lane's place
// in plane 0.
template <int EIGHTS>
__device__ __forceinline__ void store_pairs(uint32_t to, const float (&out)[EIGHTS][4]) {
#pragma unroll
  for (int a = 0; a < EIGHTS; ++a) {
#pragma unroll
    for (int e = 0; e < 2; ++e) ptx::st_shared(to + (8 * a + e) * MIXED_HEAD, pack(out[a][e], out[a][e + 2]));
  }
}

// All positions of the tile in x, shared out among the warps, through the MLP into `mix`.
__device__ __forceinline__ void mix_tile(const Mlp& mlp, const InputReader& inputs, uint32_t mix, const Lane& lane) {
  const uint32_t to = mix + 2 * lane.t * MIXED_HEAD + 4 * lane.g;
#pragma unroll
  for (int step = 0; step < ceil_div(POSITION_TILES, MLP_WARPS); ++step) {
    if (POSITION_TILES % MLP_WARPS != 0 && step * MLP_WARPS + lane.warp >= POSITION_TILES) break;
    const Position at = position(step, lane.warp);
    uint32_t z[INPUT_BLOCKS][2];
    inputs.read(z, at.x);
    float out[HEAD_BLOCKS][4];
    mlp.run(out, z);
    store_pairs(to + at.mix, out);
  }
}

}  // namespace posattn::headmix
