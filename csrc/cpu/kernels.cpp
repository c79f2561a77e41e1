// Everything that depends on the instruction set, compiled once for each with POSATTN_ISA naming it.
#include "kernels.h"

#include "decode.h"
#include "mix_backward.h"
#include "probe.h"
#if defined(POSATTN_TILES)
#  include "amx/backward.h"
#endif

namespace posattn::POSATTN_ISA {
namespace {

template <class M>
void forward_as(const Problem& p) {
  if (p.mix) return mix_forward<M>(p);
  is_decoding(p) ? decode(p) : forward<M>(p);
}

template <class M>
void backward_as(const Problem& p) {
  p.mix ? mix_backward<M>(p) : backward<M>(p);
}

#if defined(POSATTN_TILES)
// A block of rows costs the same with one row in it: below this many, dot products are as fast.
constexpr int64_t FEWEST_TILE_ROWS = 8;

bool pays_for_tiles(const Problem& p) {
  return p.q.dtype == DType::bf16 && !p.mix && longest_queries(p) >= FEWEST_TILE_ROWS;
}
#endif

// float16, and bfloat16 without the dot-product instruction, compute in float32: packing converts.
void run_forward(const Problem& p) {
#if defined(POSATTN_TILES)
  if (pays_for_tiles(p) && !is_decoding(p)) return tile_forward(p);
#endif
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return forward_as<BF16>(p);
#endif
  forward_as<F32>(p);
}

void run_backward(const Problem& p) {
#if defined(POSATTN_TILES)
  if (pays_for_tiles(p)) return tile_backward(p);
#endif
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return backward_as<BF16>(p);
#endif
  backward_as<F32>(p);
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
                      run_forward,
                      run_backward,
                      probe_flops,
                      probe_read};

}  // namespace posattn::POSATTN_ISA
