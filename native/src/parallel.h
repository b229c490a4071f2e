// The only place that knows about threads.
//
// Files compiled for one instruction set must not instantiate shared inline functions (the linker keeps one copy, perhaps
// the AVX-512 one), hence plain functions here and a static wrapper template.
#pragma once

#include <cstdint>

namespace lgq {

// Threads a loop started from this thread would get; follows torch.set_num_threads.
int max_threads();

// Calls body(context, thread, threads) once per thread, concurrently.
void run_on_threads(int threads, void (*body)(void *context, int thread, int threads), void *context);

// Calls f(thread, threads) on every thread. Runs inline when there is only one.
template <class F>
static void parallel(int threads, F &f) {
  if (threads <= 1) return f(0, 1);
  run_on_threads(threads, [](void *context, int thread, int n) { (*static_cast<F *>(context))(thread, n); }, &f);
}

// Splits [0, count) into one contiguous range per thread, in multiples of `grain`, and calls f(begin, end).
template <class F>
static void parallel_for(int64_t count, int64_t grain, F f) {
  const int64_t pieces = (count + grain - 1) / grain;
  int threads = max_threads();
  if (pieces < threads) threads = static_cast<int>(pieces);
  auto body = [&](int thread, int n) {
    const int64_t begin = pieces * thread / n * grain;
    int64_t end = pieces * (thread + 1) / n * grain;
    if (end > count) end = count;
    if (begin < end) f(begin, end);
  };
  parallel(threads, body);
}

}  // namespace lgq
