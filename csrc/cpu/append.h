// New tokens of a cache in one pass: read, turned, rounded to the cache's numbers and written where they belong.
#pragma once

#include "pack.h"
#include "tasks.h"

namespace posattn::POSATTN_ISA {

inline void append_token(const Append& a, int64_t n) {
  alignas(64) float row[MAX_WIDTH];
  const int64_t bytes = a.width * (a.to.dtype == DType::f32 ? 4 : 2);
  for (int64_t h = 0; h < a.heads; ++h) {
    const char* from = row_pointer(a.source, a.entries[n], h, a.sources[n]);
    char* to = const_cast<char*>(row_pointer(a.to, a.slots[n] / a.page, h, a.slots[n] % a.page));
    if (!a.cos) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
      continue;
    }
    load_floats(row, from, a.source.dtype, a.width);
    rotate(row, a.cos + n * a.half, a.sin + n * a.half, a.half, a.interleaved, 1.0F);
    store_floats(to, row, a.to.dtype, a.width);
  }
}

inline void append(const Append& a) {
  constexpr int64_t TOKENS = 32;  // of a task
  run_tasks(
      a.threads, ceil_div(a.tokens, TOKENS), [](Arena&) {},
      [&](Arena&, int64_t task) {
        for (int64_t n = task * TOKENS; n < imin((task + 1) * TOKENS, a.tokens); ++n) append_token(a, n);
      });
}

}  // namespace posattn::POSATTN_ISA
