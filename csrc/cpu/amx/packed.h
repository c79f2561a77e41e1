// Operands that tasks share, packed once for the whole call: each is O(tokens) memory and read by many tasks.
#pragma once

#include "../dropout.h"
#include "../tasks.h"

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

// K as columns, panel by panel, and V as pairs of rows: the B operands of the forward pass.
class PackedKeys {
public:
  explicit PackedKeys(const Problem& p)
      : panel_(panel_rows<AMX>(p.head_dim) * NR),
        v_stride_(round_up(p.value_dim, TILE)),
        k_(p, p.kv_heads, NR, panel_, [](const Sequence& s) { return s.k_len; }),
        v_(p, p.kv_heads, NR, NR / 2 * v_stride_, [](const Sequence& s) { return s.k_len; }) {
    constexpr int64_t KEYS = 8 * NR;  // of a task
    const int64_t runs = ceil_div(p.max_k_len, KEYS);
    run_tasks(
        p.threads, p.n_sequences * p.kv_heads * runs, [](Arena&) {},
        [&](Arena&, int64_t task) {
          const Sequence& s = p.sequences[task / runs / p.kv_heads];
          const int64_t h = task / runs % p.kv_heads, j = task % runs * KEYS, count = imin(KEYS, s.k_len - j);
          if (count <= 0) return;
          pack_panels<AMX>(k_.block(s, h, j), key_source(p, s, h), j, count);
          pack_depth<AMX>(v_.block(s, h, j), v_stride_, value_source(p, s, h), j, count, round_up(count, NR));
        });
  }
  int64_t panel() const { return panel_; }
  // From key j on, a multiple of NR.
  const float* keys(const Sequence& s, int64_t kv_head, int64_t j) const { return k_.block(s, kv_head, j); }
  const float* values(const Sequence& s, int64_t kv_head, int64_t j) const { return v_.block(s, kv_head, j); }

private:
  int64_t panel_, v_stride_;
  PackedBlocks k_, v_;
};

// Q and dO by blocks of ROWS rows: as columns [width][ROWS], and as rows [ROWS][width].
class PackedRows {
public:
  explicit PackedRows(const Problem& p)
      : q_width_(round_up(p.head_dim, TILE)),
        v_width_(round_up(p.value_dim, TILE)),
        q_stride_(round_up(p.head_dim, TILE_DEPTH) / 2),
        o_stride_(round_up(p.value_dim, TILE_DEPTH) / 2),
        blocks_(p, p.heads, ROWS, (q_width_ + v_width_) * TILE + (q_stride_ + o_stride_) * ROWS,
                [](const Sequence& s) { return s.q_len; }) {
    constexpr int64_t TASK = 8 * ROWS;
    const int64_t runs = ceil_div(longest_queries(p), TASK);
    run_tasks(
        p.threads, p.n_sequences * p.heads * runs, [](Arena&) {},
        [&](Arena&, int64_t task) {
          const Sequence& s = p.sequences[task / runs / p.heads];
          const int64_t h = task / runs % p.heads, first = task % runs * TASK;
          const Source q = query_source(p, s, h, 1.0F), o{p.grad_out, s.b, h, s.q0, p.value_dim};
          for (int64_t i = first; i < imin(first + TASK, s.q_len); i += ROWS) {
            const int64_t count = imin(ROWS, s.q_len - i);
            float *columns = blocks_.block(s, h, i), *of_rows = rows(s, h, i);
            pack(columns, of_rows, q_width_, q_stride_, q, i, count);
            pack(columns + q_width_ * TILE, of_rows + q_stride_ * ROWS, v_width_, o_stride_, o, i, count);
          }
        });
  }
  int64_t bytes_each() const { return blocks_.each() * 4; }
  const float* q_columns(const Sequence& s, int64_t h, int64_t i) const { return blocks_.block(s, h, i); }
  const float* o_columns(const Sequence& s, int64_t h, int64_t i) const { return q_columns(s, h, i) + q_width_ * TILE; }
  TileOperand q_rows(const Sequence& s, int64_t h, int64_t i) const { return operand(rows(s, h, i), q_stride_); }
  TileOperand o_rows(const Sequence& s, int64_t h, int64_t i) const {
    return operand(rows(s, h, i) + q_stride_ * ROWS, o_stride_);
  }

private:
  float* rows(const Sequence& s, int64_t h, int64_t i) const {
    return blocks_.block(s, h, i) + (q_width_ + v_width_) * TILE;
  }
  static TileOperand operand(const float* rows, int64_t stride) { return {rows, stride * 4, 64, TILE * stride * 4}; }

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
};

}  // namespace posattn::POSATTN_ISA
