// One vector of floats, as wide as the instruction set that this file is compiled for, and the few operations that the
// kernels need. Everything lives in a namespace per instruction set and nothing of the standard library is
// instantiated here: a template compiled with AVX-512 must never be the one that a baseline machine links to.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

// Tile registers, as the processor's or as amx/tiles.h emulates them.
#if defined(__AMX_BF16__) || defined(POSATTN_AMX_EMULATED)
#  define POSATTN_TILES 1
#endif

#if defined(__AVX512F__)
#  define POSATTN_VECTOR_BYTES 64
#elif defined(__AVX__)
#  define POSATTN_VECTOR_BYTES 32
#else
#  define POSATTN_VECTOR_BYTES 16
#endif

// For what holds vectors in its arguments: called, it would pass them through memory.
#define POSATTN_INLINE inline __attribute__((always_inline))

namespace posattn::POSATTN_ISA {

constexpr int VL = POSATTN_VECTOR_BYTES / 4;

// GCC and Clang vectors: arithmetic operators, and a * b + c becomes an FMA where there is one (-ffp-contract=fast).
typedef float vf __attribute__((vector_size(POSATTN_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(POSATTN_VECTOR_BYTES)));
// Pairs of bfloat16 read as they lie in a tensor are aligned to two bytes only.
typedef float vf_unaligned __attribute__((vector_size(POSATTN_VECTOR_BYTES), aligned(2), may_alias));

POSATTN_INLINE vf load(const float* p) {
  return *reinterpret_cast<const vf_unaligned*>(p);
}
POSATTN_INLINE void store(float* p, vf x) {
  *reinterpret_cast<vf_unaligned*>(p) = x;
}
// Moves bits and never computes: an element may be a pair of bfloat16.
POSATTN_INLINE vf set1(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
POSATTN_INLINE vf zero() {
  return vf{};
}

constexpr int64_t imin(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t imax(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t iclamp(int64_t x, int64_t low, int64_t high) {
  return imax(low, imin(x, high));
}
constexpr int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}
constexpr int64_t ceil_div(int64_t x, int64_t by) {
  return (x + by - 1) / by;
}
inline float fmax2(float a, float b) {
  return a > b ? a : b;
}
inline float fmin2(float a, float b) {
  return a < b ? a : b;
}

constexpr float LOG2E = 1.4426950408889634F;
constexpr float NEG_INF = -__builtin_inff();
// Logits are held above this, so that they can change base: a finite bias of -3.4e38 must not become -inf, which
// forbids a key.
constexpr float FLOOR = -1e38F;

// Rounded once where the instruction exists, else twice: where a product must not be rounded by itself, see `fused`.
POSATTN_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a * b + c with the product exact on every instruction set, for sums that cancel. Without a fused instruction float64
// holds the product whole, and its own rounding of the sum is 2^-29 of the one that follows.
POSATTN_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  typedef double vd __attribute__((vector_size(2 * POSATTN_VECTOR_BYTES)));
  return __builtin_convertvector(
      __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd) + __builtin_convertvector(c, vd), vf);
#endif
}

POSATTN_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

POSATTN_INLINE float reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0.0F;
  for (int i = 0; i < VL; ++i) sum += x[i];
  return sum;
#endif
}

POSATTN_INLINE float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < VL; ++i) most = fmax2(most, x[i]);
  return most;
#endif
}

// 2^x with 2^0 = 1 exactly and 2^-inf = 0 exactly; below -126 the result is 0 on the narrow instruction sets.
// Polynomials are minimax in relative error over [0, 1) with the constant held at 1: DEGREE 5 errs by 8.3e-8, which a
// float32 result needs, and DEGREE 4 by 2.9e-6, a thousandth of bfloat16's rounding.
template <int DEGREE>
POSATTN_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  // VREDUCEPS: x - floor(x), and 0 for -inf; VSCALEFPS multiplies by 2^floor(x) without overflow on the way.
  vf f = (vf)_mm512_reduce_ps((__m512)x, 1);
#else
  vf clamped = x < -126.0F ? set1(-126.0F) : (x > 127.999F ? set1(127.999F) : x);
  vi whole = __builtin_convertvector(clamped, vi);
  vf back = __builtin_convertvector(whole, vf);
  vi above = back > clamped;  // truncation rounds negative numbers up; the comparison is -1 where it did
  whole += above;
  vf f = clamped - __builtin_convertvector(whole, vf);
#endif
  vf p;
  if constexpr (DEGREE == 5) {
    p = fma(set1(1.867130703e-03F), f, set1(9.017028957e-03F));
    p = fma(p, f, set1(5.579991411e-02F));
    p = fma(p, f, set1(2.401644499e-01F));
    p = fma(p, f, set1(6.931513118e-01F));
  } else {
    p = fma(set1(1.342668976e-02F), f, set1(5.224246520e-02F));
    p = fma(p, f, set1(2.412802091e-01F));
    p = fma(p, f, set1(6.930448443e-01F));
  }
  p = fma(p, f, set1(1.0F));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  vi exponent = (whole + 127) << 23;
  vf scaled = p * (vf)exponent;
  return x < -126.0F ? zero() : (x > 127.999F ? set1(__builtin_inff()) : scaled);
#endif
}

inline float exp2_scalar(float x) {
  return exp2<5>(set1(x))[0];
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t x) {
  return bits_to_float(static_cast<uint32_t>(x) << 16);
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffU) > 0x7f800000U) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
}

inline float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16, exponent = (h >> 10) & 31U, mantissa = h & 1023U;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000U | (mantissa << 13));
  if (exponent == 0) {
    float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8F;  // 2^-24
    return bits_to_float(sign | float_to_bits(tiny));
  }
  return bits_to_float(sign | ((exponent + 112U) << 23) | (mantissa << 13));
#endif
}

inline uint16_t float_to_f16(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, 0));
#else
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000U, a = u & 0x7fffffffU;
  if (a > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (a >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to infinity
  if (a < 0x38800000U) {                                               // subnormal: let the adder round
    float shifted = bits_to_float(a) + 0.5F;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000U));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000U + 0xfffU + ((a >> 13) & 1U)) >> 13));
#endif
}

// VL consecutive half-precision numbers as floats.
POSATTN_INLINE vf load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf x;
  for (int i = 0; i < VL; ++i) x[i] = bf16_to_float(p[i]);
  return x;
#endif
}

POSATTN_INLINE vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < VL; ++i) x[i] = f16_to_float(p[i]);
  return x;
#endif
}

// Two rows of floats as bfloat16 pairs: lane i holds (even[i], odd[i]), even in the low half.
POSATTN_INLINE vf bf16_pair(vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vf)_mm512_permutexvar_epi16(interleave, both);
#else
  vf out;
  for (int i = 0; i < VL; ++i)
    out[i] = bits_to_float(float_to_bf16(even[i]) | static_cast<uint32_t>(float_to_bf16(odd[i])) << 16);
  return out;
#endif
}

// 2 * VL consecutive floats as consecutive bfloat16 values.
POSATTN_INLINE vf bf16_row(vf low, vf high) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  vf out;
  for (int i = 0; i < VL / 2; ++i) {
    out[i] = bits_to_float(float_to_bf16(low[2 * i]) | static_cast<uint32_t>(float_to_bf16(low[2 * i + 1])) << 16);
    out[VL / 2 + i] =
        bits_to_float(float_to_bf16(high[2 * i]) | static_cast<uint32_t>(float_to_bf16(high[2 * i + 1])) << 16);
  }
  return out;
#endif
}

}  // namespace posattn::POSATTN_ISA
