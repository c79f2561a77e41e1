// Queries from shared memory, keys and values from global memory, as the fragments of one warp's products.
//
// The order in which a product sums is free, so that a lane's 16 bytes of a row serve as they come: lane t of a row
// takes dimensions 32 d + 8 t .. 8 t + 7, and products k16 number 2 d and 2 d + 1 take four of them each. The columns
// of the output are as free: lane g takes 8 (or 4) neighbouring dimensions of a value row.
#pragma once
#include "mix_mlp.h"

namespace posattn::mix {

// Rows of one head, from the first token of the sequence on, at the column where this lane reads; rows past the last
// are the last one. The stride is in bytes and below 2^31, so that an address is one multiply-add.
struct Rows {
  const unsigned char* from;
  int stride;
  int last;

  __device__ __forceinline__ Rows(const void* x, const Strides& strides, int batch, int head, int start, int length,
                                  int column)
      : from(reinterpret_cast<const unsigned char*>(static_cast<const Element*>(x) + batch * strides.batch +
                                                    head * strides.head + start * strides.token + column)),
        stride(static_cast<int>(strides.token) * 2),
        last(length - 1) {}

  // INSIDE: row i is known to exist.
  template <bool INSIDE = false>
  __device__ __forceinline__ const Element* row(int i) const {
    return reinterpret_cast<const Element*>(from + static_cast<int64_t>(INSIDE ? i : min(i, last)) * stride);
  }
};

// B operands of keys 8 c + g, [BLOCK_N, HEAD_DIM] for a warp.
struct KeyFragments {
  uint4 r[N8][HEAD_DIM / 32];

  __device__ __forceinline__ void load(const Rows& keys, int j0, const Lane& lane) {
#pragma unroll
    for (int c = 0; c < N8; ++c) {
      const Element* row = keys.row(j0 + 8 * c + lane.g);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 32; ++d) r[c][d] = *reinterpret_cast<const uint4*>(row + 32 * d);
    }
  }
};

// Queries lie in shared memory as A operands, 16 bytes a lane: [GROUPS][k16 products][lane].
__device__ __forceinline__ uint32_t query_operand(uint32_t q, int r, int k, const Lane& lane) {
  return q + ((r * (HEAD_DIM / 16) + k) * WARP + lane.lane) * 16;
}

// A head's queries into shared memory, by the lanes that will read them.
__device__ __forceinline__ void load_queries(uint32_t q, const Rows& queries, int i0, const Lane& lane) {
#pragma unroll
  for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 32; ++d) {
      const uint4 low = *reinterpret_cast<const uint4*>(queries.row(i0 + 16 * r + lane.g) + 32 * d);
      const uint4 high = *reinterpret_cast<const uint4*>(queries.row(i0 + 16 * r + 8 + lane.g) + 32 * d);
      ptx::st_shared_v4(query_operand(q, r, 2 * d, lane), {low.x, high.x, low.y, high.y});
      ptx::st_shared_v4(query_operand(q, r, 2 * d + 1, lane), {low.z, high.z, low.w, high.w});
    }
  }
}

// s[r][c] = products of rows 16 r .. with keys 8 c .., queries at `q` in shared memory.
__device__ __forceinline__ void multiply_keys(float (&s)[GROUPS][N8][4], uint32_t q, const KeyFragments& keys,
                                              const Lane& lane) {
#pragma unroll
  for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
      uint32_t a[4];
      ptx::ld_shared_v4(a, query_operand(q, r, k, lane));
#pragma unroll
      for (int c = 0; c < N8; ++c) {
        const uint4& b = keys.r[c][k / 2];
        const uint32_t b0 = k % 2 ? b.z : b.x, b1 = k % 2 ? b.w : b.y;
        if (k == 0) {
          mma_to(s[r][c], a, b0, b1, ZEROS);
        } else {
          mma(s[r][c], a, b0, b1);
        }
      }
    }
  }
}

constexpr int VALUES_64 =
    HEAD_DIM_V / 64;  // blocks of 64 dimensions, 8 to a lane, and one of 32 where HEAD_DIM_V is odd
