// Operands that tasks share, packed once for the whole call: each is O(tokens) memory and read by many tasks.
#pragma once

#include "../dropout.h"
#include "../tasks.h"
#include "split.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t ROWS = AMX::rows;

// Blocks of `size` tokens of each sequence and head, `each` floats a block.
class PackedBlocks {
public:
  template <class Tokens>
  PackedBlocks(const Problem& p, int64_t heads, int64_t size, int64_t each, const Tokens& tokens)
      : sequences_(p.sequences), size_(size), each_(each) {
    first_ = static_cast<int64_t*>(allocate(static_cast<size_t>(p.n_sequences + 1) * 8));
    first_[0] = 0;
    for (int64_t n = 0; n < p.n_sequences; ++n)
      first_[n + 1] = first_[n] + ceil_div(tokens(p.sequences[n]), size) * heads;
    heads_ = heads;
    memory_ = static_cast<float*>(allocate(static_cast<size_t>(imax(1, first_[p.n_sequences] * each)) * 4));
  }
  ~PackedBlocks() {
    release(memory_);
    release(first_);
  }
  PackedBlocks(const PackedBlocks&) = delete;
  PackedBlocks& operator=(const PackedBlocks&) = delete;

  int64_t each() const { return each_; }
  // The block that token t of sequence s is in; those that follow are the same head's.
  float* block(const Sequence& s, int64_t head, int64_t t) const {
    const int64_t n = &s - sequences_, blocks = (first_[n + 1] - first_[n]) / heads_;
    return memory_ + (first_[n] + head * blocks + t / size_) * each_;
  }

private:
  const Sequence* sequences_;
  int64_t size_, each_, heads_ = 1;
  int64_t* first_ = nullptr;  // of each sequence
  float* memory_ = nullptr;
};

// K as columns, panel by panel, and V as pairs of rows: the B operands of the forward pass. Numbers that are sums of
// parts lie part by part in each panel of K, and in every 32 keys of V.
template <class M>
class PackedKeys {
public:
  explicit PackedKeys(const Problem& p)
      : head_dim_(p.head_dim),
        value_dim_(p.value_dim),
        k_(p, p.kv_heads, NR, M::parts * panel_rows<AMX>(p.head_dim) * NR, [](const Sequence& s) { return s.k_len; }),
        v_(p, p.kv_heads, NR, M::parts * NR / 2 * round_up(p.value_dim, TILE),
           [](const Sequence& s) { return s.k_len; }) {
    constexpr int64_t KEYS = 8 * NR;  // of a task
    const int64_t runs = ceil_div(p.max_k_len, KEYS);
    run_tasks(
        p.threads, p.n_sequences * p.kv_heads * runs, [](Arena&) {},
        [&](Arena&, int64_t task) {
          const Sequence& s = p.sequences[task / runs / p.kv_heads];
          const int64_t h = task / runs % p.kv_heads, j = task % runs * KEYS, count = imin(KEYS, s.k_len - j);
          if (count <= 0) return;
          const Source keys = key_source(p, s, h), values = value_source(p, s, h);
          float *k = k_.block(s, h, j), *v = v_.block(s, h, j);
          if constexpr (M::parts == 1) {
            pack_panels<AMX>(k, keys, j, count);
            pack_depth<AMX>(v, round_up(p.value_dim, TILE), values, j, count, round_up(count, NR));
          } else {
            Largest of_k, of_v;
            split_columns<M::parts>(k, keys, j, count, round_up(count, NR), of_k);
            split_depth<M::parts>(v, values, j, count, round_up(count, NR), of_v);
            largest_k_.see(of_k);
            largest_v_.see(of_v);
          }
        });
  }
  bool fit() const { return largest_k_.fits() && largest_v_.fits(); }
  // From key j on, a multiple of NR.
  TileOperand keys(const Sequence& s, int64_t kv_head, int64_t j) const {
    const float* at = k_.block(s, kv_head, j);
    if constexpr (M::parts == 1) return {at, NR * 4, TILE * NR * 4, 64, 0};
    return split_rows_operand<M::parts>(at, head_dim_);
  }
  int64_t bytes_of_panel() const { return k_.each() * 4; }
  TileOperand values(const Sequence& s, int64_t kv_head, int64_t j) const {
    const float* at = v_.block(s, kv_head, j);
    const int64_t stride = round_up(value_dim_, TILE) * 4;
    if constexpr (M::parts == 1) return {at, stride, TILE * stride, 64, 0};
    return split_depth_operand<M::parts>(at, value_dim_);
  }

private:
  int64_t head_dim_, value_dim_;
  PackedBlocks k_, v_;
  SharedLargest largest_k_, largest_v_;
};

