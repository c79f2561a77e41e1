// Attention forward for few queries, where reading K and V binds: the query heads that share a key head are packed into
// the rows of one tile, the warps of a block share out each tile's keys, and several blocks share out a sequence's.
//
// Row r of a key head is query r / group of query head r % group, so K and V are read once for all of them. A warp
// keeps a softmax and an output of its own over its 16 keys of every tile; they are joined at the end. Rows belong to
// several heads, so biases are gathered one logit at a time: 8 GROUPS a lane and tile, far less than the tile's bytes
// take.
#include "common/dropout.h"
#include "common/rotary.h"
#include "common/softmax.h"
#include "forward/decode_row.h"
#include "forward/key_loader.h"

namespace posattn {

constexpr int GROUPS = BLOCK_M / 16;
constexpr int ROWS = 2 * GROUPS;  // of a lane
constexpr int N8 = 2;             // a warp's keys of a tile, in eights
constexpr int OUT8 = HEAD_DIM_V / 8;
constexpr int K_STEPS = HEAD_DIM / 16;

// Shared memory: Q, then STAGES times K and V; at the end each warp's rows of the output, float32, and what weighs
// them.
constexpr int Q_BYTES = Tile<HEAD_DIM>::bytes(BLOCK_M);
constexpr int K_BYTES = Tile<HEAD_DIM>::bytes(BLOCK_N);
constexpr int V_BYTES = Tile<HEAD_DIM_V>::bytes(BLOCK_N);
constexpr int STAGE_BYTES = K_BYTES + V_BYTES;
constexpr int PART = BLOCK_M * HEAD_DIM_V;  // floats
static_assert(SHARED_BYTES >= Q_BYTES + STAGES * STAGE_BYTES);
static_assert(SHARED_BYTES >= WARPS * (PART + 2 * BLOCK_M) * 4);
static_assert(BLOCK_N == 16 * WARPS && THREADS == WARPS * WARP && STAGES >= 2);

extern __shared__ __align__(128) unsigned char shared[];

struct Decode {
  const ForwardParams& p;
  Sequence sequence;
  int kv;
  int r0;  // of this block's rows
  int thread;
  int lane;
  int warp;
  uint32_t memory;
  Reader<HEAD_DIM> k_reader;
  Reader<HEAD_DIM_V> v_reader;
  KeyLoader<HEAD_DIM, DIM, BLOCK_N, THREADS, K_PAGE> k_loader;
  KeyLoader<HEAD_DIM_V, DIM_V, BLOCK_N, THREADS, V_PAGE> v_loader;
  Softmax<GROUPS> softmax;
  Row row[ROWS];
  float out[GROUPS][OUT8][4];
  uint32_t q[GROUPS][K_STEPS][4];

  __device__ __forceinline__ Decode(const ForwardParams& p, const Sequence& sequence, int kv, int r0, int j0,
                                    int thread)
      : p(p),
        sequence(sequence),
        kv(kv),
        r0(r0),
        thread(thread),
        lane(thread % WARP),
        warp(thread / WARP),
        memory(ptx::shared_address(shared)),
        k_reader(Reader<HEAD_DIM>::b_operand(memory + Q_BYTES + Tile<HEAD_DIM>::bytes(16) * warp, lane)),
        v_reader(
            Reader<HEAD_DIM_V>::b_operand_trans(memory + Q_BYTES + K_BYTES + Tile<HEAD_DIM_V>::bytes(16) * warp, lane)),
        k_loader(p.k, p.k_strides, p.pages, sequence.batch, kv, sequence.k_start + j0, memory + Q_BYTES, thread),
        v_loader(p.v, p.v_strides, p.pages, sequence.batch, kv, sequence.k_start + j0, memory + Q_BYTES + K_BYTES,
                 thread) {
#pragma unroll
    for (int a = 0; a < ROWS; ++a) row[a].start(p, sequence, kv, r0 + lane / 4 + 8 * a);
#pragma unroll
    for (int x = 0; x < GROUPS * OUT8 * 4; ++x) out[x / 4 / OUT8][x / 4 % OUT8][x % 4] = 0.0f;
  }

  __device__ __forceinline__ int rows() const { return sequence.q_len * p.shape.group; }

  __device__ __forceinline__ void load_q() const {
    constexpr int CHUNKS = Tile<HEAD_DIM>::CHUNKS;
    for (int x = thread; x < BLOCK_M * CHUNKS; x += THREADS) {
      const int r = min(r0 + x / CHUNKS, rows() - 1), chunk = x % CHUNKS;
      const Element* from = static_cast<const Element*>(p.q) + sequence.batch * p.q_strides.batch +
                            (kv * p.shape.group + r % p.shape.group) * p.q_strides.head +
                            (sequence.q_start + r / p.shape.group) * p.q_strides.token + chunk * 8;
      ptx::cp_async_16(memory + Tile<HEAD_DIM>::offset(x / CHUNKS, chunk), from, chunk * 8 < DIM ? 16 : 0);
    }
  }

