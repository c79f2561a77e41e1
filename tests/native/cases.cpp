#include "cases.h"

namespace posattn::test {
namespace {

constexpr float NOT_WRITTEN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t WIDTH = 5, KNOTS = 5;

bool starts_with(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

std::vector<float> read(const View& view, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  std::vector<float> values;
  Memory::each(view, batch, heads, rows, columns,
               [&](int64_t index) { values.push_back(load(view.data, index, view.dtype)); });
  return values;
}

}  // namespace

std::vector<Shape> shapes() {
  return {{1, 1, 1, 1, 1, 1, 1},      {2, 2, 1, 1, 17, 3, 5},     {1, 2, 2, 7, 3, 16, 16},
          {2, 4, 2, 33, 33, 8, 24},   {1, 3, 1, 65, 130, 40, 64}, {1, 2, 2, 130, 65, 64, 1},
          {1, 1, 1, 49, 200, 80, 96}, {1, 2, 1, 3, 67, 256, 256}, {1, 1, 1, 2, 35, 1024, 520}};
}

std::vector<const char*> options() {
  return {"plain",        "causal",    "top-left",     "starts",       "window",      "boolean",    "boolean-keys",
          "softcap",      "sinks",     "dropout",      "lengths",      "packed",      "rotary",     "interleaved",
          "partial",      "slope",     "signed-slope", "table",        "profile",     "dense",      "dense-shared",
          "positions",    "mix-add",   "mix-concat",   "mix-residual", "mix-no-bias", "mix-causal", "far-rows",
          "far-products", "two-parts", "no-parts",     "pages",        "everything"};
}

bool applies(const char* option, const Shape& s) {
  const std::string name = option;
  if (name == "rotary" || name == "interleaved") return s.head_dim % 2 == 0;
  if (name == "partial" || name == "everything") return s.head_dim >= 4;
  if (name == "packed") return s.batch == 1;
  return true;
}

Bound::Bound(const Case& c, int threads) : memory_(7) {
  const Shape& s = c.shape;
  Problem& p = problem;
  p.batch = s.batch, p.heads = s.heads, p.kv_heads = s.kv_heads;
  p.q_len = s.q_len, p.k_len = s.k_len, p.head_dim = s.head_dim, p.value_dim = s.value_dim;
  p.scale = 0.3F;
  p.threads = threads;
  // The gaps make rows that are not contiguous with one another.
  p.q = memory_.tensor(c.dtype, s.batch, s.heads, s.q_len, s.head_dim, 3);
  p.k = memory_.tensor(c.dtype, s.batch, s.kv_heads, s.k_len, s.head_dim, 0);
  p.v = memory_.tensor(c.dtype, s.batch, s.kv_heads, s.k_len, s.value_dim, 1);
  for (int64_t b = 0; b < s.batch; ++b) sequences_.push_back({b, 0, s.q_len, 0, s.k_len, 0});
  add_option(c.option);
  if (c.option != "top-left" && c.option != "starts")
    for (Sequence& sequence : sequences_) sequence.offset = sequence.k_len - sequence.q_len;
  p.sequences = sequences_.data();
  p.n_sequences = static_cast<int64_t>(sequences_.size());
  for (const Sequence& sequence : sequences_) p.max_k_len = std::max(p.max_k_len, sequence.k_len);
  add_results(s, c.dtype);
}

void Bound::add_option(const std::string& option) {
  Problem& p = problem;
  if (option == "causal") {
    p.causal = true;
  } else if (option == "top-left") {
    p.causal = true;
  } else if (option == "window") {
    p.left = 5, p.right = 2;
  } else if (starts_with(option, "boolean")) {
    const bool shared = option == "boolean-keys";  // one row for all queries, heads and batches
    const int64_t rows = shared ? 1 : p.batch * p.heads * p.q_len;
    auto* allowed = memory_.array<uint8_t>(rows * p.k_len);
    for (int64_t i = 0; i < rows * p.k_len; ++i) allowed[i] = memory_.integer(3) != 0;
    p.boolean.data = allowed;
    if (!shared)
      p.boolean.row = p.k_len, p.boolean.head = p.q_len * p.k_len, p.boolean.batch = p.heads * p.boolean.head;
  } else if (option == "two-parts") {
    p.two_parts = p.causal = true;
  } else if (option == "no-parts") {  // logits of an ordinary size, of operands that cannot be split
    if (p.q.dtype != DType::f32) return;
    Memory::each(p.q, p.batch, p.heads, p.q_len, p.head_dim,
                 [&](int64_t index) { static_cast<float*>(p.q.data)[index] *= 0x1p70F; });
    p.scale *= 0x1p-70F;
  } else if (option == "pages") {  // in falling order, and one that nobody has
    constexpr int64_t PAGE = 5;
    p.page = PAGE, p.block_entries = (p.k_len + PAGE - 1) / PAGE, p.pages = p.batch * p.block_entries + 1;
    auto* table = memory_.array<int32_t>(p.pages - 1);
    for (int64_t n = 1; n < p.pages; ++n) table[n - 1] = static_cast<int32_t>(p.pages - n);
    p.block_table = table;
    p.k = memory_.tensor(p.k.dtype, p.pages, p.kv_heads, PAGE, p.head_dim, 0);
    p.v = memory_.tensor(p.v.dtype, p.pages, p.kv_heads, PAGE, p.value_dim, 1);
    p.causal = true;
  } else if (option == "softcap") {
    p.softcap = 2.0F;
  } else if (option == "sinks") {
    p.sinks = memory_.drawn(p.heads, -1.0F, 1.0F);
  } else if (option == "dropout") {
    p.dropout_p = 0.25F, p.seed = 0x123456789abcdefULL;
  } else if (option == "lengths") {
    for (Sequence& sequence : sequences_) sequence.k_len = memory_.integer(static_cast<int>(p.k_len) + 1);
    p.causal = true;
    covered_ = false;
  } else if (option == "starts") {  // and offsets of their own
    for (Sequence& sequence : sequences_) {
      sequence.k0 = memory_.integer(static_cast<int>(p.k_len) + 1), sequence.k_len -= sequence.k0;
      sequence.offset = memory_.integer(static_cast<int>(p.k_len) + 1) - sequence.k0;
    }
    p.causal = true;
    covered_ = false;
  } else if (option == "packed") {  // three documents: one without queries, one without keys, the rest
    const int64_t q = p.q_len / 2, k = p.k_len / 2;
    sequences_ = {{0, 0, 0, 0, k / 2, 0}, {0, 0, q, k / 2, 0, 0}, {0, q, p.q_len - q, k / 2, p.k_len - k / 2, 0}};
    covered_ = false;
  } else if (option == "rotary") {
    add_rotary(p.head_dim / 2, false);
  } else if (option == "interleaved") {
    add_rotary(p.head_dim / 2, true);
  } else if (option == "partial") {
    add_rotary(p.head_dim / 4, false);
  } else if (option == "positions") {
    add_positions();
    add_bias(p.bias, "slope");
    add_bias(p.bias, "table");
    add_bias(p.bias, "profile");
  } else if (option == "mix-add") {
    add_mix(MixForm::add, true);
  } else if (option == "mix-concat") {
    add_mix(MixForm::concat, true);
  } else if (option == "mix-residual") {
    add_mix(MixForm::concat_residual, true);
  } else if (option == "mix-no-bias") {
    add_mix(MixForm::concat_residual, false);
  } else if (option == "mix-causal") {
    p.causal = true;
    add_mix(MixForm::concat_residual, true);
  } else if (option == "far-rows") {  // whole rows at one value, as float masks have them
    float* bias = memory_.array<float>(p.q_len * p.k_len);
    const float values[] = {-1e12F, std::numeric_limits<float>::lowest(), 0.0F, -1e9F, 1e12F};
    for (int64_t i = 0; i < p.q_len * p.k_len; ++i) bias[i] = values[i / p.k_len % 5];
    p.bias.dense.data = bias;
    p.bias.dense.row = p.k_len;
  } else if (option == "far-products") {  // a power of two: products stay exact, so that ties are ties everywhere
    p.scale = 0x1p66F;
  } else if (option == "everything") {
    for (const char* part : {"causal", "softcap", "sinks", "dropout", "partial", "slope", "table", "profile", "dense"})
      add_option(part);
  } else if (option != "plain") {
    add_bias(p.bias, option);
  }
}

void Bound::add_bias(Bias& bias, const std::string& kind) {
  const Problem& p = problem;
  const int64_t distances = p.q_len + p.k_len - 1;
  if (kind == "slope" || kind == "signed-slope") {
    bias.slope = memory_.drawn(p.heads, 0.0F, 1.0F);
    bias.slope_signed = kind != "slope";
    want("slope", &bias.grad_slope, p.batch * p.heads);
  } else if (kind == "table") {
    bias.table = memory_.drawn(p.heads * distances, -1.0F, 1.0F);
    bias.table_len = distances, bias.table_first = 1 - p.q_len;
    want("table", &bias.grad_table, p.heads * distances);
  } else if (kind == "profile") {
    bias.psi = memory_.drawn(distances, 0.0F, 2.0F);
    bias.psi_len = distances, bias.psi_first = 1 - p.q_len;
    bias.row_scale = memory_.drawn(distances, 0.25F, 1.0F);
    bias.row_len = distances, bias.row_first = 1 - p.q_len;
    float* knots = memory_.array<float>(KNOTS);
    for (int64_t n = 0; n < KNOTS; ++n) knots[n] = 0.3F * static_cast<float>(n);
    knots[KNOTS - 1] = std::numeric_limits<float>::infinity();
    bias.knots = knots, bias.n_knots = KNOTS;
    // Continuous, as the contract says: each piece begins where the last one ends.
    float* slope = memory_.drawn(p.heads * (KNOTS + 1), -1.0F, 1.0F);
    float* intercept = memory_.drawn(p.heads * (KNOTS + 1), -1.0F, 1.0F);
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t n = 0; n < KNOTS; ++n) {
        float *a = slope + h * (KNOTS + 1) + n, *c = intercept + h * (KNOTS + 1) + n;
        if (std::isinf(knots[n])) a[1] = a[0];
        c[1] = std::isinf(knots[n]) ? c[0] : c[0] + (a[0] - a[1]) * knots[n];
      }
    bias.segment_slope = slope, bias.segment_intercept = intercept;
    want("psi", &bias.grad_psi, distances);
    want("row_scale", &bias.grad_row_scale, distances);
    want("segment_slope", &bias.grad_segment_slope, p.heads * (KNOTS + 1));
    want("segment_intercept", &bias.grad_segment_intercept, p.heads * (KNOTS + 1));
  } else {  // dense, or one dense bias for every batch and head
    const bool shared = kind == "dense-shared";
    const int64_t batch = shared ? 1 : p.batch, heads = shared ? 1 : p.heads;
    bias.dense = memory_.tensor(p.q.dtype, batch, heads, p.q_len, p.k_len, 0);
    if (shared) bias.dense.batch = bias.dense.head = 0;
    bias.grad_dense_row = p.k_len;
    bias.grad_dense_head = shared ? 0 : p.q_len * p.k_len;
    bias.grad_dense_batch = shared ? 0 : p.heads * bias.grad_dense_head;
    want("dense", &bias.grad_dense, batch * heads * p.q_len * p.k_len);
  }
}

void Bound::add_mix(MixForm form, bool inner) {
  const Problem& p = problem;
  HeadMix& mix = problem.head_mix;
  problem.mix = true;
  mix.form = form, mix.has_inner = inner, mix.width = WIDTH;
  mix.inputs = inner && form != MixForm::add ? 2 * p.heads : p.heads;
  if (inner) add_bias(mix.inner, "table");
  mix.w1 = memory_.drawn(WIDTH * mix.inputs, -1.0F, 1.0F);
  // Off the grid of the other values: at a hidden unit of exactly zero the derivative is one rounding's choice.
  float* b1 = memory_.drawn(WIDTH, -1.0F, 1.0F);
  for (int64_t n = 0; n < WIDTH; ++n) b1[n] += 0.0123F;
  mix.b1 = b1;
  mix.w2 = memory_.drawn(p.heads * WIDTH, -1.0F, 1.0F);
  mix.b2 = memory_.drawn(p.heads, -1.0F, 1.0F);
  want("w1", &mix.grad_w1, WIDTH * mix.inputs);
  want("b1", &mix.grad_b1, WIDTH);
  want("w2", &mix.grad_w2, p.heads * WIDTH);
  want("b2", &mix.grad_b2, p.heads);
}

void Bound::add_rotary(int64_t half, bool interleaved) {
  Rotary& r = problem.rotary;
  r.half = half, r.interleaved = interleaved;
  r.q_cos = memory_.drawn(problem.q_len * half, -1.0F, 1.0F);
  r.q_sin = memory_.drawn(problem.q_len * half, -1.0F, 1.0F);
  r.k_cos = memory_.drawn(problem.k_len * half, -1.0F, 1.0F);
  r.k_sin = memory_.drawn(problem.k_len * half, -1.0F, 1.0F);
}

// Some of the distances lie outside of the tables, which clamps them.
void Bound::add_positions() {
  auto* q = memory_.array<int64_t>(problem.q_len);
  auto* k = memory_.array<int64_t>(problem.k_len);
  for (int64_t i = 0; i < problem.q_len; ++i) q[i] = memory_.integer(300);
  for (int64_t j = 0; j < problem.k_len; ++j) k[j] = memory_.integer(300);
  problem.q_positions = q, problem.k_positions = k;
}

void Bound::add_results(const Shape& s, DType dtype) {
  Problem& p = problem;
  p.out = memory_.result(dtype, s.batch, s.heads, s.q_len, s.value_dim, NOT_WRITTEN);
  p.lse = memory_.filled<float>(s.batch * s.heads * s.q_len, NOT_WRITTEN);
  p.grad_out = memory_.tensor(dtype, s.batch, s.heads, s.q_len, s.value_dim, 2);
  p.grad_lse = memory_.drawn(s.batch * s.heads * s.q_len, -1.0F, 1.0F);
  p.delta = memory_.filled<float>(s.batch * s.heads * s.q_len, NOT_WRITTEN);
  // float32 gradients of q are summed in place.
  p.grad_q = memory_.result(dtype, s.batch, s.heads, s.q_len, s.head_dim, 0.0F);
  p.grad_q_sum = dtype == DType::f32 ? static_cast<float*>(p.grad_q.data)
                                     : memory_.filled<float>(s.batch * s.heads * s.q_len * s.head_dim, 0.0F);
  const float before = covered_ ? NOT_WRITTEN : 0.0F;
  p.grad_k = memory_.result(dtype, s.batch, s.kv_heads, s.k_len, s.head_dim, before);
  p.grad_v = memory_.result(dtype, s.batch, s.kv_heads, s.k_len, s.value_dim, before);
}

void Bound::want(const char* name, float** gradient, int64_t count) {
  *gradient = memory_.filled<float>(count, 0.0F);
  wanted_.push_back({name, *gradient, count});
}

std::vector<Result> Bound::forward_results() const {
  const Problem& p = problem;
  return {{"out", read(p.out, p.batch, p.heads, p.q_len, p.value_dim)},
          {"lse", {p.lse, p.lse + p.batch * p.heads * p.q_len}}};
}

std::vector<Result> Bound::backward_results() const {
  const Problem& p = problem;
  std::vector<Result> results = {{"dq", read(p.grad_q, p.batch, p.heads, p.q_len, p.head_dim)},
                                 {"dk", read(p.grad_k, p.batch, p.kv_heads, p.k_len, p.head_dim)},
                                 {"dv", read(p.grad_v, p.batch, p.kv_heads, p.k_len, p.value_dim)}};
  for (const Wanted& w : wanted_) results.push_back({w.name, {w.data, w.data + w.count}});
  return results;
}

}  // namespace posattn::test
