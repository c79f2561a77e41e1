// Everything that depends on the instruction set, compiled once for each with POSATTN_ISA naming it.
#include "backward.h"
#include "forward.h"
#include "probe.h"

namespace posattn::POSATTN_ISA {
namespace {

void run_forward(const Problem& p) {
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return forward<BF16>(p);
#endif
  forward<F32>(p);
}

void run_backward(const Problem& p) {
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return backward<BF16>(p);
#endif
  backward<F32>(p);
}

}  // namespace

#define POSATTN_STRING(x) #x
#define POSATTN_NAME(x) POSATTN_STRING(x)

extern const Kernels kernels;
const Kernels kernels{POSATTN_NAME(POSATTN_ISA),
#if defined(__AVX512BF16__)
                      true,
#else
                      false,
#endif
                      run_forward, run_backward, probe_flops, probe_read};

}  // namespace posattn::POSATTN_ISA
