// Copies, atomics, loads and stores of shared and global memory; one wrapper an instruction, as in ptx.h.
#pragma once
#include "common/types.h"

namespace posattn::ptx {

// A generic pointer to shared memory as the 32-bit address that shared-memory instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory past L1; only the first `bytes` are read, the rest becomes zero.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// 4 bytes, through L1.
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most N of this thread's groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// *p += x without the old value, at device scope and in no particular order.
__device__ __forceinline__ void red_add(float* p, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}

// Four neighbours at once; sm_90 and later.
__device__ __forceinline__ void red_add_v4(float* p, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}

__device__ __forceinline__ void red_add(int64_t* p, int64_t x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

// The old value of *p, to which x is added.
__device__ __forceinline__ int32_t atom_add(int32_t* p, int32_t x) {
  int32_t old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}

// *p += x, after everything that this thread has seen or done.
__device__ __forceinline__ void red_release_add(int32_t* p, int32_t x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

__device__ __forceinline__ int32_t ld_acquire(const int32_t* p) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

__device__ __forceinline__ void red_shared_add(uint32_t p, float x) {
  asm volatile("red.shared.add.f32 [%0], %1;" ::"r"(p), "f"(x) : "memory");
}

// Reads through the read-only path: nothing may write the tensor while the kernel runs.
__device__ __forceinline__ float ld_global_nc(const float* p) {
  float x;
  asm("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
  return x;
}

// Shared memory by address, for code that computes swizzled addresses.
__device__ __forceinline__ float ld_shared(uint32_t p) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(p) : "memory");
  return x;
}

__device__ __forceinline__ void st_shared(uint32_t p, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(x) : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t p, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(p), "r"(x) : "memory");
}

__device__ __forceinline__ void ld_shared_v2(uint32_t (&x)[2], uint32_t p) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(p) : "memory");
}

__device__ __forceinline__ void st_shared_v2(uint32_t p, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(p), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void st_shared_v4(uint32_t p, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

__device__ __forceinline__ void ld_shared_v4(uint32_t (&x)[4], uint32_t p) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(p)
               : "memory");
}

}  // namespace posattn::ptx