  __device__ __forceinline__ void load(int j0, uint32_t stage) {
    k_loader.next(stage, sequence.k_len - j0);
    v_loader.next(stage, sequence.k_len - j0);
  }

  __device__ __forceinline__ void read_q() {
    if constexpr (ROTARY_Q) {
      const int64_t at = sequence.batch * p.q_angles.batch + sequence.q_start * int64_t{HALF};
      const int group = p.shape.group, first = r0, last = rows() - 1;
      rotate_tile<Tile<HEAD_DIM>, BLOCK_M, THREADS>(shared, p.q_angles.cos + at, p.q_angles.sin + at, BLOCK_M, thread,
                                                    [=](int r) { return min(first + r, last) / group; });
      ptx::bar_sync();
    }
    const auto reader = Reader<HEAD_DIM>::a_operand(memory, 0, lane);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) ptx::ldmatrix_x4(q[g][k], reader.at(0, 16 * g, k));
    }
  }

  __device__ __forceinline__ void rotate_k(int j0, uint32_t stage) const {
    if constexpr (ROTARY_K) {
      const int64_t at = sequence.batch * p.k_angles.batch + (sequence.k_start + j0) * int64_t{HALF};
      rotate_tile<Tile<HEAD_DIM>, BLOCK_N, THREADS>(shared + Q_BYTES + stage, p.k_angles.cos + at, p.k_angles.sin + at,
                                                    sequence.k_len - j0, thread);
      ptx::bar_sync();
    }
  }

  // This warp's 16 keys of the tile at j0.
  __device__ __forceinline__ void attend(int j0, uint32_t stage) {
    float s[GROUPS][N8][4] = {};
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, k_reader.at(stage, 0, k));
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        mma(s[g][0], q[g][k], b[0], b[1]);
        mma(s[g][1], q[g][k], b[2], b[3]);
      }
    }
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int j = j0 + 16 * warp + 8 * (x / 2) + lane % 4 * 2 + x % 2;
      const int j_in = min(j, sequence.k_len - 1);
      const int64_t key = BY_DISTANCE ? key_position(p.positions, sequence, sequence.batch, j_in) : 0;
