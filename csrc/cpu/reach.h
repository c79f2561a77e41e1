// Which keys rows can do without, found once a call.
//
// A boolean mask is looked through by panels of keys for blocks of rows, once for all heads that share it: panels that
// it hides whole are not computed, those that it shows whole are not masked.
//
// Where a bias falls with the distance, keys far enough away weigh, all together, less than the rounding of what the
// near ones add up to. The bound holds for every input: no key of a block of rows has a logit above |scale| |q| |k|
// plus the highest bias that far away, and each row's maximum is at least its nearest visible key's, -|scale| |q| |k|
// plus the bias there, with the largest |q| of the block and |k| of the sequence.
#pragma once

#include <cmath>

#include "logits.h"
#include "tasks.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t REACH_ROWS = 32;
// Keys out of reach weigh less than 2^-40 of a row: sums of theirs over a million rows are below float32's rounding.
constexpr float REACH_NATS = 27.7258872F;
// What rounding the operands (rotated queries, say) may add to their norms.
constexpr float NORM_SLACK = 1.01F;

struct ReachScratch {
  BiasTile bias;
  float *before, *behind;  // the highest bias up to each entry of bias.relative, and from it on
  double* decayed;         // the highest -c up to each key

  ReachScratch(Arena& arena, const Problem& p, int64_t longest_q) {
    bias.layout(arena, p.bias, longest_q, p.max_k_len);
    const int64_t distances = p.bias.relative() ? longest_q + p.max_k_len : 0;
    before = arena.floats(distances);
    behind = arena.floats(distances);
    decayed = reinterpret_cast<double*>(arena.floats(p.bias.decay_k ? 2 * p.max_k_len : 0));
  }
};

// The largest norm of rows first .. first + count; NaN or infinity if one is.
inline float largest_norm(const Source& src, int64_t first, int64_t count) {
  alignas(64) float row[MAX_WIDTH];
  float most = 0.0F;
  const int64_t padded = round_up(src.width, VL);
  fill(row, 0.0F, padded);
  for (int64_t r = 0; r < count; ++r) {
    load_floats(row, src.row(first + r), src.view.dtype, src.width);
    vf sum = zero();
    for (int64_t c = 0; c < padded; c += VL) sum += load(row + c) * load(row + c);
    const float norm = reduce_add(sum);
    most = norm <= most ? most : norm;  // a NaN stays
    if (!(most < 1e30F)) return most;
  }
  return ::sqrtf(most) * NORM_SLACK;
}

// What a boolean mask leaves of a panel of keys for a block of rows.
enum class Shown : uint8_t { none, some, all };

class Reach {
public:
  explicit Reach(const Problem& p) : sequences_(p.sequences), heads_(p.heads) {
    const bool masked = p.boolean && !p.mix;
    if (!falls(p) && !masked) return;
    const int64_t longest = longest_queries(p), n = p.n_sequences * p.heads;
    blocks_ = imax(1, ceil_div(longest, REACH_ROWS));
    if (masked) look_through(p);
    keys_ = static_cast<Interval*>(allocate(static_cast<size_t>(imax(1, n * blocks_)) * sizeof(Interval)));
    run_tasks(
        p.threads, n,
        [&](Arena& arena) {
          if (falls(p)) ReachScratch(arena, p, longest);
        },
        [&](Arena& arena, int64_t task) {
          const Sequence& s = p.sequences[task / p.heads];
          Interval* keys = keys_ + task * blocks_;
          for (int64_t b = 0; b < ceil_div(s.q_len, REACH_ROWS); ++b)
            keys[b] = masked ? shown_keys(s, task % p.heads, b) : Interval{0, s.k_len};
          if (!falls(p)) return;
          ReachScratch scratch(arena, p, longest);
          (p.bias.decay_k ? find_decayed : find)(p, s, task % p.heads, keys, scratch);
        });
  }
  ~Reach() {
    if (keys_) release(keys_);
    if (shown_) release(shown_);
  }
  Reach(const Reach&) = delete;
  Reach& operator=(const Reach&) = delete;

  explicit operator bool() const { return keys_ != nullptr; }

  // The keys that any of rows i0 .. i1 - 1 cannot do without.
  Interval of(const Sequence& s, int64_t h, int64_t i0, int64_t i1) const {
    const Interval* at = keys_ + ((&s - sequences_) * heads_ + h) * blocks_;
    Interval all = at[i0 / REACH_ROWS];
    for (int64_t b = i0 / REACH_ROWS + 1; b <= (i1 - 1) / REACH_ROWS; ++b)
      all = {imin(all.lo, at[b].lo), imax(all.hi, at[b].hi)};
    return all;
  }

