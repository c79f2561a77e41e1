// PTX instructions of sm_90a, one wrapper each, named after the instruction: products of a warpgroup (128 threads) that
// run beside it, with operands in shared memory; and bulk copies, whose bytes an mbarrier counts.
//
// wgmma m64nNk16: D [64, N] += A [64, 16] B [16, N]. Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of D, and of
// A if A is in registers, in the fragments of mma.m16n8k16 (mma.h), N / 8 of them side by side. A tile in shared
// memory is given by a descriptor, see descriptor().
#pragma once
#include "ptx/ptx.h"

namespace posattn::ptx {

// Writes to shared memory by ordinary stores and cp.async, before it, are seen by wgmma after the next barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers written before are ready for the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// An mbarrier's phase ends when `count` arrivals and all bytes announced have come.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// What mbarrier_init wrote is seen by bulk copies, after the next barrier by those of all threads.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and `bytes` more to wait for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait_parity(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1; @!done bra "
      "again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// `bytes` (a multiple of 16) from global to shared memory, by one thread.
__device__ __forceinline__ void cp_async_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Keeps the compiler from moving accesses of the accumulators past this place.
template <int N8>
__device__ __forceinline__ void hold(float (&d)[N8][4]) {
#pragma unroll
  for (int n = 0; n < N8; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) asm volatile("" : "+f"(d[n][x])::"memory");
  }
}

// A tile in shared memory whose rows of 128 bytes have their chunks swizzled by c ^ (row mod 8). `panel`: bytes from
// one run of 64 columns to the next, for operands whose columns are not summed over (tnsp).
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel) {
  constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
  constexpr uint64_t EIGHT_ROWS = uint64_t{1024 / 16} << 32;
  return SWIZZLE_128 | EIGHT_ROWS | uint64_t{panel / 16} << 16 | address / 16;
}

#define POSATTN_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define POSATTN_D4(n) POSATTN_D1(n), POSATTN_D1(n + 1), POSATTN_D1(n + 2), POSATTN_D1(n + 3)
#define POSATTN_D8 POSATTN_D4(0), POSATTN_D4(4)
#define POSATTN_D16 POSATTN_D8, POSATTN_D4(8), POSATTN_D4(12)

#define POSATTN_WGMMA_SHARED_32(TYPE, TNSP)                                                                      \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE \
               " "                                                                                               \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"                          \
               ", %16, %17, p, 1, 1, " TNSP ", " TNSP ";}"                                                       \
               : POSATTN_D4(0)                                                                                   \
               : "l"(a), "l"(b), "r"(add))

#define POSATTN_WGMMA_SHARED_64(TYPE, TNSP)                                                                      \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
               " "                                                                                               \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"                 \
               ", %32, %33, p, 1, 1, " TNSP ", " TNSP ";}"                                                       \
               : POSATTN_D8                                                                                      \
               : "l"(a), "l"(b), "r"(add))

#define POSATTN_WGMMA_REGISTERS_64(TYPE, TNSP)                                                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
               " "                                                                                               \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"                 \
               ", {%32, %33, %34, %35}, %36, p, 1, 1, " TNSP ";}"                                                \
               : POSATTN_D8                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define POSATTN_WGMMA_SHARED_128(TYPE, TNSP)                                                                      \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
               " "                                                                                                \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"                  \
               ", %64, %65, p, 1, 1, " TNSP ", " TNSP ";}"                                                        \
               : POSATTN_D16                                                                                      \
               : "l"(a), "l"(b), "r"(add))

#define POSATTN_WGMMA_REGISTERS_128(TYPE, TNSP)                                                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
               " "                                                                                                \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"                  \
               ", {%64, %65, %66, %67}, %68, p, 1, 1, " TNSP ";}"                                                 \
               : POSATTN_D16                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

// D = A B, or D += A B if `add`: both operands tiles [rows, 16] whose columns are summed over. N = 8 N8 is 64 or 128.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_f16(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_SHARED_64("f16", "0");
  } else {
    POSATTN_WGMMA_SHARED_128("f16", "0");
  }
}

// The same with A in registers. B is a tile [N, 16] whose columns are summed over.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_f16(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_REGISTERS_64("f16", "0");
  } else {
    POSATTN_WGMMA_REGISTERS_128("f16", "0");
  }
}

// The same with B a tile [16, N] whose rows are summed over.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_tnsp_f16(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b,
                                                        int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_REGISTERS_64("f16", "1");
  } else {
    POSATTN_WGMMA_REGISTERS_128("f16", "1");
  }
}

// D = A B, or D += A B if `add`: both operands tiles [16, rows] whose rows are summed over. N may be 32 as well.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_tnsp_f16(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
  static_assert(N8 == 4 || N8 == 8 || N8 == 16);
  if constexpr (N8 == 4) {
    POSATTN_WGMMA_SHARED_32("f16", "1");
  } else if constexpr (N8 == 8) {
    POSATTN_WGMMA_SHARED_64("f16", "1");
  } else {
    POSATTN_WGMMA_SHARED_128("f16", "1");
  }
}

// D = A B, or D += A B if `add`: both operands tiles [rows, 16] whose columns are summed over. N = 8 N8 is 64 or 128.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_bf16(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_SHARED_64("bf16", "0");
  } else {
    POSATTN_WGMMA_SHARED_128("bf16", "0");
  }
}

// The same with A in registers. B is a tile [N, 16] whose columns are summed over.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_bf16(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_REGISTERS_64("bf16", "0");
  } else {
    POSATTN_WGMMA_REGISTERS_128("bf16", "0");
  }
}

// The same with B a tile [16, N] whose rows are summed over.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_tnsp_bf16(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b,
                                                         int add) {
  static_assert(N8 == 8 || N8 == 16);
  if constexpr (N8 == 8) {
    POSATTN_WGMMA_REGISTERS_64("bf16", "1");
  } else {
    POSATTN_WGMMA_REGISTERS_128("bf16", "1");
  }
}

// D = A B, or D += A B if `add`: both operands tiles [16, rows] whose rows are summed over. N may be 32 as well.
template <int N8>
__device__ __forceinline__ void wgmma_m64nNk16_tnsp_bf16(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
  static_assert(N8 == 4 || N8 == 8 || N8 == 16);
  if constexpr (N8 == 4) {
    POSATTN_WGMMA_SHARED_32("bf16", "1");
  } else if constexpr (N8 == 8) {
    POSATTN_WGMMA_SHARED_64("bf16", "1");
  } else {
    POSATTN_WGMMA_SHARED_128("bf16", "1");
  }
}

#undef POSATTN_D1
#undef POSATTN_D4
#undef POSATTN_D8
#undef POSATTN_D16
#undef POSATTN_WGMMA_SHARED_32
#undef POSATTN_WGMMA_SHARED_64
#undef POSATTN_WGMMA_REGISTERS_64
#undef POSATTN_WGMMA_SHARED_128
#undef POSATTN_WGMMA_REGISTERS_128

}  // namespace posattn::ptx
