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

// A run of items [begin, end) that its own thread takes from the front, and threads without work from the back.
struct alignas(64) ItemRange {
  uint64_t ends;  // begin in the low half, end in the high one, so that one atomic operation changes either

  bool take(bool front, int64_t *item) {
    uint64_t now = __atomic_load_n(&ends, __ATOMIC_RELAXED);
    for (;;) {
      const uint64_t begin = now & 0xffffffffu, end = now >> 32;
      if (begin >= end) return false;
      const uint64_t next = front ? now + 1 : now - (uint64_t{1} << 32);
      if (__atomic_compare_exchange_n(&ends, &now, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        *item = static_cast<int64_t>(front ? begin : end - 1);
        return true;
      }
    }
  }
};

// Calls f(item) for each of [0, count), count below 2^32. Every thread walks through a contiguous run, as memory likes it,
// and then helps the others: with 113 products a token, a core that something else slows down holds up all of them.
template <class F>
static void parallel_items(int64_t count, F f) {
  constexpr int kMost = 256;
  int threads = max_threads();
  if (threads > kMost) threads = kMost;
  if (count < threads) threads = static_cast<int>(count);
  ItemRange runs[kMost];
  for (int t = 0; t < threads; ++t)
    runs[t].ends = static_cast<uint64_t>(count * t / threads) | static_cast<uint64_t>(count * (t + 1) / threads) << 32;
  auto body = [&](int thread, int) {
    int64_t item;
    for (int k = 0; k < threads; ++k) {
      const int owner = (thread + k) % threads;
      while (runs[owner].take(k == 0, &item)) f(item);
    }
  };
  parallel(threads, body);
}

}  // namespace lgq
