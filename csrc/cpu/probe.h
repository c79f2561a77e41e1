// The machine's own ceilings, measured: what a loop of nothing but multiply-adds, bfloat16 dot products (on tiles,
// where there are some) or loads does.
#pragma once

#include "gemm.h"

namespace posattn::POSATTN_ISA {

template <class M>
inline double flops_loop(int64_t iterations) {
  constexpr int CHAINS = 12;
  vf acc[CHAINS];
  for (int i = 0; i < CHAINS; ++i) acc[i] = set1(static_cast<float>(i) * 1e-3F);
  vf a = set1(M::pack == 1 ? 1.0001F : bits_to_float(0x3f803f80U)), b = set1(M::pack == 1 ? 1e-6F : a[0]);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) acc[i] = M::pack == 1 ? fma(acc[i], a, b) : M::dot(acc[i], a, b);
  }
  float total = 0.0F;
  for (int i = 0; i < CHAINS; ++i) total += reduce_add(acc[i]);
  volatile float sink = total;
  (void)sink;
  return static_cast<double>(iterations) * CHAINS * VL * 2 * M::pack;
}

#if defined(POSATTN_TILES)
// On random numbers: the clock falls with the bits that change, and on zeros the tiles do a quarter more.
inline double tiles_loop(int64_t iterations) {
  alignas(64) uint16_t random[4][TILE * TILE_DEPTH];
  uint32_t state = 1;
  for (auto& tile : random)
    for (uint16_t& x : tile) {
      state = state * 1664525U + 1013904223U;
      x = static_cast<uint16_t>(0x3f00U | (state >> 16 & 0x80ffU));  // +-[0.5, 2)
    }
  [[maybe_unused]] const TileSession session;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(random[0], 64), tile_load<5>(random[1], 64), tile_load<6>(random[2], 64), tile_load<7>(random[3], 64);
  for (int64_t n = 0; n < iterations; ++n)
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  return static_cast<double>(iterations) * 4 * TILE * TILE * TILE_DEPTH * 2;
}
#endif

inline double probe_flops(const char* kind, int64_t iterations) {
#if defined(POSATTN_TILES)
  if (std::strcmp(kind, "bf16dot") == 0) return tiles_loop(iterations);
#endif
  if (std::strcmp(kind, "fma") == 0) return flops_loop<F32>(iterations);
#if defined(__AVX512BF16__)
  if (std::strcmp(kind, "bf16dot") == 0) return flops_loop<BF16>(iterations);
#endif
  return 0.0;
}

inline double probe_read(const float* data, int64_t count) {
  vf acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t n = 0; n + 4 * VL <= count; n += 4 * VL)
    for (int i = 0; i < 4; ++i) acc[i] += load(data + n + i * VL);
  volatile float sink = reduce_add(acc[0] + acc[1] + acc[2] + acc[3]);
  (void)sink;
  return static_cast<double>(count / (4 * VL) * 4 * VL) * 4;
}

}  // namespace posattn::POSATTN_ISA
