// AMX's eight tile registers, each of 16 rows by 64 bytes, and the few instructions that the kernels need: as the
// instructions, or in plain C++ with their exact bits (POSATTN_AMX_EMULATED), so that every processor can prove the
// kernels that only some can run.
#pragma once

#include "../simd.h"

namespace posattn::POSATTN_ISA {

constexpr int TILE = 16;        // rows of a tile; columns of one of floats
constexpr int TILE_DEPTH = 32;  // bfloat16 numbers in a row of a tile: what one product sums over

#if defined(POSATTN_AMX_EMULATED)

// A subnormal number counts as zero, going in and coming out.
inline float flushed(float x) {
  return (float_to_bits(x) & 0x7f800000U) == 0 ? bits_to_float(float_to_bits(x) & 0x80000000U) : x;
}

struct EmulatedTile {
  uint32_t at[TILE][TILE];
};
inline EmulatedTile& emulated_tile(int n) {
  static thread_local EmulatedTile tiles[8];
  return tiles[n];
}

struct TileSession {};

template <int T>
inline void tile_zero() {
  emulated_tile(T) = {};
}
template <int T>
inline void tile_load(const void* from, int64_t row) {
  for (int r = 0; r < TILE; ++r) std::memcpy(emulated_tile(T).at[r], static_cast<const char*>(from) + r * row, 64);
}
template <int T>
inline void tile_store(void* to, int64_t row) {
  for (int r = 0; r < TILE; ++r) std::memcpy(static_cast<char*>(to) + r * row, emulated_tile(T).at[r], 64);
}

// C += A B, as TDPBF16PS does it: the even and the odd half of each pair are summed by themselves from zero, each step
// one fused multiply-add, and their sum is added to C once.
template <int C, int A, int B>
inline void tile_dot() {
  const EmulatedTile a = emulated_tile(A), b = emulated_tile(B);
  EmulatedTile& c = emulated_tile(C);
  for (int m = 0; m < TILE; ++m)
    for (int n = 0; n < TILE; ++n) {
      float even = 0.0F, odd = 0.0F;
      for (int k = 0; k < TILE; ++k) {
        const uint32_t x = a.at[m][k], y = b.at[k][n];
        even = flushed(__builtin_fmaf(flushed(bits_to_float(x << 16)), flushed(bits_to_float(y << 16)), even));
        odd = flushed(
            __builtin_fmaf(flushed(bits_to_float(x & 0xffff0000U)), flushed(bits_to_float(y & 0xffff0000U)), odd));
      }
      c.at[m][n] = float_to_bits(flushed(flushed(bits_to_float(c.at[m][n])) + flushed(even + odd)));
    }
}

#else

// Configures the tiles of this thread and gives them back: while they are in use, every switch of threads saves them.
struct TileSession {
  TileSession() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = TILE;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Assembly, because GCC 12's own intrinsics do not say that they read memory: stores may sink below them.
template <int T>
POSATTN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
POSATTN_INLINE void tile_load(const void* from, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(T) : "memory");
}
template <int T>
POSATTN_INLINE void tile_store(void* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(T) : "memory");
}
template <int C, int A, int B>
POSATTN_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace posattn::POSATTN_ISA
