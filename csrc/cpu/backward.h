// Flash attention backward in five products. A task is a run of keys of one key head: their gradients stay in the
// task, and dQ is added to in task order (tasks.h), so no product is done twice and the sum does not depend on threads.
#pragma once

#include "bias_grad.h"
#include "decode.h"

namespace posattn::POSATTN_ISA {

// Keys of a task and rows of a step: K, V and their gradients (five 192 x D tiles) and two 96 x 192 tiles of P and dS
// take 440 KB at D = 64, within a 1 MB second-level cache. Both are multiples of MR.
constexpr int64_t KEYS_PER_TASK = 192;
constexpr int64_t ROWS_PER_STEP = 96;
constexpr int64_t GROUPS = ROWS_PER_STEP / MR;
// An odd number of cache lines: the columns of P and dS are read with this stride.
constexpr int64_t TILE_STRIDE = KEYS_PER_TASK + 16;
static_assert(KEYS_PER_TASK % MR == 0 && KEYS_PER_TASK % NR == 0 && KEYS_PER_TASK + 2 * NR <= ROW_MAX);

template <class M>
struct BackwardScratch {
  int64_t q_stride, o_stride, q_width, v_width;
  float *k_panels, *v_panels, *k_depth, *grad_k, *grad_v;
  float *q_rows, *q_depth, *o_rows, *o_depth;
  float *p, *ds, *ds_rows;  // P and dS as operands of products over rows; dS as operand over keys
  float *p_float, *ds_float, *cap_slope, *keep, *dq;
  BiasTile bias;
  BiasGrad bias_grad;

  BackwardScratch(Arena& arena, const Problem& c, int64_t longest_q) {
    q_stride = round_up(c.head_dim, 2 * VL) / M::pack;
    o_stride = round_up(c.value_dim, 2 * VL) / M::pack;
    q_width = round_up(c.head_dim, VL), v_width = round_up(c.value_dim, VL);
    k_panels = arena.floats(KEYS_PER_TASK * panel_rows<M>(c.head_dim));
    v_panels = arena.floats(KEYS_PER_TASK * panel_rows<M>(c.value_dim));
    k_depth = arena.floats(KEYS_PER_TASK / M::pack * q_width);
    grad_k = arena.floats(KEYS_PER_TASK * q_width);
    grad_v = arena.floats(KEYS_PER_TASK * v_width);
    q_rows = arena.floats(ROWS_PER_STEP * q_stride);
    o_rows = arena.floats(ROWS_PER_STEP * o_stride);
    q_depth = arena.floats(ROWS_PER_STEP / M::pack * q_width);
    o_depth = arena.floats(ROWS_PER_STEP / M::pack * v_width);
    p_float = arena.floats(MR * TILE_STRIDE);
    ds_float = arena.floats(MR * TILE_STRIDE);
    p = arena.floats(ROWS_PER_STEP / M::pack * TILE_STRIDE);
    ds = arena.floats(ROWS_PER_STEP / M::pack * TILE_STRIDE);
    ds_rows = M::pack == 1 ? ds : arena.floats(MR * TILE_STRIDE);
    cap_slope = arena.floats(TILE_STRIDE);
    keep = arena.floats(TILE_STRIDE);
    dq = arena.floats(MR * q_width);
    bias.layout(arena, c.bias, longest_q, KEYS_PER_TASK);
    bias_grad.layout(arena, c, c.bias, longest_q, KEYS_PER_TASK);
  }
};

// Undoes the turn that the forward operand had.
inline void turn_back(float* row, const float* cos, const float* sin, int64_t b, int64_t batch_stride, int64_t t,
                      const Rotary& r) {
  if (cos)
    rotate(row, cos + b * batch_stride + t * r.half, sin + b * batch_stride + t * r.half, r.half, r.interleaved, -1.0F);
}

// What a row's logits are measured by: a row without keys has logits of -inf, for which any number serves.
inline float row_lse(float lse) {
  return lse == NEG_INF ? 0.0F : lse;
}

// Logits x (times mul) and the lse that they are measured by, where that is far, become their difference.
inline void reduce_far(float* x, int64_t n, float& mul, float& lse) {
  if (!is_far(lse)) return;
  subtract_far(x, n, mul, lse);
  mul = 1.0F, lse = 0.0F;
}

// delta = <dO, O> - dlse.
inline void row_dots(const Problem& p, int64_t row) {
  alignas(64) float a[MAX_WIDTH], b[MAX_WIDTH];
  const int64_t i = row % p.q_len, h = row / p.q_len % p.heads, n = row / p.q_len / p.heads;
  load_floats(a, row_pointer(p.grad_out, n, h, i), p.grad_out.dtype, p.value_dim);
  load_floats(b, row_pointer(p.out, n, h, i), p.out.dtype, p.value_dim);
  // In float64: an error of delta is the same for a whole row of dS, so it does not average out in bias gradients.
  typedef double vd __attribute__((vector_size(2 * POSATTN_VECTOR_BYTES)));
  const int64_t padded = round_up(p.value_dim, VL);
  fill(a + p.value_dim, 0.0F, padded - p.value_dim);
  fill(b + p.value_dim, 0.0F, padded - p.value_dim);
  vd sums = {};
  for (int64_t c = 0; c < padded; c += VL)
    sums += __builtin_convertvector(load(a + c), vd) * __builtin_convertvector(load(b + c), vd);
  double sum = p.grad_lse ? -static_cast<double>(p.grad_lse[row]) : 0.0;
  for (int lane = 0; lane < VL; ++lane) sum += sums[lane];
  p.delta[row] = static_cast<float>(sum);
}

// One row: logits x and dP become P (in x) and dS (in dp), in float32.
struct RowStep {
  const Problem& p;
  const Sequence& s;
  const BiasTile& bias;
  const Dropout& dropout;
  float lse, rest, delta;  // rest: what the lse lost to float32, in units of log2 (see find_rests)

