// exact, one row on x86: three digits of a fixed-point activation (matmul_quads.h), of which the third is rare.
//
// A bfloat16 within 2^-7 of its segment's largest has two digits, and of normally distributed activations one quad in thirty
// needs a third. So the first two are multiplied everywhere and the third where it is not zero, which changes no sum. A segment
// with many of them (one that an outlier scales) multiplies all three everywhere.
#pragma once

#include <immintrin.h>

#include "matmul_quads.h"

namespace {

constexpr int kRareThird = 5;  // a form of activation: three digits, laid out as RareThird

// One segment of the row: quads of the first two digits, quads of the third, and which of those are not 0. What every block reads
// lies together: [quad][first, second] of all units, [quad] third, [segment] rare; 4 bytes an input in all.
struct RareThird {
  int32_t *two, *third;
  uint32_t *rare;

  RareThird(int32_t *two_words, int32_t *third_words, uint32_t *rare_word)
      : two(two_words), third(third_words), rare(rare_word) {}
  RareThird(const uint8_t *x, const Segment *segments, int64_t count, int64_t s) {
    const int64_t quads = (int64_t{segments[count - 1].unit} + segments[count - 1].units) * kQuads;
    int32_t *const words = reinterpret_cast<int32_t *>(const_cast<uint8_t *>(x));
    two = words + int64_t{segments[s].unit} * kQuads * 2;
    third = words + quads * 2 + int64_t{segments[s].unit} * kQuads;
    rare = reinterpret_cast<uint32_t *>(words + quads * 3) + s;
  }
};

// Quads whose third digit is multiplied one by one: they fit into sums of 16 bits and take less time than all.
constexpr int kMostRare = 8;

// Digits of n inputs; returns the step of the last, a NaN where an input is not finite. One place more than round_to_digits,
// where the largest input is not so close to a power of two that its first digit would be 128.
template <bool WORDS>
inline float round_to_rare_third(const float *f, int n, const RareThird &to) {
  constexpr int places = 22;
  constexpr uint32_t close = 0x1000000 - 0xfefeff;  // 0xfefeff / 2 is rounded to 0x7f7f80
  const uint32_t most = largest_magnitude(f, n);
  const bool finite = most < kInfinity;
  const int power = static_cast<int>((most + close) >> 23);
  const int biased = !finite ? 254 : power <= places ? places + 1 : power;  // below 2^-104 the digits lose places
  const __m256 inverse = _mm256_set1_ps(bits_to_float(static_cast<uint32_t>(254 + places - biased) << 23));
  const __m256 sign = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(0.5f);
  constexpr char z = -128;
  const __m256i pick = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, z, z, z, z));
  const __m256i pick_words = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 9, 10, 5, 6, 13, 14, z, z, z, z, z, z, z, z));
  const __m256i pick_third = _mm256_broadcastsi128_si256(_mm_setr_epi8(z, z, z, z, z, z, z, z, 0, 4, 8, 12, z, z, z, z));
  const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 6, 3, 7), bias = _mm256_set1_epi32(0x808080);
  uint32_t rare = 0;
  for (int q = 0; q < n / 4; q += 2) {
    const __m256 value = _mm256_mul_ps(_mm256_load_ps(f + q * 4), inverse);
    const __m256i number = _mm256_cvttps_epi32(_mm256_add_ps(value, _mm256_or_ps(_mm256_and_ps(value, sign), half)));
    __m256i digits;
    if constexpr (WORDS) {
      const __m256i words = _mm256_shuffle_epi8(_mm256_add_epi32(number, _mm256_set1_epi32(128)), pick_words);
      digits = _mm256_or_si256(words, _mm256_shuffle_epi8(number, pick_third));
    } else {
      digits = _mm256_shuffle_epi8(_mm256_xor_si256(_mm256_add_epi32(number, bias), bias), pick);
    }
    const __m256i zero = _mm256_cmpeq_epi32(digits, _mm256_setzero_si256());
    const auto none = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(zero)));  // bits 2 and 6: the third digits
    rare |= ((~none >> 2 & 1u) | (~none >> 5 & 2u)) << q;
    digits = _mm256_permutevar8x32_epi32(digits, order);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to.two + q * 2), _mm256_castsi256_si128(digits));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to.third + q), _mm256_extracti128_si256(digits, 1));
  }
  *to.rare = rare;
  return finite ? bits_to_float(static_cast<uint32_t>(biased - places) << 23) : __builtin_nanf("");
}

// WORDS: the first two digits as one of 16 bits.
template <bool WORDS>
inline void prepare_rare_third(const Product &p) {
  const Activations x(p, 4);
  const auto factor = static_cast<float>(p.w.header->symmetric ? -p.w.header->zero : -1);
  for (int64_t s = 0; s < x.segments; ++s) {
    const Segment &segment = p.w.segments[s];
    const int n = segment.units * kUnit;
    alignas(64) float f[kSegment];
    load_segment(p, 0, segment, f);
    x.init[s] = factor * sum_of(f, n);
    const RareThird to(x.words, p.w.segments, x.segments, s);
    x.scale[s] = round_to_rare_third<WORDS>(f, n, to);
  }
}

}  // namespace