  // What the boolean mask shows rows i0 .. i1 - 1 of the panel of keys from j on, a multiple of NR.
  Shown shown(const Sequence& s, int64_t h, int64_t i0, int64_t i1, int64_t j) const {
    if (!shown_) return Shown::all;
    const Shown first = at(s, h, i0 / REACH_ROWS)[j / NR];
    for (int64_t b = i0 / REACH_ROWS + 1; b <= (i1 - 1) / REACH_ROWS; ++b)
      if (at(s, h, b)[j / NR] != first) return Shown::some;
    return first;
  }

private:
  Shown* at(const Sequence& s, int64_t h, int64_t block) const {
    return shown_ + (((&s - sequences_) * masks_ + (masks_ == 1 ? 0 : h)) * blocks_ + block) * panels_;
  }

  void look_through(const Problem& p) {
    masks_ = p.boolean.head == 0 ? 1 : p.heads, panels_ = imax(1, ceil_div(p.max_k_len, NR));
    const int64_t n = p.n_sequences * masks_ * blocks_;
    shown_ = static_cast<Shown*>(allocate(static_cast<size_t>(imax(1, n * panels_))));
    run_tasks(
        p.threads, n, [](Arena&) {},
        [&](Arena&, int64_t task) {
          const Sequence& s = p.sequences[task / blocks_ / masks_];
          const int64_t h = task / blocks_ % masks_, block = task % blocks_, i0 = block * REACH_ROWS;
          if (i0 >= s.q_len) return;
          // One row stands for all where the mask broadcasts over them.
          const int64_t rows = p.boolean.row == 0 ? 1 : imin(REACH_ROWS, s.q_len - i0);
          for (int64_t j = 0; j < s.k_len; j += NR)
            at(s, h, block)[j / NR] = look_at(boolean_row(p, s, h, i0, j), rows, p.boolean.row,
                                              p.boolean_key == 0 ? 1 : imin(NR, s.k_len - j), p.boolean_key);
        });
  }

  static Shown look_at(const uint8_t* bytes, int64_t rows, int64_t row, int64_t keys, int64_t key) {
    bool any = false, all = true;
    for (int64_t r = 0; r < rows && (!any || all); ++r) {
      const uint8_t* at = bytes + r * row;
      uint64_t either = 0, both = 0x0101010101010101U;
      int64_t c = 0;
      for (; key == 1 && c + 8 <= keys; c += 8) {
        uint64_t word;
        std::memcpy(&word, at + c, 8);
        either |= word, both &= word;
      }
      any = any || either != 0, all = all && both == 0x0101010101010101U;
      for (; c < keys; ++c) any = any || at[c * key] != 0, all = all && at[c * key] != 0;
    }
    return !any ? Shown::none : all ? Shown::all : Shown::some;
  }

  // From the first panel that a block sees something of to the last.
  Interval shown_keys(const Sequence& s, int64_t h, int64_t block) const {
    const Shown* panels = at(s, h, block);
    int64_t lo = 0, hi = ceil_div(s.k_len, NR);
    while (lo < hi && panels[lo] == Shown::none) ++lo;
    while (lo < hi && panels[hi - 1] == Shown::none) --hi;
    return {imin(lo * NR, s.k_len), imin(hi * NR, s.k_len)};
  }

  // Whether the only bias is one of the distance alone or a decay, and no mask may hide the near keys.
  static bool falls(const Problem& p) {
    return p.bias.relative() != (p.bias.decay_k != nullptr) && !p.bias.psi && !p.bias.dense && !p.boolean &&
           !p.q_positions && !p.mix && p.max_k_len > 2 * NR;
  }