  template <int EXP_DEGREE>
  void run(float* x, float* dp, int64_t i, int64_t j, int64_t n, float mul, float* cap_slope, float* keep,
           BiasGrad& grad) const {
    finish_row(p, s, bias, x, i, allowed(p, s, i), j, n, mul, p.softcap > 0.0F ? cap_slope : nullptr);
    float from = lse;
    reduce_far(x, n, mul, from);
    const Log2 base(from);
    const vf times = set1(mul * LOG2E), high = set1(-base.high), low = set1(base.low), left = set1(rest),
             minus_delta = set1(-delta);
    if (p.dropout_p > 0.0) {
      dropout.row(keep, s.b * p.heads + bias.head, s.q0 + i, s.k0 + j, n);
      for (int64_t c = 0; c < n; c += VL) {
        vf weight = exp2<EXP_DEGREE>(fused(load(x + c), times, high) - low - left), kept = load(keep + c);
        store(x + c, weight * kept);
        store(dp + c, weight * fma(load(dp + c), kept, minus_delta));
      }
    } else {
      for (int64_t c = 0; c < n; c += VL) {
        vf weight = exp2<EXP_DEGREE>(fused(load(x + c), times, high) - low - left);
        store(x + c, weight);
        store(dp + c, weight * (load(dp + c) + minus_delta));
      }
    }
    if (grad.any()) grad.add(dp, i, j, n);
    if (cap_slope && p.softcap > 0.0F)
      for (int64_t c = 0; c < n; c += VL) store(dp + c, load(dp + c) * load(cap_slope + c));
  }
};

// C[keys x width] += T[rows x keys]^T B[rows x width], over the rows of groups whose keys begin .. end reach the keys.
template <class M>
inline void add_over_rows(float* c, int64_t width, const float* t, const float* b, int64_t keys, int64_t groups,
                          const int64_t* begin, const int64_t* end) {
  for (int64_t k = 0; k < keys; k += MR) {
    int64_t from = 0, to = groups;
    while (from < to && (end[from] <= k || begin[from] >= k + MR)) ++from;
    while (from < to && (end[to - 1] <= k || begin[to - 1] >= k + MR)) --to;
    if (from >= to) continue;
    const int64_t r0 = from * MR / M::pack, r1 = to * MR / M::pack;
    gemm_rows<M, Into::sum>(t + r0 * TILE_STRIDE + k, 1, TILE_STRIDE, b + r0 * width, width, c + k * width, width,
                            r1 - r0, width / VL);
  }
}

// The sum over keys of dQ, rows first .. first + count, += dS K; through `buffer` where MR whole rows do not fit.
template <class M>
inline void add_to_grad_q(const Problem& p, int64_t first, int64_t count, const float* ds, int64_t ds_row,
                          const float* k_depth, int64_t k_len, float* buffer) {
  const int64_t width = round_up(p.head_dim, VL);
  float* sums = p.grad_q_sum + first * p.head_dim;
  if (count == MR && width == p.head_dim)
    return gemm_rows<M, Into::sum>(ds, ds_row, 1, k_depth, width, sums, width, k_len, width / VL);
  for (int64_t r = 0; r < count; ++r) load_floats(buffer + r * width, sums + r * p.head_dim, DType::f32, p.head_dim);
  gemm_rows<M, Into::sum>(ds, ds_row, 1, k_depth, width, buffer, width, k_len, width / VL);
  for (int64_t r = 0; r < count; ++r) store_floats(sums + r * p.head_dim, buffer + r * width, DType::f32, p.head_dim);
}

// A task's dK (times `scale`, turned back) and dV.
inline void write_key_grads(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j0, int64_t keys, float scale,
                            float* grad_k, int64_t k_width, const float* grad_v, int64_t v_width) {
  for (int64_t c = 0; c < keys; ++c) {
    const int64_t token = s.k0 + j0 + c;
    if (p.grad_k) {
      float* row = grad_k + c * k_width;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= scale;
      turn_back(row, p.rotary.k_cos, p.rotary.k_sin, s.b, p.rotary.k_batch, token, p.rotary);
      store_floats(const_cast<char*>(row_pointer(p.grad_k, s.b, kv_head, token)), row, p.grad_k.dtype, p.head_dim);
    }
    if (p.grad_v)
      store_floats(const_cast<char*>(row_pointer(p.grad_v, s.b, kv_head, token)), grad_v + c * v_width, p.grad_v.dtype,
                   p.value_dim);
  }
}

// A task's place among those that add to the same sums, in the order of their numbers.
struct Turn {
  int64_t task, stride;  // `stride` tasks take one run of keys
  Progress &progress, &flushed;

