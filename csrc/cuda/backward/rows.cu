// Before and after the backward pass's one kernel: what it needs of each query, and the rows of dQ.
#include "backward/rotary.h"
#include "backward/warps.h"
#include "common/mask.h"

namespace posattn {

// A sequence's first padded row.
__device__ __forceinline__ int64_t first_row(const ShapeParams& shape, const Sequence& sequence, int index) {
  return first_query_block<BLOCK_M>(shape, sequence, index) * int64_t{BLOCK_M};
}

__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(low_float(x[i]), low_float(y[i]), sum);
    sum = fmaf(high_float(x[i]), high_float(y[i]), sum);
  }
  return sum;
}

// delta = <dO, O> - dLSE, by which every weight's gradient is lessened, and the log-sum-exp in base 2: +inf where no
// key is seen and past the end, so that weights come out as zero. Eight values a lane, LANES lanes a row.
extern "C" __global__ void __launch_bounds__(THREADS) backward_rows(const __grid_constant__ BackwardRowsParams p) {
  constexpr int LANES = DIM_V <= 32 ? 4 : DIM_V <= 64 ? 8 : DIM_V <= 128 ? 16 : 32;
  constexpr int ROWS = THREADS / LANES;
  const int blocks = ceil_div(p.shape.q_blocks * BLOCK_M, ROWS);
  const int head = blockIdx.x / blocks % p.shape.heads, index = blockIdx.x / blocks / p.shape.heads;
  const Sequence sequence(p.shape, p.mask, index);
  const int row = blockIdx.x % blocks * ROWS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool inside = row < sequence.q_len;
  float delta = 0.0f;
  if (inside && lane < DIM_V / 8) {
    const int64_t token = sequence.q_start + row;
    const int64_t out = sequence.batch * p.out_strides.batch + head * p.out_strides.head + token * p.out_strides.token;
    const int64_t grad =
        sequence.batch * p.grad_out_strides.batch + head * p.grad_out_strides.head + token * p.grad_out_strides.token;
    delta = dot(*reinterpret_cast<const uint4*>(static_cast<const Element*>(p.out) + out + lane * 8),
                *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.grad_out) + grad + lane * 8));
  }
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) delta += ptx::shfl_bfly(delta, mask);
  if (lane || row >= ceil_div(sequence.q_len, BLOCK_M) * BLOCK_M) return;
  float lse = -infinity();
  if (inside) {
    const int64_t at = (int64_t{sequence.batch} * p.shape.heads + head) * p.shape.q_tokens + sequence.q_start + row;
    lse = p.lse[at];
    if (p.grad_lse) delta -= p.grad_lse[at];
  }
  const int64_t to = head * int64_t{p.rows} + first_row(p.shape, sequence, index) + row;
  if constexpr (HAS_PROFILE) {
    if (head == 0) {
      const int i = min(row, sequence.q_len - 1);
      const int64_t position =
          EXPLICIT ? p.positions.q[sequence.batch * p.positions.q_batch + sequence.q_start + i] : i + sequence.offset();
      const int64_t entry = min(max(position, int64_t{p.bias.row_first}), int64_t{p.bias.row_last}) - p.bias.row_first;
      p.row_scale[to] = p.bias.row_scale[entry];
    }
  }
  p.lse2[to] = lse == -infinity() ? infinity() : lse * LOG2E;
  p.minus_delta[to] = -delta;
}

// The accumulated dQ of one query at one dimension; a block's accumulators are in the order of its fragments, whose
// four elements lie side by side where one instruction adds them (SM90).
__device__ __forceinline__ float accumulated(const float* block, int row, int column) {
  using Part = QueryGradients;
  const int warp = row / (16 * Part::GROUPS) * QUERY_COLUMNS + column / (8 * Part::EIGHTS);
  const int group = row % (16 * Part::GROUPS) / 16, n = column % (8 * Part::EIGHTS) / 8;
  const int e = row % 16 / 8 * 2 + column % 2, lane = row % 8 * 4 + column % 8 / 2;
  const int fragment = group * Part::EIGHTS + n, thread = warp * WARP + lane;
  return block[SM90 ? (fragment * THREADS + thread) * 4 + e : (fragment * 4 + e) * THREADS + thread];
}

// A lane stores eight dimensions; a warp eight rows of 32.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_queries(const __grid_constant__ BackwardQueriesParams p) {
  constexpr int PARTS = PADDED / 32;
  const int blocks = ceil_div(p.shape.q_blocks * (BLOCK_M / 8) * PARTS, WARPS);
  const int head = blockIdx.x / blocks % p.shape.heads, index = blockIdx.x / blocks / p.shape.heads;
  const Sequence sequence(p.shape, p.mask, index);
  const int part = blockIdx.x % blocks * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int row = part / PARTS * 8 + lane % 8, column = (part % PARTS * 4 + lane / 8) * 8;
  if (row >= sequence.q_len || column >= DIM) return;
  const int64_t first = head * int64_t{p.rows} + first_row(p.shape, sequence, index) + row / BLOCK_M * BLOCK_M;
  const float* block = p.accumulated + first * PADDED;
  const int64_t token = sequence.q_start + row;
  float value[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) value[c] = accumulated(block, row % BLOCK_M, column + c) * p.scale;
  if constexpr (ROTARY) {
    const int64_t angles = sequence.batch * p.angles.batch + token * HALF;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const RotaryColumn at(column + c);
      if (at.rotates) {
        const float other = accumulated(block, row % BLOCK_M, at.partner) * p.scale;
        value[c] = at.back(value[c], other, p.angles.cos[angles + at.pair], p.angles.sin[angles + at.pair]);
      }
    }
  }
  Element* to = static_cast<Element*>(p.dq) + sequence.batch * p.dq_strides.batch + head * p.dq_strides.head +
                token * p.dq_strides.token + column;
  *reinterpret_cast<uint4*>(to) =
      uint4{pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]), pack(value[6], value[7])};
}

}  // namespace posattn
