// Ahead of the backward pass for sm_90a: queries and dO as it wants them in shared memory, panels of 64 columns with
// their swizzle, zeros past the end and past the head dimension. A tile is then one bulk copy, which takes no
// instructions of the warps that multiply and no part of their shared-memory path, and needs no tensor map of the
// driver. Each tile is read by all blocks of keys that see it, and written here once.
#include "common/element.h"
#include "common/mask.h"
#include "common/swizzle.h"

namespace posattn {

using QueryPanels = Panels<PADDED, BLOCK_M>;

template <int USED>
__device__ __forceinline__ void copy_tile(void* to, const Element* from, int64_t token_stride, int rows) {
  constexpr int CHUNKS = PADDED / 8;
  for (int x = threadIdx.x; x < BLOCK_M * CHUNKS; x += WARPS * WARP) {
    const int row = x / CHUNKS, chunk = x % CHUNKS;
    uint4 words{0, 0, 0, 0};
    if (row < rows && chunk * 8 < USED) words = *reinterpret_cast<const uint4*>(from + row * token_stride + chunk * 8);
    *reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + QueryPanels::offset(row, chunk)) = words;
  }
}

// A block for each tile.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    backward_tiles(const __grid_constant__ BackwardTilesParams p) {
  const int block = blockIdx.x % p.shape.q_blocks, head = blockIdx.x / p.shape.q_blocks % p.shape.heads;
  const int index = blockIdx.x / p.shape.q_blocks / p.shape.heads;
  const Sequence sequence(p.shape, p.mask, index);
  const int rows = sequence.q_len - block * BLOCK_M;
  if (rows <= 0) return;
  const int64_t token = sequence.q_start + block * BLOCK_M;
  const int first = first_query_block<BLOCK_M>(p.shape, sequence, index);
  const int64_t to = (head * int64_t{p.rows} + (first + block) * BLOCK_M) * PADDED;
  const auto from = [&](const void* tensor, const Strides& strides) {
    return static_cast<const Element*>(tensor) + sequence.batch * strides.batch + head * strides.head +
           token * strides.token;
  };
  copy_tile<DIM>(static_cast<Element*>(p.q_tiles) + to, from(p.q, p.q_strides), p.q_strides.token, rows);
  copy_tile<DIM_V>(static_cast<Element*>(p.grad_tiles) + to, from(p.grad_out, p.grad_out_strides),
                   p.grad_out_strides.token, rows);
}

}  // namespace posattn
