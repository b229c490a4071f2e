// Vector types and the one register tile that the sweep, the Hessian and OBQ are built on.
//
// Included by one translation unit per instruction set, so everything here has internal linkage: the same template
// compiled with other flags must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Lanes of one vector and columns of one register tile. NR * 2 accumulators + 2 operands + 1 broadcast fit the
// register file: 27 of 32 with AVX-512 and NEON, 15 of 16 with AVX2 and SSE2.
#if defined(__AVX512F__)
constexpr int kLanes = 16, NR = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, NR = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, NR = 12;
#else
constexpr int kLanes = 4, NR = 6;
#endif
constexpr int MR = 2 * kLanes;
// Columns of a block and depth of one pass. A packed block (KC x NB floats, 144 KiB) stays in the second-level cache,
// an operand panel (KC x MR floats, 24 KiB) in the first. From 96 x 256 to 288 x 256 the sweep's speed differs by 10 %.
constexpr int64_t NB = 192, KC = 192;

typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(kLanes * sizeof(float)), may_alias));
typedef float vec_u __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

inline vec load(const float *p) { return *reinterpret_cast<const vec*>(p); }
inline vec load_u(const float *p) { return *reinterpret_cast<const vec_u*>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline void store_u(float *p, vec v) { *reinterpret_cast<vec_u*>(p) = v; }

// acc[n][:] += sum_k a[k][0:MR] * b[k][n] with a packed (depth, MR) and b packed (depth, NR).
inline __attribute__((always_inline)) void multiply_tile(const float* __restrict a, const float* __restrict b,
                                                         int64_t depth, vec (&acc)[NR][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const vec a0 = load(a + k * MR), a1 = load(a + k * MR + kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n) {
      const float s = b[k * NR + n];
      acc[n][0] += a0 * s;
      acc[n][1] += a1 * s;
    }
  }
}

inline __attribute__((always_inline)) void clear_tile(vec (&acc)[NR][2]) {
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n) acc[n][0] = acc[n][1] = vec{};
}

// Cache-line aligned memory that frees itself; data() is null when there is none to be had.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : raw_(std::malloc(static_cast<size_t>(bytes) + 64)) {}
  ~Scratch() { std::free(raw_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  template <class T>
  T *as() {
    return raw_ ? reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63}) : nullptr;
  }

 private:
  void *raw_;
};

// One more of a counter that threads share. A builtin, not std::atomic: an inline function of the standard library that
// is compiled for one instruction set could be the copy that the linker keeps for all.
inline int64_t take(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
