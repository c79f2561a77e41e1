// The kernels that a build holds, as POSATTN_HAVE_<instruction set> says.
#pragma once

#include <vector>

#include "kernels.h"
#include "processor.h"

#define POSATTN_DECLARE(isa)    \
  namespace posattn::isa {      \
  extern const Kernels kernels; \
  }
#if defined(POSATTN_HAVE_baseline)
POSATTN_DECLARE(baseline)
#endif
#if defined(POSATTN_HAVE_neon)
POSATTN_DECLARE(neon)
#endif
#if defined(POSATTN_HAVE_avx2)
POSATTN_DECLARE(avx2)
#endif
#if defined(POSATTN_HAVE_avx512)
POSATTN_DECLARE(avx512)
#endif
#if defined(POSATTN_HAVE_avx512bf16)
POSATTN_DECLARE(avx512bf16)
#endif
#if defined(POSATTN_HAVE_amx_emulated)
POSATTN_DECLARE(amx_emulated)
#endif
#if defined(POSATTN_HAVE_amx)
POSATTN_DECLARE(amx)
#endif
#undef POSATTN_DECLARE

namespace posattn {

// What this build holds and this processor runs, fastest last.
inline std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(POSATTN_HAVE_baseline)
  found.push_back(&baseline::kernels);
#endif
#if defined(POSATTN_HAVE_neon)
  found.push_back(&neon::kernels);
#endif
#if defined(POSATTN_HAVE_avx2)
  if (has_avx2()) found.push_back(&avx2::kernels);
#endif
#if defined(POSATTN_HAVE_avx512)
  if (has_avx512()) found.push_back(&avx512::kernels);
#endif
#if defined(POSATTN_HAVE_avx512bf16)
  if (has_avx512bf16()) found.push_back(&avx512bf16::kernels);
#endif
#if defined(POSATTN_HAVE_amx_emulated)
  if (has_avx512bf16()) found.push_back(&amx_emulated::kernels);
#endif
#if defined(POSATTN_HAVE_amx)
  if (has_amx()) found.push_back(&amx::kernels);
#endif
  return found;
}

}  // namespace posattn