  static void find(const Problem& p, const Sequence& s, int64_t h, Interval* keys, ReachScratch& t) {
    const int64_t blocks = ceil_div(s.q_len, REACH_ROWS);
    if (s.k_len == 0 || s.q_len == 0) return;
    t.bias.prepare(p, p.bias, s, h, {0, s.q_len, 0, s.k_len});
    const float* values = t.bias.relative;
    const int64_t n = t.bias.length, base = t.bias.base;
    t.before[0] = values[0], t.behind[n - 1] = values[n - 1];
    float highest = values[0], lowest = values[0];
    for (int64_t x = 1; x < n; ++x) {
      highest = fmax2(highest, values[x]), lowest = fmin2(lowest, values[x]);
      t.before[x] = highest;
    }
    const float least = REACH_NATS + ::logf(static_cast<float>(s.k_len));
    if (!(highest - lowest > least)) return;
    for (int64_t x = n - 2; x >= 0; --x) t.behind[x] = fmax2(t.behind[x + 1], values[x]);

    const Interval all = allowed_by_any(p, s, 0, s.q_len);
    const float k_norm = largest_norm(key_source(p, s, h / (p.heads / p.kv_heads)), all.lo, all.hi - all.lo);
    const Source queries = query_source(p, s, h, 1.0F);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i0 = b * REACH_ROWS, i1 = imin(i0 + REACH_ROWS, s.q_len);
      float near = -NEG_INF;  // the lowest bias of a row's nearest visible key
      for (int64_t i = i0; i < i1; ++i) {
        const Interval visible = allowed(p, s, i);
        if (visible.lo >= visible.hi) continue;
        near = fmin2(near, values[iclamp(i + t.bias.offset, visible.lo, visible.hi - 1) - i - base]);
      }
      if (!(near - lowest > least)) continue;
      const float product = largest_product(p, queries, i0, i1, k_norm);
      const float limit = near - 2.0F * product - least;
      if (!(limit >= lowest)) continue;
      keys[b] = {iclamp(first_above(t.before, n, limit) + i0 + base, 0, s.k_len),
                 iclamp(last_above(t.behind, n, limit) + i1 + base, 0, s.k_len)};
    }
  }

  // No logit of rows i0 .. i1 - 1 is larger in size, biases apart.
  static float largest_product(const Problem& p, const Source& queries, int64_t i0, int64_t i1, float k_norm) {
    const float scale = p.scale < 0.0F ? -p.scale : p.scale;
    float product = scale * largest_norm(queries, i0, i1 - i0) * k_norm;
    if (p.softcap > 0.0F && p.softcap < product) product = p.softcap;
    return product;
  }

  // Of a decay c_i - c_j, a row's own c is in all its logits, so keys are compared by -c_j alone. Only keys before the
  // near ones are left out.
  static void find_decayed(const Problem& p, const Sequence& s, int64_t h, Interval* keys, ReachScratch& t) {
    if (s.k_len == 0 || s.q_len == 0) return;
    const double* c = p.bias.decay_k + (s.b * p.heads + h) * p.k_len + s.k0;
    double lowest = -c[0];
    t.decayed[0] = -c[0];
    for (int64_t j = 1; j < s.k_len; ++j) {
      t.decayed[j] = -c[j] > t.decayed[j - 1] ? -c[j] : t.decayed[j - 1];
      lowest = -c[j] < lowest ? -c[j] : lowest;
    }
    const double least = static_cast<double>(REACH_NATS) + ::log(static_cast<double>(s.k_len));
    if (!(t.decayed[s.k_len - 1] - lowest > least)) return;
    const Interval all = allowed_by_any(p, s, 0, s.q_len);
    const float k_norm = largest_norm(key_source(p, s, h / (p.heads / p.kv_heads)), all.lo, all.hi - all.lo);
    const Source queries = query_source(p, s, h, 1.0F);
    for (int64_t i0 = 0; i0 < s.q_len; i0 += REACH_ROWS) {
      const int64_t i1 = imin(i0 + REACH_ROWS, s.q_len);
      double near = -static_cast<double>(NEG_INF);
      for (int64_t i = i0; i < i1; ++i) {
        const Interval visible = allowed(p, s, i);
        if (visible.lo >= visible.hi) continue;
        const double of_row = -c[iclamp(i + s.offset, visible.lo, visible.hi - 1)];
        near = of_row < near ? of_row : near;
      }
      if (!(near - t.decayed[0] > least)) continue;
      const float product = largest_product(p, queries, i0, i1, k_norm);
      const double limit = near - 2.0 * static_cast<double>(product) - least;
      if (limit >= t.decayed[0]) keys[i0 / REACH_ROWS] = {first_above(t.decayed, s.k_len, limit), s.k_len};
    }
  }

  // Of a rising array: the first entry above `limit`, or n.
  template <class T>
  static int64_t first_above(const T* rising, int64_t n, T limit) {
    int64_t from = 0, to = n;
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      rising[middle] > limit ? to = middle : from = middle + 1;
    }
    return from;
  }
  // Of a falling array: the last entry above `limit`, or -1.
  static int64_t last_above(const float* falling, int64_t n, float limit) {
    int64_t from = 0, to = n;
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      falling[middle] > limit ? from = middle + 1 : to = middle;
    }
    return from - 1;
  }

  const Sequence* sequences_;
  int64_t heads_, blocks_ = 0, masks_ = 1, panels_ = 0;
  Interval* keys_ = nullptr;  // [sequences, heads, blocks_]
  Shown* shown_ = nullptr;    // [sequences, masks_, blocks_, panels_]
};

// The keys that any of rows i0 .. i1 - 1 of head h may see and cannot do without.
inline Interval needed_by_any(const Problem& p, const Sequence& s, int64_t h, int64_t i0, int64_t i1) {
  const Interval seen = allowed_by_any(p, s, i0, i1);
  if (!p.reach || seen.lo >= seen.hi) return seen;
  const Interval reach = static_cast<const Reach*>(p.reach)->of(s, h, i0, i1);
  const int64_t lo = imax(seen.lo, reach.lo);
  return {lo, imax(lo, imin(seen.hi, reach.hi))};
}

inline Shown shown(const Problem& p, const Sequence& s, int64_t h, int64_t i0, int64_t i1, int64_t j) {
  return p.reach ? static_cast<const Reach*>(p.reach)->shown(s, h, i0, i1, j) : Shown::all;
}

// `run` with a Problem that knows its reach.
template <class Run>
void with_reach(const Problem& p, const Run& run) {
  const Reach reach(p);
  Problem call = p;
  if (reach) call.reach = &reach;
  run(call);
}

}  // namespace posattn::POSATTN_ISA