  // The one that adds to the same rows of dQ before; negative if there is none.
  int64_t earlier() const { return task - stride; }
  // Heads or batches that share a broadcast dense bias add to the same entries of its gradient: one after the other.
  // Published steps stand for all that came before them, so a step without work waits as well.
  int64_t before() const { return task % stride == 0 ? -1 : task - 1; }
};

inline bool shares_dense_gradient(const Problem& p) {
  return p.bias.grad_dense &&
         ((p.bias.grad_dense_head == 0 && p.heads > 1) || (p.bias.grad_dense_batch == 0 && p.batch > 1));
}

template <class M>
void backward_task(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn,
                   const float* rests, BackwardScratch<M>& t) {
  auto& [task, stride, progress, flushed] = turn;
  const int64_t group = p.heads / p.kv_heads, keys = imin(KEYS_PER_TASK, s.k_len - j0);
  const int64_t steps = ceil_div(s.q_len, ROWS_PER_STEP);
  const float q_scale = M::pack == 1 ? p.scale : 1.0F, product_scale = M::pack == 1 ? 1.0F : p.scale;
  const int64_t q_depth = elements<M>(p.head_dim), v_depth = elements<M>(p.value_dim);
  const int64_t k_panel = panel_rows<M>(p.head_dim) * NR, v_panel = panel_rows<M>(p.value_dim) * NR;
  const Source key_rows = key_source(p, s, kv_head), value_rows = value_source(p, s, kv_head);
  const Dropout dropout(p);
  const bool shared_dense = shares_dense_gradient(p);
  const int64_t before = turn.before();

  pack_panels<M>(t.k_panels, key_rows, j0, keys);
  pack_panels<M>(t.v_panels, value_rows, j0, keys);
  pack_depth<M>(t.k_depth, t.q_width, key_rows, j0, keys, KEYS_PER_TASK);
  fill(t.grad_k, 0.0F, KEYS_PER_TASK * t.q_width);
  fill(t.grad_v, 0.0F, KEYS_PER_TASK * t.v_width);

  for (int64_t member = 0; member < group; ++member) {
    const int64_t h = kv_head * group + member;
    const Source q_source = query_source(p, s, h, q_scale);
    const Source o_source{p.grad_out, s.b, h, s.q0, p.value_dim};
    const int64_t first_row = (s.b * p.heads + h) * p.q_len + s.q0;
    t.bias.prepare(p, p.bias, s, h, {0, s.q_len, j0, j0 + keys});
    t.bias_grad.clear(t.bias, member == 0);

    for (int64_t step = 0; step < steps && !interrupted(); ++step) {
      const int64_t i0 = step * ROWS_PER_STEP, rows = imin(ROWS_PER_STEP, s.q_len - i0);
      const Interval any = needed_by_any(p, s, h, i0, i0 + rows);
      if (any.lo >= j0 + keys || any.hi <= j0) {
        if (shared_dense) progress.wait(before, (group - 1) * steps + step + 1);
        progress.publish(task, member * steps + step + 1);
        continue;
      }
      const int64_t groups = ceil_div(rows, MR);
      int64_t begin[GROUPS], end[GROUPS];
      pack_rows<M>(t.q_rows, t.q_stride, q_source, i0, rows, groups * MR);
      pack_rows<M>(t.o_rows, t.o_stride, o_source, i0, rows, groups * MR);
      pack_depth<M>(t.q_depth, t.q_width, q_source, i0, rows, groups * MR);
      pack_depth<M>(t.o_depth, t.v_width, o_source, i0, rows, groups * MR);
      if (shared_dense) progress.wait(before, (group - 1) * steps + step + 1);
      progress.wait(turn.earlier(), member * steps + step + 1);

      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r0 = g * MR, count = imin(MR, rows - r0);
        const Interval reach = needed_by_any(p, s, h, i0 + r0, i0 + r0 + count);
        begin[g] = end[g] = 0;
        if (reach.lo >= j0 + keys || reach.hi <= j0) continue;
        begin[g] = imax(reach.lo - j0, 0) / NR * NR;
        end[g] = round_up(imin(reach.hi - j0, keys), 2 * VL);
        const int64_t from = begin[g], n = end[g] - from;
        float* p_tile = M::pack == 1 ? t.p + r0 * TILE_STRIDE : t.p_float;
        float* ds_tile = M::pack == 1 ? t.ds + r0 * TILE_STRIDE : t.ds_float;
        for (int64_t c = from; c < end[g]; c += NR) {
          const int64_t vectors = imin(NR, end[g] - c) / VL;
          gemm_rows<M, Into::fresh>(t.q_rows + r0 * t.q_stride, t.q_stride, 1, t.k_panels + c / NR * k_panel, NR,
                                    p_tile + c, TILE_STRIDE, q_depth, vectors);
          gemm_rows<M, Into::fresh>(t.o_rows + r0 * t.o_stride, t.o_stride, 1, t.v_panels + c / NR * v_panel, NR,
                                    ds_tile + c, TILE_STRIDE, v_depth, vectors);
        }
        for (int64_t r = 0; r < MR; ++r) {
          float *x = p_tile + r * TILE_STRIDE, *dp = ds_tile + r * TILE_STRIDE;
          if (r < count) {
            const int64_t at = first_row + i0 + r0 + r;
            const RowStep row{p, s, t.bias, dropout, row_lse(p.lse[at]), rests[at], p.delta[at]};
            row.template run<M::exp_degree>(x + from, dp + from, i0 + r0 + r, j0 + from, n, product_scale, t.cap_slope,
                                            t.keep, t.bias_grad);
          } else {
            fill(x + from, 0.0F, n);
            fill(dp + from, 0.0F, n);
          }
          fill(x, 0.0F, from);
          fill(dp, 0.0F, from);
          fill(x + end[g], 0.0F, KEYS_PER_TASK - end[g]);
          fill(dp + end[g], 0.0F, KEYS_PER_TASK - end[g]);
        }
        const float* ds_rows = ds_tile;
        if constexpr (M::pack == 2) {
          for (int64_t r = 0; r < MR; r += 2) {
            const int64_t pair = (r0 + r) / 2 * TILE_STRIDE;
            const float *x = p_tile + r * TILE_STRIDE, *dp = ds_tile + r * TILE_STRIDE;
            for (int64_t c = 0; c < KEYS_PER_TASK; c += VL) {
              store(t.p + pair + c, bf16_pair(load(x + c), load(x + TILE_STRIDE + c)));
              store(t.ds + pair + c, bf16_pair(load(dp + c), load(dp + TILE_STRIDE + c)));
            }
            for (int64_t q = 0; q < 2; ++q)
              to_elements<M>(t.ds_rows + (r + q) * TILE_STRIDE, dp + q * TILE_STRIDE, KEYS_PER_TASK);
          }
          ds_rows = t.ds_rows;
        }
        if (p.grad_q) {
          add_to_grad_q<M>(p, first_row + i0 + r0, count, ds_rows + from / M::pack, TILE_STRIDE,
                           t.k_depth + from / M::pack * t.q_width, n / M::pack, t.dq);
        }
      }
      progress.publish(task, member * steps + step + 1);
      if (p.grad_v) add_over_rows<M>(t.grad_v, t.v_width, t.p, t.o_depth, keys, groups, begin, end);
      if (p.grad_k) add_over_rows<M>(t.grad_k, t.q_width, t.ds, t.q_depth, keys, groups, begin, end);
    }
    if (t.bias_grad.any()) {
      flushed.wait(task - 1, member + 1);
      t.bias_grad.flush(member == group - 1);
      flushed.publish(task, member + 1);
    }
  }