constexpr int VALUES_32 = HEAD_DIM_V / 32 % 2;
constexpr int OUT8 = HEAD_DIM_V / 8;
constexpr int VALUE_COLUMNS = VALUES_64 ? 8 : 4;  // where lane g begins, times g

// Rows 8 c + 2t and 8 c + 2t + 1 of the values; lane g has dimensions 64 b + 8 g .. (4 g .. in a block of 32).
struct ValueFragments {
  uint4 wide[N8][2][VALUES_64 ? VALUES_64 : 1];
  uint2 narrow[N8][2][VALUES_32 ? VALUES_32 : 1];

  template <bool INSIDE>
  __device__ __forceinline__ void load(const Rows& values, int j0, const Lane& lane) {
#pragma unroll
    for (int c = 0; c < N8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = j0 + 8 * c + 2 * lane.t + e;
        const Element* row = values.row<INSIDE>(j);
#pragma unroll
        for (int b = 0; b < VALUES_64; ++b) wide[c][e][b] = *reinterpret_cast<const uint4*>(row + 64 * b);
        if constexpr (VALUES_32)
          narrow[c][e][0] = *reinterpret_cast<const uint2*>(row + 64 * VALUES_64 + (4 - VALUE_COLUMNS) * lane.g);
      }
    }
  }

  // B operand of output columns n: (keys 8 c + 2t.., dimension n of lane g's run).
  __device__ __forceinline__ uint32_t operand(int c, int n) const {
    const uint32_t a = word(c, 0, n), b = word(c, 1, n);
    return __byte_perm(a, b, n % 2 ? 0x7632 : 0x5410);
  }

  __device__ __forceinline__ uint32_t word(int c, int e, int n) const {
    if (n / 8 < VALUES_64) {
      const uint4& w = wide[c][e][n / 8];
      return n / 2 % 4 == 0 ? w.x : n / 2 % 4 == 1 ? w.y : n / 2 % 4 == 2 ? w.z : w.w;
    }
    const uint2& w = narrow[c][e][0];
    return n / 2 % 2 == 0 ? w.x : w.y;
  }
};

// A row of outputs, times `weight`; `half` says which of the fragment's two rows.
__device__ __forceinline__ void store_row(Element* row, const float (&out)[OUT8][4], int half, float weight,
                                          const Lane& lane) {
#pragma unroll
  for (int b = 0; b < VALUES_64; ++b) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t w[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        w[x] = pack(out[8 * b + 2 * x][2 * half + e] * weight, out[8 * b + 2 * x + 1][2 * half + e] * weight);
      }
      *reinterpret_cast<uint4*>(row + 64 * b + 16 * lane.t + 8 * e) = uint4{w[0], w[1], w[2], w[3]};
    }
  }
  if constexpr (VALUES_32) {
    uint32_t w[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int n = 8 * VALUES_64 + x % 2 * 2, at = 2 * half + x / 2;
      w[x] = pack(out[n][at] * weight, out[n + 1][at] * weight);
    }
    *reinterpret_cast<uint4*>(row + 64 * VALUES_64 + 8 * lane.t) = uint4{w[0], w[1], w[2], w[3]};
  }
}

// out += p v, p in the fragments of the logits.
__device__ __forceinline__ void multiply_values(float (&out)[GROUPS][OUT8][4], const float (&p)[GROUPS][N8][4],
                                                const ValueFragments& values) {
#pragma unroll
  for (int c = 0; c < N8; c += 2) {
    uint32_t a[GROUPS][2][2];
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
      for (int half = 0; half < 2 && c + half < N8; ++half) {
        a[r][half][0] = pack(p[r][c + half][0], p[r][c + half][1]);
        a[r][half][1] = pack(p[r][c + half][2], p[r][c + half][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < OUT8; ++n) {
      const uint32_t b0 = values.operand(c, n);
      const uint32_t b1 = c + 1 < N8 ? values.operand(c + 1, n) : 0;
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        if (c + 1 < N8) {
          const uint32_t both[4] = {a[r][0][0], a[r][0][1], a[r][1][0], a[r][1][1]};
          mma(out[r][n], both, b0, b1);
        } else {
          mma_to(out[r][n], a[r][0], b0, out[r][n]);
        }
      }
    }
  }
}

}  // namespace posattn::mix
