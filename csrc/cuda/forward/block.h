// One block of the forward pass: what it holds, the copies that fill it, what is done to a tile's logits, and its
// output.
#pragma once
#include "common/dropout.h"
#include "common/logits.h"
#include "common/rotary.h"
#include "common/softmax.h"
#include "forward/key_loader.h"

namespace posattn {

constexpr int GROUPS = Products::GROUPS;
constexpr int N8 = Products::N8;
constexpr int OUT8 = Products::OUT8;
constexpr bool STAGED_VALUES = (HAS_TABLE || HAS_PROFILE) && !EXPLICIT;

// Shared memory: Q, then STAGES times K, V and the staged values; the output takes the place of all at the end.
constexpr int Q_BYTES = Tile<HEAD_DIM>::bytes(BLOCK_M);
constexpr int K_BYTES = Tile<HEAD_DIM>::bytes(BLOCK_N);
constexpr int V_BYTES = Tile<HEAD_DIM_V>::bytes(BLOCK_N);
constexpr int VALUE_BYTES = STAGED_VALUES ? ceil_div(2 * STAGED * 4, Products::ALIGNMENT) * Products::ALIGNMENT : 0;
constexpr int STAGE_BYTES = K_BYTES + V_BYTES + VALUE_BYTES;
constexpr int OUT_BYTES = Tile<HEAD_DIM_V>::bytes(BLOCK_M);
static_assert(SHARED_BYTES >= Q_BYTES + STAGES * STAGE_BYTES && SHARED_BYTES >= OUT_BYTES);
static_assert(THREADS == WARPS * WARP);

extern __shared__ __align__(1024) unsigned char shared[];

struct Forward {
  const ForwardParams& p;
  Sequence sequence;
  int h;
  int i0;
  int thread;
  int lane;
  Place place;  // its column counts from 0
  uint32_t memory;
  Products products;
  KeyLoader<HEAD_DIM, DIM, BLOCK_N, THREADS, K_PAGE, Products::KLayout> k_loader;
  KeyLoader<HEAD_DIM_V, DIM_V, BLOCK_N, THREADS, V_PAGE, Products::VLayout> v_loader;
  DistanceBias<GROUPS> bias;
  Softmax<GROUPS> softmax;
  Dropout dropout;
  float out[GROUPS][OUT8][4];

  __device__ __forceinline__ Forward(const ForwardParams& p, const Sequence& sequence, int h, int i0, int j0,
                                     int thread)
      : p(p),
        sequence(sequence),
        h(h),
        i0(i0),
        thread(thread),
        lane(thread % WARP),
        place{i0 + thread / WARP * (16 * GROUPS) + lane / 4, lane % 4 * 2},
        memory(ptx::shared_address(shared)),
        products(memory, memory + Q_BYTES, memory + Q_BYTES + K_BYTES, thread),
        k_loader(p.k, p.k_strides, p.pages, sequence.batch, h / p.shape.group, sequence.k_start + j0, memory + Q_BYTES,
                 thread),
        v_loader(p.v, p.v_strides, p.pages, sequence.batch, h / p.shape.group, sequence.k_start + j0,
                 memory + Q_BYTES + K_BYTES, thread),
        bias(p.bias, sequence, sequence.batch, h, place.row, lane),
        dropout(p.dropout, sequence.batch * p.shape.heads + h) {
#pragma unroll
    for (int x = 0; x < GROUPS * OUT8 * 4; ++x) out[x / 4 / OUT8][x / 4 % OUT8][x % 4] = 0.0f;
  }

  __device__ __forceinline__ void load_q() {
    const Element* first = static_cast<const Element*>(p.q) + sequence.batch * p.q_strides.batch + h * p.q_strides.head;
    Loader<HEAD_DIM, DIM, BLOCK_M, THREADS, Products::QLayout> loader(first, p.q_strides.token, sequence.q_start + i0,
                                                                      memory, thread);
    loader.next(0, sequence.q_len - i0);
  }

  __device__ __forceinline__ void load_k(int j0, uint32_t stage) { k_loader.next(stage, sequence.k_len - j0); }

  // V, and the bias of the tile's distances.
  __device__ __forceinline__ void load_v(int j0, uint32_t stage) {
    v_loader.next(stage, sequence.k_len - j0);
    if constexpr (STAGED_VALUES) {
      const int least = i0 + sequence.offset() - (j0 + BLOCK_N - 1);
      bias.stage(p.bias, memory + Q_BYTES + K_BYTES + V_BYTES + stage, least, thread);
    }
  }

  __device__ __forceinline__ void rotate_q() {
    if constexpr (ROTARY_Q) {
      const int64_t at = sequence.batch * p.q_angles.batch + (sequence.q_start + i0) * int64_t{HALF};
      rotate_tile<Products::QLayout, BLOCK_M, THREADS>(shared, p.q_angles.cos + at, p.q_angles.sin + at,
                                                       sequence.q_len - i0, thread);
      Products::publish();
      ptx::bar_sync();
    }
  }

  __device__ __forceinline__ void rotate_k(int j0, uint32_t stage) {
    if constexpr (ROTARY_K) {
      const int64_t at = sequence.batch * p.k_angles.batch + (sequence.k_start + j0) * int64_t{HALF};
      rotate_tile<Products::KLayout, BLOCK_N, THREADS>(shared + Q_BYTES + stage, p.k_angles.cos + at,
                                                       p.k_angles.sin + at, sequence.k_len - j0, thread);
      Products::publish();
      ptx::bar_sync();
    }
  }