  // dK = scale dS^T q, and in float32 the packed q carries the scale already.
  write_key_grads(p, s, kv_head, j0, keys, M::pack == 1 ? 1.0F : p.scale, t.grad_k, t.q_width, t.grad_v, t.v_width);
}

// From here on float32 rounds a log-sum-exp by more than 3e-5: rows masked with -1e9 or the lowest float, or logits
// that large. The weights of such a row are summed again, over logits of the bits that the backward pass will compute,
// and log2 of their sum is what the lse lacks.
constexpr float LARGE_LSE = 512.0F;

inline bool large(float lse) {
  const float size = lse < 0.0F ? -lse : lse;
  return size > LARGE_LSE && size < -NEG_INF;
}

template <class M>
struct RestScratch {
  static constexpr int64_t rows = M::tiles ? M::rows : 1;  // of a product; all but the first are zero
  float *q, *k, *logits;
  BiasTile bias;
  RestScratch(Arena& arena, const Problem& p) {
    q = arena.floats(rows * round_up(p.head_dim, 2 * VL) / M::pack);
    k = arena.floats(DECODE_KEYS * panel_rows<M>(p.head_dim));
    logits = arena.floats(rows * ROW_MAX);
    bias.layout(arena, p.bias, 1, p.max_k_len);
  }
};

