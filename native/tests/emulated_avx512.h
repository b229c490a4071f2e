// AVX-512 for a test build on a CPU without it (LGQ_EMULATE_AVX512), included ahead of every *_avx512.cpp and *_avx512_bf16.cpp. Intrinsics
// are SIMDe's; those that SIMDe 0.7.4 lacks are written out here, and one that neither has does not compile. Vectors of
// 64 bytes are GNU C and need no help.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
// With everything inlined into the kernels' unrolled loops, GCC takes minutes for them, and many more with sanitizers.
#define SIMDE_NO_INLINE
#define EMULATED __attribute__((noinline, unused)) static
#define LGQ_INLINE EMULATED
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#error "compiled for AVX-512, nothing to emulate"
#endif
// What the sources ask the compiler; after SIMDe, which asks it as well.
#define __AVX512F__ 1
#if defined(LGQ_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace {
namespace emulated {

struct Floats {
  float at[16];
};
struct Numbers {
  int32_t at[16];
};
struct Halves {
  uint16_t at[16];
};
struct Pairs {
  uint16_t at[32];
};
struct Bytes {
  uint8_t at[16];
};

template <class To, class From>
inline To bits(const From &from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

EMULATED __m512 cvtepi32_ps(__m512i a) {
  const Numbers n = bits<Numbers>(a);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = static_cast<float>(n.at[i]);
  return bits<__m512>(r);
}

EMULATED __m512i cvtepu8_epi32(__m128i a) {
  const Bytes n = bits<Bytes>(a);
  Numbers r;
  for (int i = 0; i < 16; ++i) r.at[i] = n.at[i];
  return bits<__m512i>(r);
}

EMULATED __m512i cvtepu16_epi32(__m256i a) {
  const Halves n = bits<Halves>(a);
  Numbers r;
  for (int i = 0; i < 16; ++i) r.at[i] = n.at[i];
  return bits<__m512i>(r);
}

EMULATED __m256i cvtepi32_epi16(__m512i a) {
  const Numbers n = bits<Numbers>(a);
  Halves r;
  for (int i = 0; i < 16; ++i) r.at[i] = static_cast<uint16_t>(n.at[i]);
  return bits<__m256i>(r);
}

EMULATED __m512i srai_epi32(__m512i a, unsigned places) {
  Numbers r = bits<Numbers>(a);
  for (int32_t &n : r.at) n >>= places < 31 ? places : 31;
  return bits<__m512i>(r);
}

// By halves, as GCC and Clang do it.
EMULATED float reduce_add_ps(__m512 a) {
  Floats sum = bits<Floats>(a);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum.at[i] += sum.at[i + half];
  return sum.at[0];
}

// float16 has AVX2's instructions, by halves.
EMULATED __m512 cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return bits<__m512>(halves);
}

template <int ROUNDING>
EMULATED __m256i cvtps_ph(__m512 a) {
  struct Two {
    __m256 half[2];
  };
  const Two two = bits<Two>(a);
  const __m128i halves[2] = {_mm256_cvtps_ph(two.half[0], ROUNDING), _mm256_cvtps_ph(two.half[1], ROUNDING)};
  return bits<__m256i>(halves);
}

EMULATED void mask_storeu_ps(void *to, uint16_t mask, __m512 a) {
  const Floats f = bits<Floats>(a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<float *>(to) + i, &f.at[i], 4);
}

EMULATED void mask_storeu_epi16(void *to, uint16_t mask, __m256i a) {
  const Halves h = bits<Halves>(a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<uint16_t *>(to) + i, &h.at[i], 2);
}

// The bfloat16 instructions take subnormal numbers for 0 of their sign, and yield none.
inline float flush(float f) { return __builtin_fabsf(f) < 0x1p-126f ? __builtin_copysignf(0.0f, f) : f; }

// Round to nearest even; a NaN stays one.
inline uint16_t cvtness_bh(float f) {
  const uint32_t word = bits<uint32_t>(flush(f));
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(word >> 16 | 0x40u);
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

EMULATED __m256bh cvtneps_pbh(__m512 a) {
  const Floats f = bits<Floats>(a);
  Halves r;
  for (int i = 0; i < 16; ++i) r.at[i] = cvtness_bh(f.at[i]);
  return bits<__m256bh>(r);
}

inline float widen(uint16_t half) { return flush(bits<float>(static_cast<uint32_t>(half) << 16)); }

// SIMDe has it, but adds the two products to each other first.
EMULATED __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const Pairs x = bits<Pairs>(a), y = bits<Pairs>(b);
  Floats r = bits<Floats>(sums);
  for (int i = 0; i < 16; ++i) {
    float sum = flush(r.at[i]);
    for (int odd = 1; odd >= 0; --odd)
      sum = flush(__builtin_fmaf(widen(x.at[2 * i + odd]), widen(y.at[2 * i + odd]), sum));
    r.at[i] = sum;
  }
  return bits<__m512>(r);
}

}  // namespace emulated
}  // namespace

#undef _mm512_dpbf16_ps
#undef _mm512_srai_epi32  // macros where GCC does not optimize
#undef _mm512_cvtps_ph
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