// Q and dO by blocks of ROWS rows: as columns [width][ROWS], and as rows [ROWS][width]; of parts, tile by tile, and the
// rows of Q times what makes logits of their products.
template <class M>
class PackedRows {
public:
  explicit PackedRows(const Problem& p)
      : q_width_(round_up(p.head_dim, TILE)),
        v_width_(round_up(p.value_dim, TILE)),
        q_stride_(round_up(p.head_dim, TILE_DEPTH) / 2),
        o_stride_(round_up(p.value_dim, TILE_DEPTH) / 2),
        blocks_(p, p.heads, ROWS, M::parts * ((q_width_ + v_width_) * TILE + (q_stride_ + o_stride_) * ROWS),
                [](const Sequence& s) { return s.q_len; }) {
    constexpr int64_t TASK = 8 * ROWS;
    const int64_t runs = ceil_div(longest_queries(p), TASK);
    const double scale = scale_of_log2(p.scale);
    run_tasks(
        p.threads, p.n_sequences * p.heads * runs, [](Arena&) {},
        [&](Arena&, int64_t task) {
          const Sequence& s = p.sequences[task / runs / p.heads];
          const int64_t h = task / runs % p.heads, first = task % runs * TASK;
          const Source q = query_source(p, s, h, 1.0F), o{p.grad_out, s.b, h, s.q0, p.value_dim};
          Largest of_q, of_scaled, of_o;
          for (int64_t i = first; i < imin(first + TASK, s.q_len); i += ROWS) {
            const int64_t count = imin(ROWS, s.q_len - i);
            float *columns = blocks_.block(s, h, i), *of_rows = rows(s, h, i);
            float *o_columns = columns + M::parts * q_width_ * TILE, *o_rows = of_rows + M::parts * q_stride_ * ROWS;
            if constexpr (M::parts == 1) {
              pack(columns, of_rows, q_width_, q_stride_, q, i, count);
              pack(o_columns, o_rows, v_width_, o_stride_, o, i, count);
            } else {
              split_row_columns<M::parts>(columns, q, i, count, of_q);
              split_row_columns<M::parts>(o_columns, o, i, count, of_o);
              split_rows<M::parts>(of_rows, q, i, count, ROWS, scale, of_scaled);
              split_rows<M::parts>(o_rows, o, i, count, ROWS, 1.0, of_o);
            }
          }
          largest_q_.see(of_q);
          largest_scaled_.see(of_scaled);
          largest_o_.see(of_o);
        });
  }
  bool fit() const { return largest_q_.fits() && largest_scaled_.fits() && largest_o_.fits(); }

  // A operands, a block a step: Q^T and dO^T from row i on, a multiple of ROWS.
  TileOperand q_columns(const Sequence& s, int64_t h, int64_t i) const { return columns(blocks_.block(s, h, i)); }
  TileOperand o_columns(const Sequence& s, int64_t h, int64_t i) const {
    return columns(blocks_.block(s, h, i) + M::parts * q_width_ * TILE);
  }
  // Those of one block's products over the width.
  TileOperand q_rows(const Sequence& s, int64_t h, int64_t i) const { return operand(rows(s, h, i), q_stride_); }
  TileOperand o_rows(const Sequence& s, int64_t h, int64_t i) const {
    return operand(rows(s, h, i) + M::parts * q_stride_ * ROWS, o_stride_);
  }

private:
  float* rows(const Sequence& s, int64_t h, int64_t i) const {
    return blocks_.block(s, h, i) + M::parts * (q_width_ + v_width_) * TILE;
  }
  TileOperand columns(const float* at) const {
    return {at, 64, blocks_.each() * 4, M::parts * TILE_FLOATS * 4, TILE_FLOATS * 4};
  }
  static TileOperand operand(const float* rows, int64_t stride) {
    if constexpr (M::parts == 1) return {rows, stride * 4, 64, TILE * stride * 4, 0};
    return split_rows_operand<M::parts>(rows, 2 * stride);
  }

  static void pack(float* columns, float* rows, int64_t width, int64_t stride, const Source& src, int64_t i,
                   int64_t count) {
    alignas(64) float pairs[TILE * MAX_WIDTH];
    const int64_t padded = 2 * stride;  // the rows are zero beyond the width
    pack_rows<AMX>(rows, stride, src, i, count, ROWS);
    for (int64_t r = 0; r < ROWS; r += 2)
      pair_rows(pairs + r / 2 * padded, rows + r * stride, rows + (r + 1) * stride, padded);
    for (int64_t d = 0; d < width; d += TILE) transpose(columns + d * TILE, TILE, pairs + d, padded);
  }

  int64_t q_width_, v_width_, q_stride_, o_stride_;
  PackedBlocks blocks_;
  SharedLargest largest_q_, largest_scaled_, largest_o_;
};

}  // namespace posattn::POSATTN_ISA
