// Which keys each block of queries cannot do without, where a bias falls with the distance: ahead of the forward pass,
// and of the backward pass (turn.cu). BLOCK_N keys share their largest norm: a cell.
//
// The argument is the one of docs/design/triton.md: keys whose logits lie far enough below the nearest visible one's
// weigh, all together, less than 2^-40 of a row.
#include "common/element.h"
#include "common/pages.h"
#include "reach/reach.h"

namespace posattn {

constexpr float REACH_NATS = 27.7258872f;  // 2^40
// What rounding the operands (rotated ones, say) may add to their norms.
constexpr float NORM_SLACK = 1.01f;
constexpr int LANES = DIM <= 32 ? 4 : DIM <= 64 ? 8 : DIM <= 128 ? 16 : 32;  // of a row, eight elements each

__shared__ float of_warps[THREADS / WARP];

// The largest norm of `count` rows, row r being offset(r) elements from `first` on; infinite where one is not finite.
template <class Offset>
__device__ __forceinline__ float largest_norm(const Element* first, int count, const float* amplitude, Offset offset) {
  const int lane = threadIdx.x % LANES;
  float largest = 0.0f;
  for (int r0 = 0; r0 < count; r0 += THREADS / LANES) {
    const int r = min(r0 + static_cast<int>(threadIdx.x) / LANES, count - 1);
    float sum = 0.0f;
    if (lane < DIM / 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(first + offset(r) + lane * 8);
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        sum = fmaf(low_float(pairs[x]), low_float(pairs[x]), sum);
        sum = fmaf(high_float(pairs[x]), high_float(pairs[x]), sum);
      }
    }
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) sum += ptx::shfl_bfly(sum, mask);
    largest = fmaxf(largest, sum < infinity() ? sum : infinity());
  }
  return sqrtf(greatest(largest, of_warps)) * NORM_SLACK * (amplitude ? *amplitude : 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) key_norms(const __grid_constant__ ReachParams p) {
  const int kv_heads = p.shape.heads / p.shape.group;
  const int cell = blockIdx.x % p.shape.k_blocks, head = blockIdx.x / p.shape.k_blocks % kv_heads;
  const int index = blockIdx.x / p.shape.k_blocks / kv_heads;
  const Sequence sequence(p.shape, p.mask, index);
  const int j0 = cell * BLOCK_N;
  if (j0 >= sequence.k_len) return;
  const Element* first = static_cast<const Element*>(p.k) + head * p.k_strides.head;
  const int count = min(BLOCK_N, sequence.k_len - j0), token = sequence.k_start + j0;
  float norm;
  if constexpr (PAGE == 0) {
    first += sequence.batch * p.k_strides.batch + token * p.k_strides.token;
    norm = largest_norm(first, count, p.k_amplitude, [&](int r) { return r * p.k_strides.token; });
  } else {
    const PagedTokens<PAGE> pages(p.pages, p.k_strides, sequence.batch);
    norm = largest_norm(first, count, p.k_amplitude, [&](int r) { return pages.offset(token + r); });
  }
  if (threadIdx.x == 0) {
    p.norms[int64_t{head} * p.cells + block_of_all<BLOCK_N>(p.shape, sequence, index, cell)] = norm;
  }
}

// What scaled dot products of such norms cannot exceed. Of infinite ones some may be NaN: those stay.
__device__ __forceinline__ float product(const ReachParams& p, float q, float k) {
  const float most = p.scale * q * k;
  return HAS_SOFTCAP && most > p.softcap && most < infinity() ? p.softcap : most;
}

__device__ __forceinline__ int entry(const ReachParams& p, int distance) {
  return min(max(distance, p.table_first), p.table_last) - p.table_first;
}

extern "C" __global__ void __launch_bounds__(THREADS) find_reach(const __grid_constant__ ReachParams p) {
  static_assert(BLOCK_M <= THREADS);
  const int block = blockIdx.x % p.shape.q_blocks, head = blockIdx.x / p.shape.q_blocks % p.shape.heads;
  const int index = blockIdx.x / p.shape.q_blocks / p.shape.heads;
  const Sequence sequence(p.shape, p.mask, index);
  const int i0 = block * BLOCK_M, thread = threadIdx.x;
  if (i0 >= sequence.q_len) return;
  const int last = min(i0 + BLOCK_M, sequence.q_len) - 1, offset = sequence.offset();
  const Element* first = static_cast<const Element*>(p.q) + sequence.batch * p.q_strides.batch +
                         head * p.q_strides.head + (sequence.q_start + i0) * p.q_strides.token;
  const float q_norm = largest_norm(first, last + 1 - i0, p.q_amplitude, [&](int r) { return r * p.q_strides.token; });
  const float* norms =
      p.norms + int64_t{head / p.shape.group} * p.cells + block_of_all<BLOCK_N>(p.shape, sequence, index, 0);
  const float slope = HAS_SLOPE ? p.slope[sequence.batch * p.slope_batch + head] : 0.0f;

  // The least that a row's nearest visible key may have for a logit; a thread a row.
  float below = -infinity();  // its negative
  {
    const int i = i0 + thread;
    const int low = HAS_LEFT ? max(i + offset - p.mask.left, 0) : 0;
    const int high = HAS_RIGHT ? min(i + offset + p.mask.right + 1, sequence.k_len) : sequence.k_len;
    if (i <= last && low < high) {
      const int near = min(max(i + offset, low), high - 1), d = i + offset - near;
      float least = 0.0f;
      if constexpr (HAS_SLOPE) least -= slope * (SIGNED ? static_cast<float>(d) : fabsf(static_cast<float>(d)));
      if constexpr (HAS_TABLE) least += p.table[head * p.table_head + entry(p, d)];
      least -= product(p, q_norm, norms[near / BLOCK_N]);
      below = least == least ? -least : infinity();
    }
  }
  const float limit =
      -greatest(below, of_warps) - REACH_NATS - LN2 * ptx::lg2_approx(static_cast<float>(max(sequence.k_len, 1)));

  int before = -sequence.k_len, end = 0;  // of the first key in reach, its negative
  for (int n = thread; n * BLOCK_N < sequence.k_len; n += THREADS) {
    // Distances, in their order.
    const int nearest = i0 + offset - (min(n * BLOCK_N + BLOCK_N, sequence.k_len) - 1);
    const int farthest = last + offset - n * BLOCK_N;
    float most = product(p, q_norm, norms[n]);
    if constexpr (HAS_SLOPE) {
      float a = static_cast<float>(nearest), b = static_cast<float>(farthest);
      if constexpr (!SIGNED) {
        const float from = fmaxf(fmaxf(a, -b), 0.0f);
        b = fmaxf(b, -a);
        a = from;
      }
      most += fmaxf(-slope * a, -slope * b);
    }
    if constexpr (HAS_TABLE) {
      const int64_t row = head * int64_t{p.table_cells};
      most += fminf(p.behind[row + entry(p, nearest) / BLOCK_N], p.before[row + entry(p, farthest) / BLOCK_N]);
    }
    if (!(most <= limit)) {  // NaN is needed
      before = max(before, -n * BLOCK_N);
      end = max(end, n * BLOCK_N + BLOCK_N);
    }
  }
  before = greatest(before, reinterpret_cast<int*>(of_warps));
  end = greatest(end, reinterpret_cast<int*>(of_warps));
  if (thread == 0) {
    const int at = first_query_block<BLOCK_M>(p.shape, sequence, index) + block;
    int32_t* to = p.reach + 2 * (int64_t{at} * p.shape.heads + head);
    to[0] = -before;
    to[1] = end;
  }
}

}  // namespace posattn
