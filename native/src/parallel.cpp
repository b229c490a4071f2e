#include "parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#elif defined(LGQ_GOMP)
// The runtime's own entry points, so that it does not matter which compiler this is: Clang's pragmas want other ones,
// which GCC's runtime lacks, while LLVM's runtime has these too.
extern "C" {
int omp_in_parallel(void);
int omp_get_max_threads(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void *), void *context, unsigned threads, unsigned flags);
}
#else
#include <thread>
#endif

namespace lgq {

#if defined(_OPENMP)

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void run_on_threads(int threads, void (*body)(void *, int, int), void *context) {
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

#elif defined(LGQ_GOMP)

namespace {

struct Call {
  void (*body)(void *, int, int);
  void *context;
};

}  // namespace

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void run_on_threads(int threads, void (*body)(void *, int, int), void *context) {
  Call call{body, context};
  const auto run = [](void *p) {
    const Call &c = *static_cast<const Call *>(p);
    c.body(c.context, omp_get_thread_num(), omp_get_num_threads());
  };
  GOMP_parallel(run, &call, static_cast<unsigned>(threads), 0);
}

#else

int max_threads() {
  // Asked once: the C library opens files to find out, which takes as long as a small product.
  static const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

void run_on_threads(int threads, void (*body)(void *, int, int), void *context) {
  constexpr int kMost = 64;
  if (threads > kMost) threads = kMost;
  std::thread helpers[kMost];
  for (int t = 1; t < threads; ++t) helpers[t] = std::thread(body, context, t, threads);
  body(context, 0, threads);
  for (int t = 1; t < threads; ++t) helpers[t].join();
}

#endif

}  // namespace lgq
