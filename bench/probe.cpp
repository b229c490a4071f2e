// What the machine can do at best, measured beside every figure: bytes read from memory, and arithmetic in registers.
// Compiled by the benchmark for the machine it runs on: with AVX-512 where it is, else with AVX2.
#include <immintrin.h>
#include <stdint.h>

// Twelve independent accumulators: enough to hide the latency of one instruction after another.
template <class V, class Step>
static inline V twelve(int64_t steps, V zero, Step step) {
  V a = zero, b = zero, c = zero, d = zero, e = zero, f = zero, g = zero, h = zero, i = zero, j = zero, k = zero, l = zero;
  for (int64_t s = 0; s < steps; ++s) {
    a = step(a), b = step(b), c = step(c), d = step(d), e = step(e), f = step(f);
    g = step(g), h = step(h), i = step(i), j = step(j), k = step(k), l = step(l);
    asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f));
    asm volatile("" : "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
  }
  return a + b + c + d + e + f + g + h + i + j + k + l;
}

#if defined(__AVX512VNNI__)

typedef __m512 Floats;
typedef __m512i Integers;
static inline Floats multiply_floats(Floats a, Floats x) { return _mm512_fmadd_ps(x, x, a); }
#if defined(__AVX512BF16__)
static inline Floats multiply_pairs(Floats a, Integers y) { return _mm512_dpbf16_ps(a, (__m512bh)y, (__m512bh)y); }
#endif
static inline Integers multiply_quads(Integers a, Integers y) { return _mm512_dpbusd_epi32(a, y, y); }

#else

typedef __m256 Floats;
typedef __m256i Integers;
static inline Floats multiply_floats(Floats a, Floats x) { return _mm256_fmadd_ps(x, x, a); }
// Sums of 16 bits, which products of narrow codes can stay in for a while: one instruction less than widening each.
static inline Integers multiply_quads(Integers a, Integers y) {
  Integers product;
  asm("vpmaddubsw %1, %1, %0" : "=x"(product) : "x"(y), "x"(a));  // not once for all twelve, as it would be without `a`
  return _mm256_add_epi16(a, product);
}

#endif

// A number that depends on every lane.
template <class V>
static inline double depending_on(V v) {
  int32_t lanes[sizeof v / 4], sum = 0;
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int32_t lane : lanes) sum ^= lane;
  return sum;
}

extern "C" {

// Operations of one step of probe_peak: float32 FMAs (kind 0), bf16 dot products (1; 0 where there are none), products of bytes (2).
int32_t probe_step(int kind) {
#if defined(__AVX512BF16__)
  constexpr int pairs = sizeof(Floats) / 2;
#else
  constexpr int pairs = 0;
#endif
  constexpr int lanes = sizeof(Floats) / 4;
  return 2 * 12 * (kind == 2 ? 4 * lanes : kind == 1 ? pairs : lanes);
}

// Whether products of bytes sum into 32 bits, so that two of them are one with 16-bit activations.
int32_t probe_has_dot_products() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// Reads all bytes once with every thread; returns a value that depends on them. Lines are fetched 4 KiB ahead: without that
// it reaches 36 to 39 GB/s where products read 45 to 54 (2 cores of Zen 4), and never more than with it.
int64_t probe_read(const char *data, int64_t bytes) {
  constexpr int width = sizeof(Integers);
  int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t chunk = 0; chunk < bytes / 4096; ++chunk) {
    const Integers *p = reinterpret_cast<const Integers *>(data + chunk * 4096);
    Integers a{}, b{}, c{}, d{};
    for (int i = 0; i < 4096 / width; i += 4) {
      for (int k = 0; k < 4 * width; k += 64) __builtin_prefetch(data + chunk * 4096 + i * width + k + 4096);
      a += p[i];
      b += p[i + 1];
      c += p[i + 2];
      d += p[i + 3];
    }
    a += b + c + d;
    for (int i = 0; i < width / 8; ++i) total += a[i];
  }
  return total;
}

// Runs 12 * `steps` multiplications of the kind on every thread.
double probe_peak(int kind, int64_t steps) {
  double total = 0;
#pragma omp parallel reduction(+ : total)
  {
    Floats x = Floats{} + 1e-3f;
    Integers y = Integers{} + 0x0101010101010101;
    asm volatile("" : "+v"(x), "+v"(y));
    if (kind == 0)
      total += depending_on(twelve(steps, Floats{}, [&](Floats a) { return multiply_floats(a, x); }));
#if defined(__AVX512BF16__)
    else if (kind == 1)
      total += depending_on(twelve(steps, Floats{}, [&](Floats a) { return multiply_pairs(a, y); }));
#endif
    else
      total += depending_on(twelve(steps, Integers{}, [&](Integers a) { return multiply_quads(a, y); }));
  }
  return total;
}
}