  // From dot products to exponents in base 2, less the rows' references.
  template <bool BORDER>
  __device__ __forceinline__ void finish_logits(float (&s)[GROUPS][N8][4], int j0, uint32_t stage,
                                                const Segments& segments) {
    const Place here{place.row, place.column + j0};
    if constexpr (HAS_SOFTCAP) scale_logits(s, p.scale, p.softcap);
    const float scale = HAS_SOFTCAP ? 1.0f : p.scale;
    if constexpr (BY_DISTANCE && !EXPLICIT) {
      const int at = (place.row - i0) - place.column + BLOCK_N - 1;
      const float* staged = reinterpret_cast<const float*>(shared + Q_BYTES + K_BYTES + V_BYTES + stage) + at;
      bias.exponents(s, scale, softmax.m, staged, here.row + sequence.offset() - here.column, segments);
    } else {
#pragma unroll
      for (int x = 0; x < GROUPS * N8 * 4; ++x) {
        float& z = s[x / 4 / N8][x / 4 % N8][x % 4];
        z = fmaf(z, scale * LOG2E, -softmax.m[x / 4 / N8 * 2 + x % 4 / 2]);
      }
    }
    add_gathered(s, p.bias, p.positions, sequence, h, here, LOG2E);
    if constexpr (BORDER || HAS_BOOLEAN) apply_mask<BORDER>(s, p.mask, sequence, h, here);
  }

  __device__ __forceinline__ Segments segments(int j0) const {
    if constexpr (HAS_PROFILE && !EXPLICIT) {
      return bias.profile.segments(p.bias, place.row - lane / 4 + sequence.offset() - (j0 + BLOCK_N - 1));
    }
    return Segments{};
  }

  __device__ __forceinline__ void drop(float (&s)[GROUPS][N8][4], int j0) const {
    if constexpr (HAS_DROPOUT) {
#pragma unroll
      for (int a = 0; a < 2 * GROUPS; ++a) {
#pragma unroll
        for (int n = 0; n < N8; ++n) {
          bool keep[2];
          dropout.pair(keep, sequence.q_start + place.row + 8 * a, sequence.k_start + j0 + place.column + 8 * n);
          if (!keep[0]) s[a / 2][n][a % 2 * 2] = 0.0f;
          if (!keep[1]) s[a / 2][n][a % 2 * 2 + 1] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void store();
};

// Normalises the rows and writes out and lse.
__device__ __forceinline__ void Forward::store() {
  if constexpr (HAS_SINKS && !SPLIT) {
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) softmax.add_sink(a, p.sinks[h], out, lane % 4 == 0);
  }
  softmax.finish();
  const int64_t split = SPLIT ? blockIdx.y : 0;
  float* lse = p.lse + split * p.lse_split +
               (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.q_tokens + sequence.q_start;
  float weight[2 * GROUPS];
#pragma unroll
  for (int a = 0; a < 2 * GROUPS; ++a) {
    if (lane % 4 == 0 && place.row + 8 * a < sequence.q_len) lse[place.row + 8 * a] = softmax.lse(a);
    weight[a] = softmax.l[a] == 0.0f ? 0.0f : 1.0f / softmax.l[a];
    if constexpr (HAS_DROPOUT) weight[a] *= p.dropout.keep_scale;
  }
  const int64_t first = split * p.out_split + sequence.batch * p.out_strides.batch + h * p.out_strides.head;
  if constexpr (SPLIT) {
    float* to = static_cast<float*>(p.out) + first;
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) {
      const int row = place.row + 8 * a;
      if (row >= sequence.q_len) continue;
#pragma unroll
      for (int d = 0; d < OUT8; ++d) {
        if (8 * d >= DIM_V) break;
        const float2 pair{out[a / 2][d][a % 2 * 2] * weight[a], out[a / 2][d][a % 2 * 2 + 1] * weight[a]};
        const int64_t at = (sequence.q_start + row) * p.out_strides.token + 8 * d + place.column;
        *reinterpret_cast<float2*>(to + at) = pair;
      }
    }
  } else {
    // Where each warp's rows of the output lie on its own rows of Q, no other warp reads there.
    if constexpr (Products::OUT_ON_OWN_Q) {
      ptx::bar_warp_sync();
    } else {
      ptx::bar_sync();
    }
    const int row0 = place.row - i0;
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) {
#pragma unroll
      for (int d = 0; d < OUT8; ++d) {
        const uint32_t pair = pack(out[a / 2][d][a % 2 * 2] * weight[a], out[a / 2][d][a % 2 * 2 + 1] * weight[a]);
        ptx::st_shared(memory + Tile<HEAD_DIM_V>::element(row0 + 8 * a, 8 * d + place.column), pair);
      }
    }
    ptx::bar_warp_sync();  // each warp stores the rows it wrote, 16 bytes a lane
    Element* to = static_cast<Element*>(p.out) + first;
    constexpr int CHUNKS = DIM_V / 8;
    for (int x = lane; x < 16 * GROUPS * CHUNKS; x += WARP) {
      const int row = thread / WARP * (16 * GROUPS) + x / CHUNKS, chunk = x % CHUNKS;
      if (i0 + row >= sequence.q_len) break;
      uint32_t words[4];
      ptx::ld_shared_v4(words, memory + Tile<HEAD_DIM_V>::offset(row, chunk));
      Element* place = to + (sequence.q_start + i0 + row) * p.out_strides.token + 8 * chunk;
      *reinterpret_cast<uint4*>(place) = uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

}  // namespace posattn