#pragma unroll
      for (int a = 0; a < ROWS; ++a) {
        float& logit = s[a / 2][x / 2][a % 2 * 2 + x % 2];
        logit = row[a].logit(p, sequence, logit, j, j_in, key);
      }
    }
    softmax.update(s, out, SCALE_BEFORE_BIAS ? LOG2E : p.scale * LOG2E);
    if constexpr (HAS_DROPOUT) {
#pragma unroll
      for (int a = 0; a < ROWS; ++a) {
        const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + row[a].h);
#pragma unroll
        for (int n = 0; n < N8; ++n) {
          bool keep[2];
          dropout.pair(keep, sequence.q_start + row[a].i, sequence.k_start + j0 + 16 * warp + 8 * n + lane % 4 * 2);
          if (!keep[0]) s[a / 2][n][a % 2 * 2] = 0.0f;
          if (!keep[1]) s[a / 2][n][a % 2 * 2 + 1] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int d = 0; d < OUT8; d += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, v_reader.at(stage, 0, d / 2));
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        const uint32_t a[4] = {pack(s[g][0][0], s[g][0][1]), pack(s[g][0][2], s[g][0][3]), pack(s[g][1][0], s[g][1][1]),
                               pack(s[g][1][2], s[g][1][3])};
        mma(out[g][d], a, b[0], b[1]);
        mma(out[g][d + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void join_and_store();
};

// Joins the warps' softmaxes and outputs and writes the block's rows.
__device__ __forceinline__ void Decode::join_and_store() {
  softmax.finish();
  float* const parts = reinterpret_cast<float*>(shared);  // [WARPS][BLOCK_M][HEAD_DIM_V]
  float* const references = parts + WARPS * PART;         // [WARPS][BLOCK_M]
  float* const sums = references + WARPS * BLOCK_M;       // [WARPS][BLOCK_M]
  ptx::bar_sync();                                        // other warps may still read the last tile
#pragma unroll
  for (int a = 0; a < ROWS; ++a) {
    const int r = lane / 4 + 8 * a;
    if (lane % 4 == 0) {
      references[warp * BLOCK_M + r] = softmax.reference(a);
      sums[warp * BLOCK_M + r] = softmax.l[a];
    }
#pragma unroll
    for (int d = 0; d < OUT8; ++d) {
      *reinterpret_cast<float2*>(parts + warp * PART + r * HEAD_DIM_V + 8 * d + lane % 4 * 2) =
          float2{out[a / 2][d][a % 2 * 2], out[a / 2][d][a % 2 * 2 + 1]};
    }
  }
  ptx::bar_sync();
  const int64_t split = SPLIT ? blockIdx.y : 0;
  for (int x = thread; x < BLOCK_M * (DIM_V / 2); x += THREADS) {
    const int r = x / (DIM_V / 2), column = x % (DIM_V / 2) * 2;
    if (r0 + r >= rows()) break;
    const int i = (r0 + r) / p.shape.group, h = kv * p.shape.group + (r0 + r) % p.shape.group;
    float m = LOWEST, total = 0.0f;
    if constexpr (HAS_SINKS && !SPLIT) {
      m = fmaxf(m, p.sinks[h] * LOG2E);
      for (int w = 0; w < WARPS; ++w) m = fmaxf(m, references[w * BLOCK_M + r]);
      total = ptx::ex2_approx(p.sinks[h] * LOG2E - m);
    } else {
      for (int w = 0; w < WARPS; ++w) m = fmaxf(m, references[w * BLOCK_M + r]);
    }
    float2 sum{0.0f, 0.0f};
    for (int w = 0; w < WARPS; ++w) {
      const float weight = ptx::ex2_approx(references[w * BLOCK_M + r] - m);
      const float2 part = *reinterpret_cast<const float2*>(parts + w * PART + r * HEAD_DIM_V + column);
      total = fmaf(sums[w * BLOCK_M + r], weight, total);
      sum.x = fmaf(part.x, weight, sum.x);
      sum.y = fmaf(part.y, weight, sum.y);
    }
    const float scale = (total == 0.0f ? 0.0f : 1.0f / total) * (HAS_DROPOUT ? p.dropout.keep_scale : 1.0f);
    const int64_t at = split * p.out_split + sequence.batch * p.out_strides.batch + h * p.out_strides.head +
                       (sequence.q_start + i) * p.out_strides.token + column;
    if constexpr (SPLIT) {
      *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = float2{sum.x * scale, sum.y * scale};
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + at) = pack(sum.x * scale, sum.y * scale);
    }
    if (column == 0) {
      p.lse[split * p.lse_split + (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.q_tokens +
            sequence.q_start + i] = total == 0.0f ? -infinity() : (m + ptx::lg2_approx(total)) * LN2;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(const __grid_constant__ ForwardParams p) {
  const int block = blockIdx.x % p.shape.q_blocks;
  const int head = blockIdx.x / p.shape.q_blocks;
  const int kv_heads = p.shape.heads / p.shape.group;
  const Sequence sequence(p.shape, p.mask, head / kv_heads);
  const int r0 = block * BLOCK_M;
  const int last = min(r0 + BLOCK_M, sequence.q_len * p.shape.group) - 1;
  if (last < r0) return;
  KeySpans spans(sequence, p.mask, r0 / p.shape.group, last / p.shape.group);
  if constexpr (REACH_ROWS > 0) {
    // All queries are one block of it; heads that share the keys walk them together.
    const int index = head / kv_heads;
    const int64_t at = PACKED ? sequence.q_start / REACH_ROWS + index : index;
    const int first_head = head % kv_heads * p.shape.group;
    const KeysInReach<BLOCK_N> keys(p.reach + 2 * (at * p.shape.heads + first_head), p.shape.group);
    spans.clip(keys.first, keys.end);
  }
  if constexpr (SPLIT) {
    const int from = blockIdx.y * p.split_tiles * BLOCK_N;
    spans.clip(from, from + p.split_tiles * BLOCK_N);
  }
  Decode d(p, sequence, head % kv_heads, r0, spans.lo, threadIdx.x);
  d.load_q();
#pragma unroll
  for (int t = 0; t < STAGES - 1; ++t) {
    if (spans.lo + t * BLOCK_N < spans.hi) d.load(spans.lo + t * BLOCK_N, t * STAGE_BYTES);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<STAGES - 2>();
  ptx::bar_sync();
  d.read_q();
  uint32_t stage = 0;
  for (int j0 = spans.lo; j0 < spans.hi; j0 += BLOCK_N) {
    ptx::cp_async_wait_group<STAGES - 2>();
    ptx::bar_sync();
    const int next = j0 + (STAGES - 1) * BLOCK_N;
    const uint32_t before = stage == 0 ? (STAGES - 1) * STAGE_BYTES : stage - STAGE_BYTES;
    if (next < spans.hi) d.load(next, before);
    ptx::cp_async_commit_group();
    d.rotate_k(j0, stage);
    d.attend(j0, stage);
    stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
  }
  d.join_and_store();
}

}  // namespace posattn
