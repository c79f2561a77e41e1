// The second step of split-KV attention: a warp weighs the partial outputs of one row by their log-sum-exps, and adds
// the sink.
#include "common/element.h"
#include "params.h"

namespace posattn {

constexpr int WARPS = THREADS / WARP;
constexpr int WORDS = ceil_div(MAX_SPLITS, WARP);  // a lane's log-sum-exps

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, ptx::shfl_bfly(x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += ptx::shfl_bfly(x, step);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_combine(const __grid_constant__ CombineParams p) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= p.rows) return;
  const int h = row / p.q_tokens % p.heads;
  float weight[WORDS];
  float m = LOWEST;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const int split = w * WARP + lane;
    weight[w] = split < p.splits ? p.partial_lse[split * p.rows + row] * LOG2E : -infinity();
    m = fmaxf(m, weight[w]);
  }
  m = warp_max(m);
  if constexpr (HAS_SINKS) m = fmaxf(m, p.sinks[h] * LOG2E);
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    weight[w] = ptx::ex2_approx(weight[w] - m);
    total += weight[w];
  }
  total = warp_sum(total);
  if constexpr (HAS_SINKS) total += ptx::ex2_approx(p.sinks[h] * LOG2E - m);
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  if (lane == 0) p.lse[row] = total == 0.0f ? -infinity() : (m + ptx::lg2_approx(total)) * LN2;

  constexpr int COLUMNS = ceil_div(DIM_V, 2 * WARP);  // pairs of a lane
  float2 sum[COLUMNS] = {};
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    for (int x = 0; x < min(p.splits - w * WARP, WARP); ++x) {
      const float share = ptx::shfl_idx(weight[w], x);
      const float* part = p.partial + ((w * WARP + x) * p.rows + row) * DIM_V;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const int column = 2 * (c * WARP + lane);
        if (column >= DIM_V) break;
        const float2 pair = *reinterpret_cast<const float2*>(part + column);
        sum[c].x = fmaf(pair.x, share, sum[c].x);
        sum[c].y = fmaf(pair.y, share, sum[c].y);
      }
    }
  }
  Element* out = static_cast<Element*>(p.out) + row / p.q_tokens / p.heads * p.out_strides.batch +
                 h * p.out_strides.head + row % p.q_tokens * p.out_strides.token;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = 2 * (c * WARP + lane);
    if (column < DIM_V) *reinterpret_cast<uint32_t*>(out + column) = pack(sum[c].x * scale, sum[c].y * scale);
  }
}

}  // namespace posattn