template <class M>
inline float find_rest(const Problem& p, const Sequence& s, int64_t h, int64_t i, float lse, RestScratch<M>& t) {
  const int64_t panel = panel_rows<M>(p.head_dim) * NR, depth = elements<M>(p.head_dim);
  const Source keys = key_source(p, s, h / (p.heads / p.kv_heads));
  const int64_t q_stride = round_up(p.head_dim, 2 * VL) / M::pack;
  pack_rows<M>(t.q, q_stride, query_source(p, s, h, M::pack == 1 ? p.scale : 1.0F), i, 1, t.rows);
  t.bias.prepare(p, p.bias, s, h, {i, i + 1, 0, s.k_len});
  const Interval row = allowed(p, s, i);
  double sum = 0.0;
  for (int64_t j = row.lo / DECODE_KEYS * DECODE_KEYS; j < row.hi; j += DECODE_KEYS) {
    const int64_t n = imin(DECODE_KEYS, s.k_len - j), padded = round_up(n, 2 * VL);
    pack_panels<M>(t.k, keys, j, n);
    for (int64_t c = 0; c < n; c += NR) {
      const float* columns = t.k + c / NR * panel;
      if constexpr (M::tiles)
        gemm_rows<M, Into::fresh>(t.q, q_stride, 1, columns, NR, t.logits + c, ROW_MAX, depth, NR / VL);
      else
        micro<M, 1, NV_MAX, Into::fresh>(t.q, 0, 1, columns, NR, t.logits + c, 0, depth);
    }
    float mul = M::pack == 1 ? 1.0F : p.scale;
    finish_row(p, s, t.bias, t.logits, i, row, j, padded, mul);
    float from = lse;
    reduce_far(t.logits, padded, mul, from);
    const Log2 base(from);
    for (int64_t c = 0; c < padded; c += VL)
      sum += reduce_add(exp2<5>(fused(load(t.logits + c), set1(mul * LOG2E), set1(-base.high)) - set1(base.low)));
  }
  if (p.sinks) sum += ::exp(static_cast<double>(p.sinks[h]) - static_cast<double>(lse));
  return sum > 0.0 ? static_cast<float>(::log2(sum)) : 0.0F;
}

