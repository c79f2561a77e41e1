// Raw products become logits: softcap, masks, biases.
#pragma once

#include "bias.h"

namespace posattn::POSATTN_ISA {

struct Interval {
  int64_t lo, hi;  // keys lo .. hi - 1
};

// Causal, window and length masks leave every row one run of keys.
inline Interval allowed(const Problem& p, const Sequence& s, int64_t i) {
  int64_t at = i + s.offset, lo = 0, hi = s.k_len;
  if (p.left >= 0) lo = imax(lo, at - p.left);
  if (p.right >= 0) hi = imin(hi, at + p.right + 1);
  if (p.causal) hi = imin(hi, at + 1);
  return {imin(lo, s.k_len), imax(hi, imin(lo, s.k_len))};
}

// The keys that any of rows i0 .. i1 - 1 may see. Both ends of an interval rise with the row; an empty row (lo == hi)
// does not count.
inline Interval allowed_by_any(const Problem& p, const Sequence& s, int64_t i0, int64_t i1) {
  Interval first = allowed(p, s, i0), last = allowed(p, s, i1 - 1);
  return {first.lo, imax(last.hi, first.lo)};
}

inline vf tanh(vf x) {
  // Cephes' tanhf: an odd polynomial near zero, where the quotient would cancel.
  vf square = x * x;
  vf p = set1(-5.70498872745e-3F);
  p = fma(p, square, set1(2.06390887954e-2F));
  p = fma(p, square, set1(-5.37397155531e-2F));
  p = fma(p, square, set1(1.33314422036e-1F));
  p = fma(p, square, set1(-3.33332819422e-1F));
  vf near = fma(p * square, x, x);
  vf size = x < 0.0F ? -x : x;
  vf far = 1.0F - 2.0F / (exp2<5>(size * (2.0F * LOG2E)) + 1.0F);
  return size < 0.625F ? near : (x < 0.0F ? -far : far);
}

// x becomes softcap * tanh(x * mul / softcap). If slope is given it gets the derivative by x * mul, 1 - tanh^2.
inline void apply_softcap(float* x, int64_t n, float softcap, float mul, float* slope) {
  vf inward = set1(mul / softcap), outward = set1(softcap);
  for (int64_t c = 0; c < n; c += VL) {
    vf t = tanh(load(x + c) * inward);
    store(x + c, t * outward);
    if (slope) store(slope + c, 1.0F - t * t);
  }
}

// -inf outside the row's interval; x holds keys j .. j + n.
inline void mask_interval(float* x, Interval keys, int64_t j, int64_t n) {
  if (keys.lo > j) fill(x, NEG_INF, imin(keys.lo - j, n));
  if (keys.hi < j + n) {
    int64_t from = imax(keys.hi - j, 0);
    fill(x + from, NEG_INF, n - from);
  }
}

// The boolean mask's entry for row i and key j; the next key is p.boolean_key bytes on.
inline const uint8_t* boolean_row(const Problem& p, const Sequence& s, int64_t h, int64_t i, int64_t j) {
  return static_cast<const uint8_t*>(p.boolean.data) + s.b * p.boolean.batch + h * p.boolean.head +
         (s.q0 + i) * p.boolean.row + (s.k0 + j) * p.boolean_key;
}

inline void mask_boolean(const Problem& p, const Sequence& s, int64_t h, float* x, int64_t i, int64_t j, int64_t n) {
  const uint8_t* bytes = boolean_row(p, s, h, i, j);
  int64_t count = imin(n, s.k_len - j), step = p.boolean_key;
  for (int64_t c = 0; c < count; ++c) x[c] = bytes[c * step] ? x[c] : NEG_INF;
}

// One row of raw products x (times mul) over keys j .. j + n of row i. Returns the row's maximum; where only the
// multiplication is left to do, it is left to the caller: `mul` comes back as what x must still be multiplied with.
inline vf finish_row(const Problem& p, const Sequence& s, const BiasTile& bias, float* x, int64_t i, Interval keys,
                     int64_t j, int64_t n, float& mul, float* softcap_slope = nullptr) {
  if (p.softcap > 0.0F) {
    apply_softcap(x, n, p.softcap, mul, softcap_slope);
    mul = 1.0F;
  } else if (!(mul > 0.0F)) {  // -inf times a mul of 0 or below is not -inf
    for (int64_t c = 0; c < n; c += VL) store(x + c, load(x + c) * mul);
    mul = 1.0F;
  }
  // A dense bias may hold anything at a masked key, so it comes before the masks.
  if (bias.bias->dense) bias.add_dense(x, i, j, n, mul), mul = 1.0F;
  mask_interval(x, keys, j, n);
  if (p.boolean) mask_boolean(p, s, bias.head, x, i, j, n);
  vf most = bias.add_smooth(x, i, j, n, mul);
  if (bias.bias->any()) mul = 1.0F;
  return most;
}

}  // namespace posattn::POSATTN_ISA
