// exact, one row with AVX2: codes times the digits of a fixed-point activation (matmul_quads.h), the third of three where it is
// not zero (matmul_rare_third.h).
#pragma once

#include "matmul_avx2_row.h"
#include "matmul_rare_third.h"

namespace {

// sum(x (code - zero)) for outputs 8h, 8h + 1, ... from `times` the sums of the higher digits and those of the lower.
LGQ_INLINE void finish_digits(const RowArgs &a, int64_t s, int64_t at, int h, __m256i high, float times, __m256i low) {
  const __m256 start = _mm256_broadcast_ss(a.init + s), step = _mm256_broadcast_ss(a.scale + s);
  const __m256 digits = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(times), _mm256_cvtepi32_ps(low));
  const __m256 below = a.symmetric ? start : _mm256_mul_ps(start, _mm256_cvtepi32_ps(zeros_of(a, at, h)));
  add_segment(a, at, h, _mm256_fmadd_ps(digits, step, below));
}

template <int BITS, int D>
LGQ_INLINE void segment_digits(const RowArgs &a, const Segment &segment, int64_t s, int64_t at, Digits<D> x,
                               const __m256i *third) {
  constexpr int width = D == 2 ? 4 : 2;
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes, *next = codes + segment.units * a.unit_bytes + kRowAhead;
#pragma GCC unroll 1
  for (int h = 0; h < kHalves; h += width) {
    __m256i acc[width][joined(D)];
    pass_digits<BITS, D>(codes + h * 32, segment.units, x, next, acc);
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n)
      finish_digits(a, s, at, h + n, acc[n][0], D == 4 ? 65536.0f : 256.0f, D == 2 ? third[h + n] : acc[n][joined(D) - 1]);
  }
}

// The sums of the third digit of the quads in `rare`, all outputs.
template <int BITS>
LGQ_INLINE void add_rare(const uint8_t *codes, const int32_t *third, uint32_t rare, __m256i *total) {
  __m256i sum[kHalves];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) sum[n] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (; rare != 0; rare &= rare - 1) {
    const int at = __builtin_ctz(rare), quad = at % kQuads;
    const uint8_t *unit = codes + at / kQuads * (kRunBytes * BITS);
    const __m256i digit = broadcast(third + at);
    if (BITS == 3 && quad >= 6) {
      const __m128i shift = _mm_cvtsi32_si128(quad - 2);
#pragma GCC unroll 8
      for (int n = 0; n < kHalves; ++n) {
        const __m256i low = _mm256_and_si256(shift_right<6>(run_at(unit + n * 32, quad - 6)), _mm256_set1_epi8(3));
        const __m256i high = _mm256_and_si256(_mm256_srl_epi32(run_at(unit + n * 32, 2), shift), _mm256_set1_epi8(4));
        add_bytes(_mm256_or_si256(low, high), digit, sum[n]);
      }
    } else {
      constexpr int fields = 8 / BITS;  // in a byte
      const __m128i shift = _mm_cvtsi32_si128(quad % fields * BITS);
      const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
#pragma GCC unroll 8
      for (int n = 0; n < kHalves; ++n) {
        const __m256i run = _mm256_srl_epi32(run_at(unit + n * 32, quad / fields), shift);
        add_bytes(_mm256_and_si256(run, mask), digit, sum[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) total[n] = widened(sum[n]);
}

template <int BITS>
LGQ_INLINE void segment_rare_third(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  const RareThird x(a.x, a.segments, a.count, s);
  const uint32_t rare = *x.rare;
  if (__builtin_popcount(rare) > kMostRare)
    return segment_digits<BITS, 3>(a, segment, s, at, {x.two, x.third}, nullptr);
  __m256i third[kHalves];
  add_rare<BITS>(a.codes + segment.unit * a.unit_bytes, x.third, rare, third);
  segment_digits<BITS, 2>(a, segment, s, at, {x.two, x.third}, third);
}

// 8-bit codes: the first two digits as one of 16 bits, in sums of 32 bits.
LGQ_INLINE void segment_words(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  const RareThird x(a.x, a.segments, a.count, s);
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const int32_t *words = x.two;
  __m256i sum[kHalves];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) sum[n] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int q = 0; q < segment.units * kQuads; ++q, codes += kRunBytes, words += 2) {
    fetch_lines(codes + kRowAhead, kRunBytes / 64);
    add_products(codes, {broadcast(words), broadcast(words + 1)}, sum);
  }
  __m256i third[kHalves];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) third[n] = _mm256_setzero_si256();
  codes = a.codes + segment.unit * a.unit_bytes;
#pragma GCC unroll 1
  for (uint32_t rare = *x.rare; rare != 0; rare &= rare - 1) {
    const int q = __builtin_ctz(rare);
    add_products(codes + q * kRunBytes, byte_pairs(broadcast(x.third + q)), third);
  }
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) finish_digits(a, s, at, n, sum[n], 256.0f, third[n]);
}

template <int BITS>
LGQ_INLINE void segment_four_digits(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads * 4;
  segment_digits<BITS, 4>(a, segment, s, at, {x, nullptr}, nullptr);
}

// The next segment's activations: codes have passed through the cache since they were read.
template <int T>
LGQ_INLINE void fetch_x(const RowArgs &a, const Segment &segment) {
  constexpr int bytes = T == kInt8 ? 1 : T == kRareThird ? 2 : 4;  // of an input
  fetch_lines(a.x + int64_t{segment.unit + segment.units} * kUnit * bytes, kSegment * bytes / 64);
}

// One block of outputs for the only row.
template <int BITS, int T>
void row_avx2(const RowArgs &a) {
  std::memset(a.totals, 0, kBlock * sizeof(float));
  for (int64_t s = 0; s < a.count; ++s) {
    const Segment &segment = a.segments[s];
    const int64_t at = int64_t{segment.group} * kBlock;
    fetch_grid(a, at);
    fetch_x<T>(a, segment);
    if constexpr (T == kInt8 && BITS == 3)
      segment_int8_of_3(a, segment, s, at);
    else if constexpr (T == kInt8)
      segment_int8<BITS>(a, segment, s, at);
    else if constexpr (T == kFloat)
      segment_floats(a, segment, s, at);
    else if constexpr (T == kRareThird && BITS == 8)
      segment_words(a, segment, s, at);
    else if constexpr (T == kRareThird)
      segment_rare_third<BITS>(a, segment, s, at);
    else
      segment_four_digits<BITS>(a, segment, s, at);
  }
}

}  // namespace
