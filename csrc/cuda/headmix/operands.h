// One warp's products: operands from global memory as fragments, without a tile of them in shared memory.
//
// What a loop reads lies in global memory in tiles in the order of the fragments, so that a warp reads whole lines from
// one pointer, and no row needs an address or a bound; posattn/backends/cuda/headmix_rows.py lays it out.
// The order in which a product sums is free, so that a lane's 16 bytes of a row serve as they come: lane t of a row
// takes dimensions 32 d + 8 t .. 8 t + 7, and products k16 number 2 d and 2 d + 1 take four of them each. The columns
// of the output are as free: lane g takes 8 (or 4) neighbouring dimensions of a value row.
#pragma once
#include "headmix/mlp.h"

namespace posattn::headmix {

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

  __device__ __forceinline__ const Element* row(int i) const {
    return reinterpret_cast<const Element*>(from + static_cast<int64_t>(min(i, last)) * stride);
  }
};

// B operands whose columns are rows 8 c + g of a tile [BLOCK_N, DIM] that lies in the order of the fragments.
template <int DIM>
struct ColumnFragments {
  uint4 r[N8][DIM / 32];
};

__device__ __forceinline__ uint4 load_16(const unsigned char* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// `tile`: this lane's sixteen bytes of the part in question.
template <int DIM>
__device__ __forceinline__ void load_columns(ColumnFragments<DIM>& to, const unsigned char* tile) {
#pragma unroll
  for (int c = 0; c < N8; ++c) {
#pragma unroll
    for (int d = 0; d < DIM / 32; ++d) to.r[c][d] = load_16(tile + (c * (DIM / 32) + d) * (WARP * 16));
  }
}

// B operands whose rows are rows of a tile: (rows 8 c + 2t and 8 c + 2t + 1, dimension 8 n + g). Two eights of rows
// come in neighbouring registers, as one product takes them; the last eight is alone.
template <int DIM>
struct PairFragments {
  uint4 both[DIM / 16];  // of eights 0 and 1: dimensions 8 n and 8 (n + 1)
  uint4 last[DIM / 32];  // of eight 2: four of them

  __device__ __forceinline__ void load(const unsigned char* tile) {
    static_assert(N8 == 3);
#pragma unroll
    for (int m = 0; m < DIM / 16; ++m) both[m] = load_16(tile + m * (WARP * 16));
#pragma unroll
    for (int m = 0; m < DIM / 32; ++m) last[m] = load_16(tile + (DIM / 16 + m) * (WARP * 16));
  }

  __device__ __forceinline__ uint32_t operand(int c, int n) const {
    return c == 2 ? word(last[n / 4], n % 4) : word(both[n / 2], n % 2 * 2 + c);
  }

private:
  __device__ static __forceinline__ uint32_t word(const uint4& w, int x) {
    return x == 0 ? w.x : x == 1 ? w.y : x == 2 ? w.z : w.w;
  }
};

// A operands that a warp keeps in shared memory: 16 bytes a lane, [groups of 16 rows][k16 products][lane].
template <int DIM>
__device__ __forceinline__ uint32_t kept_operand(uint32_t kept, int r, int k, const Lane& lane) {
  return kept + ((r * (DIM / 16) + k) * WARP + lane.lane) * 16;
}

// Rows i0 .. of a tensor as A operands into shared memory, by the lanes that will read them.
template <int DIM>
__device__ __forceinline__ void keep_rows(uint32_t kept, const Rows& rows, int i0, const Lane& lane) {
#pragma unroll
  for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
    for (int d = 0; d < DIM / 32; ++d) {
      const uint4 low = *reinterpret_cast<const uint4*>(rows.row(i0 + 16 * r + lane.g) + 32 * d);
      const uint4 high = *reinterpret_cast<const uint4*>(rows.row(i0 + 16 * r + 8 + lane.g) + 32 * d);
      ptx::st_shared_v4(kept_operand<DIM>(kept, r, 2 * d, lane), {low.x, high.x, low.y, high.y});
      ptx::st_shared_v4(kept_operand<DIM>(kept, r, 2 * d + 1, lane), {low.z, high.z, low.w, high.w});
    }
  }
}

