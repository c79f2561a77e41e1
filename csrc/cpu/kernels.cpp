// Everything that depends on the instruction set, compiled once for each with POSATTN_ISA naming it.
#include "kernels.h"

#include "append.h"
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
// Where tiles are faster than the other kernels (docs/lab/cpu.md): a block of rows costs the same with one row in it,
// rows of a head share what it costs to split keys, and a width is paid for in whole tiles. A number of three parts
// costs six products, so it takes more rows to pay, and backward, where what is read binds, a width that is not large
// and packed rows that are kept from call to call.
// Tests take tiles wherever they can be taken.
bool pays_for_tiles(const Problem& p, [[maybe_unused]] bool backward) {
#  if defined(POSATTN_ALWAYS_TILES)
  return !p.mix;
#  else
  const int64_t rows = longest_queries(p), width = imax(p.head_dim, p.value_dim);
  if (p.mix) return false;
  if (p.q.dtype == DType::bf16) return rows >= 8;
  const bool fills = 4 * imin(p.head_dim, p.value_dim) >= 3 * round_up(width, TILE_DEPTH);
  if (p.q.dtype == DType::f16 || p.two_parts) return rows >= (fills ? 64 : 256);
  const int64_t packed = p.batch * p.heads * p.q_len * (p.head_dim + p.value_dim) * 12;  // bytes
  return fills && rows >= 192 && !(backward && (width > 96 || packed > int64_t{16} << 20));
#  endif
}

// use(mode) for the numbers that tiles multiply: all 24 bits of float32 need three parts, the 11 of float16 two.
template <class Use>
void with_tile_mode(const Problem& p, const Use& use) {
  if (p.q.dtype == DType::bf16) return use(AMX());
  if (p.q.dtype == DType::f16 || p.two_parts) return use(Split<2>());
  use(Split<3>());
}
#endif

// float16, and bfloat16 without the dot-product instruction, compute in float32: packing converts.
void run_forward(const Problem& p) {
#if defined(POSATTN_TILES)
  if (pays_for_tiles(p, false) && !is_decoding(p))
    return with_tile_mode(p, [&](auto mode) { tile_forward<decltype(mode)>(p); });
#endif
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return forward_as<BF16>(p);
#endif
  forward_as<F32>(p);
}

void run_backward(const Problem& p) {
#if defined(POSATTN_TILES)
  if (pays_for_tiles(p, true)) return with_tile_mode(p, [&](auto mode) { tile_backward<decltype(mode)>(p); });
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
                      append,
                      probe_flops,
                      probe_read};

}  // namespace posattn::POSATTN_ISA