// [B, H, Tq], zero but for rows of a large lse.
template <class M>
inline void find_rests(const Problem& p, float* rests) {
  fill(rests, 0.0F, p.batch * p.heads * p.q_len);
  run_tasks(
      p.threads, p.n_sequences * p.heads, [&](Arena& arena) { RestScratch<M>(arena, p); },
      [&](Arena& arena, int64_t task) {
        const Sequence& s = p.sequences[task / p.heads];
        const int64_t h = task % p.heads, first = (s.b * p.heads + h) * p.q_len + s.q0;
        [[maybe_unused]] const typename M::Session session;
        RestScratch<M> scratch(arena, p);
        for (int64_t i = 0; i < s.q_len && !interrupted(); ++i) {
          const float lse = p.lse[first + i];
          if (large(lse)) rests[first + i] = find_rest(p, s, h, i, lse, scratch);
        }
      });
}

// Rows of per-row passes that a task takes at once.
constexpr int64_t ROWS_PER_PASS = 256;

// The sum over keys becomes dQ: scaled, turned back, in the result's dtype.
inline void finish_grad_q(const Problem& p, int64_t row) {
  alignas(64) float x[MAX_WIDTH];
  const int64_t i = row % p.q_len, h = row / p.q_len % p.heads, b = row / p.q_len / p.heads;
  for (int64_t d = 0; d < p.head_dim; ++d) x[d] = p.grad_q_sum[row * p.head_dim + d] * p.scale;
  turn_back(x, p.rotary.q_cos, p.rotary.q_sin, b, p.rotary.q_batch, i, p.rotary);
  store_floats(const_cast<char*>(row_pointer(p.grad_q, b, h, i)), x, p.grad_q.dtype, p.head_dim);
}

template <class Row>
void for_rows(const Problem& p, const Row& row) {
  const int64_t total = p.batch * p.heads * p.q_len;
  run_tasks(
      p.threads, ceil_div(total, ROWS_PER_PASS), [](Arena&) {},
      [&](Arena&, int64_t task) {
        for (int64_t r = task * ROWS_PER_PASS; r < imin(total, (task + 1) * ROWS_PER_PASS); ++r) row(p, r);
      });
}

// Runs task(sequence, key head, first key, turn, rests, scratch) over runs of `keys` keys.
template <class M, class Scratch, class Task>
void for_runs_of_keys(const Problem& p, int64_t keys, const Task& run) {
  for_rows(p, row_dots);
  const int64_t longest = longest_queries(p);
  // Tasks run through the heads, then the sequences, then the keys: neighbours in time touch different sums, and with a
  // causal mask the longest tasks come first.
  const int64_t stride = p.n_sequences * p.kv_heads, tasks = ceil_div(p.max_k_len, keys) * stride;
  Progress progress(tasks), flushed(tasks);
  auto* rests = static_cast<float*>(allocate(static_cast<size_t>(p.batch * p.heads * p.q_len) * 4));
  find_rests<typename M::General>(p, rests);
  run_tasks(
      p.threads, tasks, [&](Arena& arena) { Scratch(arena, p, longest); },
      [&](Arena& arena, int64_t task) {
        const Sequence& s = p.sequences[task / p.kv_heads % p.n_sequences];
        const int64_t j0 = task / stride * keys;
        const Turn turn{task, stride, progress, flushed};
        if (j0 < s.k_len && s.q_len > 0) {
          [[maybe_unused]] const typename M::Session session;
          Scratch scratch(arena, p, longest);
          run(s, task % p.kv_heads, j0, turn, rests, scratch);
        } else {
          // Done stands for all before it too: a later sequence may share a dense gradient with an earlier one.
          progress.wait(turn.before(), Progress::DONE);
          flushed.wait(task - 1, Progress::DONE);
        }
        progress.publish(task, Progress::DONE);
        flushed.publish(task, Progress::DONE);
      });
  release(rests);
  if (p.grad_q) for_rows(p, finish_grad_q);
}

template <class M>
void backward_keys(const Problem& p) {
  for_runs_of_keys<M, BackwardScratch<M>>(
      p, KEYS_PER_TASK,
      [&](const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn, const float* rests,
          BackwardScratch<M>& scratch) { backward_task<M>(p, s, kv_head, j0, turn, rests, scratch); });
}

template <class M>
void backward(const Problem& call) {
  with_reach(call, backward_keys<M>);
}

}  // namespace posattn::POSATTN_ISA
