// What the machine can do at best, measured beside every figure: bytes read from memory, and arithmetic in registers.
// Compiled by the benchmark for the machine it runs on.
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

extern "C" {

// Reads all bytes once with every thread; returns a value that depends on them.
int64_t probe_read(const char *data, int64_t bytes) {
  int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t chunk = 0; chunk < bytes / 4096; ++chunk) {
    const char *p = data + chunk * 4096;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int i = 0; i < 4096; i += 256) {
      a = _mm512_add_epi64(a, _mm512_load_si512(p + i));
      b = _mm512_add_epi64(b, _mm512_load_si512(p + i + 64));
      c = _mm512_add_epi64(c, _mm512_load_si512(p + i + 128));
      d = _mm512_add_epi64(d, _mm512_load_si512(p + i + 192));
    }
    total += _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
  }
  return total;
}

// Runs 12 * `steps` float32 FMAs (kind 0), bf16 dot products (1) or int8 dot products (2) on every thread.
double probe_peak(int kind, int64_t steps) {
  double total = 0;
#pragma omp parallel reduction(+ : total)
  {
    __m512 x = _mm512_set1_ps(1e-3f);
    __m512i y = _mm512_set1_epi8(1);
    asm volatile("" : "+v"(x), "+v"(y));
    if (kind == 0)
      total += _mm512_reduce_add_ps(twelve(steps, _mm512_setzero_ps(), [&](__m512 a) { return _mm512_fmadd_ps(x, x, a); }));
    else if (kind == 1)
      total += _mm512_reduce_add_ps(twelve(
          steps, _mm512_setzero_ps(), [&](__m512 a) { return _mm512_dpbf16_ps(a, (__m512bh)y, (__m512bh)y); }));
    else
      total += _mm512_reduce_add_epi32((__m512i)twelve(
          steps, (__m512i)_mm512_setzero_si512(), [&](__m512i a) { return _mm512_dpbusd_epi32(a, y, y); }));
  }
  return total;
}
}
