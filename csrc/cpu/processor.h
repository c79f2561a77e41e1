// What the processor at hand can run.
#pragma once

namespace posattn {

bool has_avx2();
bool has_avx512();
bool has_avx512bf16();
// bfloat16 tiles, which the system must save too: Linux lets a process have them on request, which this is.
bool has_amx();

}  // namespace posattn
