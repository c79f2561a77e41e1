// What one attention call means, as raw pointers and element strides: the contract between Python and the kernels. The
// kernels trust it; posattn/validation.py and posattn/backends/cpu.py prove every extent before one is filled in.
//
// posattn/backends/common/structs.py reads this file, which the module holds as text, and packs the same layout. So
// members come one to a line, of the types it knows (pointers, bool, fixed-width integers, float, double, an
// enumeration or a struct above), and a member function takes one line.
#pragma once

#include <cstddef>
#include <cstdint>

namespace posattn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// A [B, H, T, D] tensor; the last dimension is contiguous. A stride of 0 broadcasts.
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};

// One sequence: rows q0 .. q0 + q_len of batch b against keys k0 .. k0 + k_len. Its row i sits at its key i + offset.
struct Sequence {
  int64_t b;
  int64_t q0;
  int64_t q_len;
  int64_t k0;
  int64_t k_len;
  int64_t offset;
};

// Where sequences lie: `documents` packed along the tokens of batch entry 0, from the offsets [documents + 1] on; or
// one for every run of equal numbers in q_segments [B, Tq] and k_segments [B, Tk], where a negative one stands for
// none; else one a batch entry, of keys k_starts [B] (or 0) up to k_lengths [B] (or all). Query 0 sits at key `offset`,
// or offsets [B or documents], counted from the batch entry's key 0 or the document's first; with neither, the last
// query meets the last key.
struct Lengths {
  const int32_t* k_lengths = nullptr;
  const int32_t* k_starts = nullptr;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  int64_t documents = 0;
  const int32_t* q_segments = nullptr;
  const int32_t* k_segments = nullptr;
  const int32_t* offsets = nullptr;
  bool has_offset = false;
  int64_t offset = 0;
};

// cos and sin [B or 1, T, half] for queries and keys.
struct Rotary {
  const float* q_cos = nullptr;
  const float* q_sin = nullptr;
  const float* k_cos = nullptr;
  const float* k_sin = nullptr;
  int64_t q_batch = 0;
  int64_t k_batch = 0;
  int64_t half = 0;
  bool interleaved = false;
};

// The additive operands of posattn/plan.py. Gradient pointers are null when not wanted; they are float32, contiguous,
// zeroed by the caller, and shaped as their operand (the slope's as [B, H]; dense as its broadcast shape).
struct Bias {
  const float* slope = nullptr;  // [H], or [B, H] with slope_batch
  int64_t slope_batch = 0;
  bool slope_signed = false;
  float* grad_slope = nullptr;

  const float* table = nullptr;  // [H, table_len]
  int64_t table_len = 0;
  int64_t table_first = 0;
  float* grad_table = nullptr;

  const float* psi = nullptr;
  const float* row_scale = nullptr;
  const float* knots = nullptr;
  const float* segment_slope = nullptr;      // [H, n_knots + 1]
  const float* segment_intercept = nullptr;  // [H, n_knots + 1]
  int64_t psi_len = 0;
  int64_t psi_first = 0;
  int64_t row_len = 0;
  int64_t row_first = 0;
  int64_t n_knots = 0;
  float* grad_psi = nullptr;
  float* grad_row_scale = nullptr;
  float* grad_segment_slope = nullptr;
  float* grad_segment_intercept = nullptr;

  View dense;
  int64_t dense_key = 1;  // the last dimension's stride: a bias may broadcast over keys
  float* grad_dense = nullptr;
  int64_t grad_dense_batch = 0;  // 0: broadcast
  int64_t grad_dense_head = 0;
  int64_t grad_dense_row = 0;
  int64_t grad_dense_key = 1;

  const double* decay_q = nullptr;  // [B, H, Tq] and [B, H, Tk]: the first of the query's minus the second of the key's
  const double* decay_k = nullptr;
  float* grad_decay_q = nullptr;  // both or neither
  float* grad_decay_k = nullptr;

  bool relative() const { return slope || table; }
  bool any() const { return relative() || psi || dense || decay_k; }
  bool wants_relative() const { return grad_slope || grad_table; }
  bool wants_profile() const { return grad_psi || grad_row_scale || grad_segment_slope || grad_segment_intercept; }
};

enum class MixForm : int32_t { concat_residual = 0, concat = 1, add = 2 };

// DAPE: out = x (+ b) + w2 leaky_relu(w1 z + b1) + b2, over the heads of one logit. inputs is z's length, H or 2H.
struct HeadMix {
  const float* w1 = nullptr;
  const float* b1 = nullptr;
  const float* w2 = nullptr;
  const float* b2 = nullptr;
  int64_t width = 0;
  int64_t inputs = 0;
  MixForm form = MixForm::concat_residual;
  Bias inner;
  bool has_inner = false;
  float* grad_w1 = nullptr;
  float* grad_b1 = nullptr;
  float* grad_w2 = nullptr;
  float* grad_b2 = nullptr;
  bool wants_weights() const { return grad_w1 || grad_b1 || grad_w2 || grad_b2; }
};

struct Problem {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t q_len = 0;
  int64_t k_len = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  float scale = 1.0F;
  float softcap = 0.0F;
  View q;
  View k;
  View v;
  View out;
  float* lse = nullptr;  // [B, H, Tq]
  const float* sinks = nullptr;

  Lengths lengths;  // what the module makes the list of sequences from
  // Where given, k and v are pages of `page` tokens, [pages, H, page, D] as views, and key t of batch entry b is row
  // t % page of page block_table[b * block_entries + t / page]. Forward only.
  const int32_t* block_table = nullptr;
  int64_t block_entries = 0;
  int64_t pages = 0;
  int64_t page = 0;

  const Sequence* sequences = nullptr;  // what kernels read
  int64_t n_sequences = 0;
  int64_t max_k_len = 0;
  bool causal = false;
  int64_t left = -1;  // -1: unlimited
  int64_t right = -1;
  View boolean;             // bytes
  int64_t boolean_key = 1;  // the last dimension's stride: masks may broadcast over keys
  const int64_t* q_positions = nullptr;
  const int64_t* k_positions = nullptr;
  int64_t q_positions_batch = 0;
  int64_t k_positions_batch = 0;

  Rotary rotary;
  Bias bias;
  bool mix = false;
  HeadMix head_mix;

  double dropout_p = 0.0;
  uint64_t seed = 0;
  bool two_parts = false;  // tiles may multiply float32 as sums of two bfloat16 parts: 16 bits

  // Backward only. grad_q [B, H, Tq, D] float32 is the accumulator as well; delta [B, H, Tq] is written first.
  View grad_out;
  View grad_q;
  View grad_k;
  View grad_v;
  const float* grad_lse = nullptr;
  float* grad_q_sum = nullptr;
  float* delta = nullptr;

  int32_t threads = 1;
  const void* reach = nullptr;  // the kernels' own (reach.h)
};

// New keys or values, `source` [B, H, T, width], put into pages, `to` [pages, H, page, width] of the same numbers:
// token n is sources[n] of batch entry entries[n] and goes to slot slots[n] of the pool. It is turned by cos and sin
// [tokens, half] on the way, where they are given; width is at most 256 then.
struct Append {
  View source;
  View to;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t width = 0;
  int64_t page = 0;
  const int64_t* entries = nullptr;
  const int64_t* sources = nullptr;
  const int64_t* slots = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t half = 0;
  bool interleaved = false;
  int32_t threads = 1;
};

}  // namespace posattn