// s[r][c] = products of kept rows 16 r .. with columns 8 c .. .
template <int DIM>
__device__ __forceinline__ void multiply_columns(float (&s)[GROUPS][N8][4], uint32_t kept,
                                                 const ColumnFragments<DIM>& columns, const Lane& lane) {
#pragma unroll
  for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
      uint32_t a[4];
      ptx::ld_shared_v4(a, kept_operand<DIM>(kept, r, k, lane));
#pragma unroll
      for (int c = 0; c < N8; ++c) {
        const uint4& b = columns.r[c][k / 2];
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

// How the columns of a [tokens, DIM] tensor fall to lanes g: blocks of 64, eight neighbours to a lane, and one block of
// 32, four to a lane, where DIM is an odd multiple of it.
template <int DIM>
struct Run {
  static constexpr int WIDE = DIM / 64;
  static constexpr int NARROW = DIM / 32 % 2;
  static constexpr int FIRST = WIDE ? 8 : 4;  // lane g begins at column FIRST g
  static constexpr int EIGHTS = DIM / 8;
};

// B operands whose rows are rows of a tensor: 8 c + 2t and 8 c + 2t + 1 of COUNT eights, as they lie in memory.
template <int DIM, int COUNT>
struct RowFragments {
  static constexpr int WIDE = Run<DIM>::WIDE, NARROW = Run<DIM>::NARROW;
  uint4 wide[COUNT][2][WIDE ? WIDE : 1];
  uint2 narrow[COUNT][2][NARROW ? NARROW : 1];

  __device__ __forceinline__ void load(const Rows& rows, int j0, const Lane& lane) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Element* row = rows.row(j0 + 8 * c + 2 * lane.t + e);
#pragma unroll
        for (int b = 0; b < WIDE; ++b) wide[c][e][b] = *reinterpret_cast<const uint4*>(row + 64 * b);
        if constexpr (NARROW) {
          narrow[c][e][0] = *reinterpret_cast<const uint2*>(row + 64 * WIDE + (4 - Run<DIM>::FIRST) * lane.g);
        }
      }
    }
  }

  // (rows 8 c + 2t.., column n of lane g's run)
  __device__ __forceinline__ uint32_t operand(int c, int n) const {
    const uint32_t a = word(c, 0, n), b = word(c, 1, n);
    return __byte_perm(a, b, n % 2 ? 0x7632 : 0x5410);
  }

  __device__ __forceinline__ uint32_t word(int c, int e, int n) const {
    if (n / 8 < WIDE) {
      const uint4& w = wide[c][e][n / 8];
      return n / 2 % 4 == 0 ? w.x : n / 2 % 4 == 1 ? w.y : n / 2 % 4 == 2 ? w.z : w.w;
    }
    const uint2& w = narrow[c][e][0];
    return n / 2 % 2 == 0 ? w.x : w.y;
  }
};

// f(column, pieces of 8 neighbours) for a row of the accumulators: `half` says which of the fragment's two rows.
template <int DIM, class F>
__device__ __forceinline__ void for_runs(const float (&out)[DIM / 8][4], int half, const Lane& lane, F f) {
#pragma unroll
  for (int b = 0; b < Run<DIM>::WIDE; ++b) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] = out[8 * b + n][2 * half + e];
      f(64 * b + 16 * lane.t + 8 * e, x);
    }
  }
  if constexpr (Run<DIM>::NARROW) {
    float x[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n] = out[8 * Run<DIM>::WIDE + n % 4][2 * half + n / 4];
    f(64 * Run<DIM>::WIDE + 8 * lane.t, x);
  }
}

// Fragments of logits rounded, two neighbouring columns to a word: [n][half] are two registers of an A operand.
using Weights = uint32_t[GROUPS][N8][2];

__device__ __forceinline__ void round_tile(Weights& to, const float (&from)[GROUPS][N8][4]) {
#pragma unroll
  for (int x = 0; x < GROUPS * N8 * 2; ++x) {
    const int r = x / 2 / N8, n = x / 2 % N8, half = x % 2;
    to[r][n][half] = pack(from[r][n][2 * half], from[r][n][2 * half + 1]);
  }
}

// out += p rows; rows.operand(c, n) is eight rows of eight columns
template <int DIM, class R>
__device__ __forceinline__ void multiply_rows(float (&out)[GROUPS][DIM / 8][4], const Weights& p, const R& rows) {
#pragma unroll
  for (int c = 0; c < N8; c += 2) {
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) {
      const uint32_t b0 = rows.operand(c, n);
      const uint32_t b1 = c + 1 < N8 ? rows.operand(c + 1, n) : 0;
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        if (c + 1 < N8) {
          const uint32_t both[4] = {p[r][c][0], p[r][c][1], p[r][c + 1][0], p[r][c + 1][1]};
          mma(out[r][n], both, b0, b1);
        } else {
          mma_to(out[r][n], p[r][c], b0, out[r][n]);
        }
      }
    }
  }
}

}  // namespace posattn::headmix
