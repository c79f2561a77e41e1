// What one attention call means, as raw pointers and element strides: the contract between the Python binding and the
// kernels. The kernels trust it; posattn/backends/cpu.py proves every extent before it fills one in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace posattn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// A [B, H, T, D] tensor; the last dimension is contiguous. A stride of 0 broadcasts.
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};

// One sequence: rows q0 .. q0 + q_len of batch b against keys k0 .. k0 + k_len.
struct Sequence {
  int64_t b, q0, q_len, k0, k_len;
};

// cos and sin [B or 1, T, half] for queries and keys.
struct Rotary {
  const float *q_cos = nullptr, *q_sin = nullptr, *k_cos = nullptr, *k_sin = nullptr;
  int64_t q_batch = 0, k_batch = 0;
  int64_t half = 0;
  bool interleaved = false;
};

// The additive operands of posattn/plan.py. Gradient pointers are null when not wanted; they are float32, contiguous,
// zeroed by the caller, and shaped as their operand (the slope's as [B, H]; dense as its broadcast shape).
struct Bias {
  const float* slope = nullptr;
  int64_t slope_batch = 0, slope_head = 0;
  bool slope_signed = false;
  float* grad_slope = nullptr;

  const float* table = nullptr;  // [H, table_len]
  int64_t table_len = 0, table_first = 0;
  float* grad_table = nullptr;

  const float *psi = nullptr, *row_scale = nullptr, *knots = nullptr;
  const float *segment_slope = nullptr, *segment_intercept = nullptr;  // [H, n_knots + 1]
  int64_t psi_len = 0, psi_first = 0, row_len = 0, row_first = 0, n_knots = 0;
  float *grad_psi = nullptr, *grad_row_scale = nullptr, *grad_segment_slope = nullptr,
        *grad_segment_intercept = nullptr;

  View dense;
  int64_t dense_key = 1;  // the last dimension's stride: a bias may broadcast over keys
  float* grad_dense = nullptr;
  int64_t grad_dense_batch = 0, grad_dense_head = 0, grad_dense_row = 0, grad_dense_key = 1;  // 0: broadcast

  bool relative() const { return slope || table; }
  bool wants_relative() const { return grad_slope || grad_table; }
  bool wants_profile() const { return grad_psi || grad_row_scale || grad_segment_slope || grad_segment_intercept; }
};

enum class MixForm : int32_t { concat_residual = 0, concat = 1, add = 2 };

// DAPE: out = x (+ b) + w2 leaky_relu(w1 z + b1) + b2, over the heads of one logit. inputs is z's length, H or 2H.
struct HeadMix {
  const float *w1 = nullptr, *b1 = nullptr, *w2 = nullptr, *b2 = nullptr;
  int64_t width = 0, inputs = 0;
  MixForm form = MixForm::concat_residual;
  Bias inner;
  bool has_inner = false;
  float *grad_w1 = nullptr, *grad_b1 = nullptr, *grad_w2 = nullptr, *grad_b2 = nullptr;
  bool wants_weights() const { return grad_w1 || grad_b1 || grad_w2 || grad_b2; }
};

struct Problem {
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, k_len = 0, head_dim = 0, value_dim = 0;
  int64_t max_k_len = 0;
  float scale = 1.0F, softcap = 0.0F;
  View q, k, v, out;
  float* lse = nullptr;  // [B, H, Tq]
  const float* sinks = nullptr;

  const Sequence* sequences = nullptr;
  int64_t n_sequences = 0;
  bool causal = false, top_left = false;
  int64_t left = -1, right = -1;  // -1: unlimited
  View boolean;                   // bytes
  int64_t boolean_key = 1;        // the last dimension's stride: masks may broadcast over keys
  const int64_t *q_positions = nullptr, *k_positions = nullptr;
  int64_t q_positions_batch = 0, k_positions_batch = 0;

  Rotary rotary;
  Bias bias;
  bool mix = false;
  HeadMix head_mix;

  double dropout_p = 0.0;
  uint64_t seed = 0;

  // Backward only. grad_q [B, H, Tq, D] float32 is the accumulator as well; delta [B, H, Tq] is written first.
  View grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;
  float* grad_q_sum = nullptr;
  float* delta = nullptr;

  int threads = 1;
};

// What each instruction set's object file offers.
struct Kernels {
  const char* name;
  bool bf16_dot;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
  double (*probe_flops)(const char* kind, int64_t iterations);  // operations done, or 0 for an unknown kind
  double (*probe_read)(const float* data, int64_t count);
};

}  // namespace posattn
