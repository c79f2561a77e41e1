// Parallel regions on the OpenMP runtime that the process already has, so that there is never a second one.
#pragma once

namespace posattn {

// Run body(context, thread) for thread = 0 .. threads - 1, concurrently where the runtime grants it.
void parallel(int threads, void (*body)(void* context, int thread), void* context);

// "libgomp", "libomp", ... or "std::thread": what `parallel` runs on.
const char* parallel_runtime();

}  // namespace posattn
