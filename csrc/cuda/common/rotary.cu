// Rotary embedding of a whole tensor: K ahead of long prefill, where rotating each K tile again for every query block
// would cost more. BACK rotates by the negative angles, as the gradients of q and k need.
//
// One thread makes one chunk of eight elements of a token, so it reads what it rotates and its partners once.
#include "common/element.h"
#include "common/pages.h"

namespace posattn {

constexpr int CHUNKS = DIM / 8;

__device__ __forceinline__ void rotate_chunk(Element* out, const Element* x, const float* cos, const float* sin,
                                             int column) {
  uint32_t words[4];
  const uint4 own = *reinterpret_cast<const uint4*>(x + column);
  const uint32_t pairs[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float rotated[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int d = column + 2 * w + e;
      const float here = e ? high_float(pairs[w]) : low_float(pairs[w]);
      rotated[e] = here;
      if (d < 2 * HALF) {
        const bool first = INTERLEAVED ? e == 0 : d < HALF;
        const int pair = INTERLEAVED ? d / 2 : first ? d : d - HALF;
        float there;
        if constexpr (INTERLEAVED) {
          there = e ? low_float(pairs[w]) : high_float(pairs[w]);
        } else {
          there = to_float(x[first ? d + HALF : d - HALF]);
        }
        rotated[e] = here * cos[pair] + (first == BACK ? there : -there) * sin[pair];
      }
    }
    words[w] = pack(rotated[0], rotated[1]);
  }
  *reinterpret_cast<uint4*>(out + column) = uint4{words[0], words[1], words[2], words[3]};
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate(const __grid_constant__ RotaryParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t row = index / CHUNKS;  // of out
  const int token = row % p.tokens;
  const int64_t bh = row / p.tokens;
  const int64_t b = bh / p.heads, h = bh % p.heads;
  if (b >= p.batch) return;
  const Element* x = static_cast<const Element*>(p.x) + h * p.x_strides.head;
  if constexpr (PAGE == 0) {
    x += b * p.x_strides.batch + token * p.x_strides.token;
  } else {
    x += PagedTokens<PAGE>(p.pages, p.x_strides, static_cast<int>(b)).offset(token);
  }
  const int64_t angle = b * p.angles.batch + static_cast<int64_t>(token) * HALF;
  rotate_chunk(static_cast<Element*>(p.out) + row * DIM, x, p.angles.cos + angle, p.angles.sin + angle,
               static_cast<int>(index % CHUNKS) * 8);
}

}  // namespace posattn
