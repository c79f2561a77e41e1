#include "processor.h"

#if defined(__x86_64__)
#  include <cpuid.h>

#  include <cstdint>
#  if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#  endif
#endif

namespace posattn {

#if defined(__x86_64__)

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

bool has_amx() {
  if (!has_avx512bf16() || __get_cpuid_max(0, nullptr) < 7) return false;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  __cpuid_count(7, 0, a, b, c, d);
  constexpr uint32_t BF16 = 1U << 22, TILE = 1U << 24;
  if ((d & BF16) == 0 || (d & TILE) == 0) return false;
  // AVX-512 is there, so XGETBV is: the two states of tiles, configuration and data.
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t TILE_STATES = 3U << 17;
  if ((low & TILE_STATES) != TILE_STATES) return false;
#  if defined(__linux__)
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#  else
  return false;
#  endif
}

#else

bool has_avx2() {
  return false;
}
bool has_avx512() {
  return false;
}
bool has_avx512bf16() {
  return false;
}
bool has_amx() {
  return false;
}

#endif

}  // namespace posattn
