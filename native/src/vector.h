// Vectors for attention and gates: what memory holds as floats and back, sums of lanes, the exponential.
//
// Included by one translation unit per instruction set, so everything here has internal linkage: the same code compiled
// with other flags must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef int32_t ivec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t uvec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef float quad __attribute__((vector_size(4 * sizeof(float))));
#if defined(__AVX2__)
typedef float octet __attribute__((vector_size(8 * sizeof(float))));
#endif

// kLanes floats of an aligned row.
LGQ_INLINE vec &at(float *p) { return *reinterpret_cast<vec *>(p); }

LGQ_INLINE vec select(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

template <class Part>
LGQ_INLINE Part fold(const vec &v) {
  Part parts[sizeof(vec) / sizeof(Part)], sum;
  std::memcpy(parts, &v, sizeof v);
  sum = parts[0];
  for (size_t i = 1; i < sizeof(vec) / sizeof(Part); ++i) sum += parts[i];
  return sum;
}

LGQ_INLINE float total(vec v) {
  const quad sum = fold<quad>(v);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The totals of four vectors, all at once: a sum over lanes takes longer than the products in them.
LGQ_INLINE quad totals(const vec (&v)[4]) {
#if defined(__AVX2__)
  const octet a = fold<octet>(v[0]), b = fold<octet>(v[1]), c = fold<octet>(v[2]), d = fold<octet>(v[3]);
  const octet ab = (octet)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (octet)_mm256_unpackhi_ps((__m256)a, (__m256)b);
  const octet cd = (octet)_mm256_unpacklo_ps((__m256)c, (__m256)d) + (octet)_mm256_unpackhi_ps((__m256)c, (__m256)d);
  const octet both =
      (octet)_mm256_shuffle_ps((__m256)ab, (__m256)cd, 0x44) + (octet)_mm256_shuffle_ps((__m256)ab, (__m256)cd, 0xee);
  return (quad)_mm256_castps256_ps128((__m256)both) + (quad)_mm256_extractf128_ps((__m256)both, 1);
#elif defined(__SSE2__)
  const quad ab = (quad)_mm_unpacklo_ps((__m128)v[0], (__m128)v[1]) + (quad)_mm_unpackhi_ps((__m128)v[0], (__m128)v[1]);
  const quad cd = (quad)_mm_unpacklo_ps((__m128)v[2], (__m128)v[3]) + (quad)_mm_unpackhi_ps((__m128)v[2], (__m128)v[3]);
  return (quad)_mm_movelh_ps((__m128)ab, (__m128)cd) + (quad)_mm_movehl_ps((__m128)cd, (__m128)ab);
#elif defined(__aarch64__)
  const float32x4_t ab = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  return (quad)vpaddq_f32(ab, vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]));
#else
  return quad{total(v[0]), total(v[1]), total(v[2]), total(v[3])};
#endif
}

// e^x for x <= 0 within two units in the last place, 0 where that is below the normal numbers; a NaN stays one.
LGQ_INLINE vec exponential(vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
  const vec z = x * 1.44269504f + kShift, n = z - kShift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vec power = (vec)(((uvec)z << 23) + 0x3f800000u);
  return select(x < -87.0f, vec{}, p * power);
}

// Each format: kLanes elements as floats and back, and one of them.
struct F32 {
  using Type = float;
  LGQ_INLINE float load_one(float f) { return f; }
  LGQ_INLINE float round_one(float f) { return f; }
  LGQ_INLINE vec load(const float *p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  LGQ_INLINE void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
};

struct Bf16 {
  using Type = uint16_t;
  LGQ_INLINE float load_one(uint16_t b) { return lgq::bf16_to_float(b); }
  LGQ_INLINE uint16_t round_one(float f) { return lgq::float_to_bf16(f); }
  // GCC 12 takes __builtin_convertvector apart.
  LGQ_INLINE vec load(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vec)((uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))) << 16);
#elif defined(__AVX2__)
    return (vec)((uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))) << 16);
#elif defined(__SSE2__)
    return (vec)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    halves h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
  }
  // As float_to_bf16.
  LGQ_INLINE void store(uint16_t *p, vec v) {
    const uvec bits = (uvec)v, nan = (uvec)(v != v);
    const ivec kept = (ivec)((nan & (bits | 0x400000u)) | (~nan & (bits + ((bits >> 16 & 1u) + 0x7fffu)))) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16((__m512i)kept));
#elif defined(__AVX2__)
    const __m256i twice = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)kept, (__m256i)kept), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(twice));
#elif defined(__SSE2__)
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi32((__m128i)kept, (__m128i)kept));
#else
    const halves h = __builtin_convertvector(kept, halves);
    std::memcpy(p, &h, sizeof h);
#endif
  }
};

struct Half {
  using Type = uint16_t;
  LGQ_INLINE float load_one(uint16_t h) { return lgq::half_to_float(h); }
  LGQ_INLINE uint16_t round_one(float f) { return lgq::float_to_half(f); }
  LGQ_INLINE vec load(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else  // as half_to_float
    halves h;
    std::memcpy(&h, p, sizeof h);
    const uvec bits = __builtin_convertvector(h, uvec), rest = bits & 0x7fffu;
    const vec magnitude = (vec)(rest << 13) * 0x1p112f, special = (vec)(rest << 13 | 0x7f800000u);
    return (vec)((uvec)select((ivec)rest > 0x7bff, special, magnitude) | (bits & 0x8000u) << 16);
#endif
  }
  LGQ_INLINE void store(uint16_t *p, vec v) {
#if defined(__F16C__)
    for (int i = 0; i < kLanes; i += 8) {
      octet part;
      std::memcpy(&part, reinterpret_cast<const char *>(&v) + i * sizeof(float), sizeof part);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(p + i), _mm256_cvtps_ph((__m256)part, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__aarch64__)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = round_one(v[i]);
#endif
  }
};

}  // namespace
