// One row with AVX2: memory would be the limit if codes took fewer instructions, so nothing may wait for memory meanwhile.
//
// Codes are fetched ahead in the order in which they lie. Without that the exact kernels reach 0.70 (4 bits), 0.59 (3) and 0.70 (2)
// of the bandwidth instead of 0.91, 0.72 and 0.84 (Zen 3, 4 KiB pages), and int8 0.73 instead of 0.84 at 3 bits, 0.63
// instead of 0.78 at 2. Reading a segment in four strided passes costs more than it saves instructions (0.37 at 4 bits).
//
// digits: the sums of 16 bits for two registers of outputs and three or four digits fill the registers; those of 32 bits stay
// in memory.
#pragma once

#include "matmul_avx2_codes.h"

namespace {

// sum += scale * (the sum of one segment) for outputs 8h, 8h + 1, ...; `at`: the segment's row of scales and zeros.
LGQ_INLINE void add_segment(const RowArgs &a, int64_t at, int h, __m256 sum) {
  const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(a.scales + at) + h));
  float *total = a.totals + h * 8;
  _mm256_store_ps(total, _mm256_fmadd_ps(sum, scale, _mm256_load_ps(total)));
}

LGQ_INLINE __m256i zeros_of(const RowArgs &a, int64_t at, int h) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(a.zeros + at + h * 8)));
}

template <int BITS, int D, int Q>
LGQ_INLINE void quad_digits(const uint8_t *codes, const int32_t *x, __m256i (&sum)[2][D]) {
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n) {
    const __m256i bytes = quad_bytes<BITS, Q>(codes + n * 32);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      sum[n][d] = _mm256_add_epi16(sum[n][d], _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(x[Q * D + d])));
      keep(sum[n][d]);
    }
  }
}

template <int BITS, int D, int... Q>
LGQ_INLINE void unit_digits(const uint8_t *codes, const int32_t *x, __m256i (&sum)[2][D],
                            std::integer_sequence<int, Q...>) {
  (quad_digits<BITS, D, Q>(codes, x, sum), ...);
}

// One unit and two registers of outputs.
template <int BITS, int D>
LGQ_INLINE void pair_digits(const uint8_t *codes, const int32_t *x, __m256i (*acc)[D]) {
  __m256i sum[2][D];
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) sum[n][d] = _mm256_setzero_si256();
  unit_digits<BITS>(codes, x, sum, std::make_integer_sequence<int, kQuads>());
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[n][d] = _mm256_add_epi32(acc[n][d], widened(sum[n][d]));
}

// sum(x (code - zero)) from the digits' sums.
template <int D>
LGQ_INLINE void finish_digits(const RowArgs &a, int64_t s, int64_t at, const __m256i (&acc)[kHalves][D]) {
  const __m256 start = _mm256_broadcast_ss(a.init + s), step = _mm256_broadcast_ss(a.scale + s);
  for (int n = 0; n < kHalves; ++n) {
    __m256 digits = _mm256_cvtepi32_ps(acc[n][0]);
#pragma GCC unroll 3
    for (int d = 1; d < D; ++d)
      digits = _mm256_fmadd_ps(digits, _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(acc[n][d]));
    const __m256 below = a.symmetric ? start : _mm256_mul_ps(start, _mm256_cvtepi32_ps(zeros_of(a, at, n)));
    add_segment(a, at, n, _mm256_fmadd_ps(digits, step, below));
  }
}

template <int BITS, int D>
LGQ_INLINE void segment_digits(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads * D;
  __m256i acc[kHalves][D];
  for (int n = 0; n < kHalves; ++n)
    for (int d = 0; d < D; ++d) acc[n][d] = _mm256_setzero_si256();
  for (int u = 0; u < segment.units; ++u) {
    for (int h = 0; h < kHalves; h += 2) {
      fetch_ahead(codes + h * BITS * 32, BITS);
      pair_digits<BITS, D>(codes + h * 32, x, acc + h);
    }
    codes += kRunBytes * BITS;
    x += kQuads * D;
  }
  finish_digits(a, s, at, acc);
}

// int8, narrow codes: sums of 16 bits.
template <int BITS, int Q>
LGQ_INLINE void quad_narrow_row(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves]) {
  const __m256i xq = _mm256_set1_epi32(x[Q]);
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) {
    sum[n] = _mm256_add_epi16(sum[n], _mm256_maddubs_epi16(quad_bytes<BITS, Q>(codes + n * 32), xq));
    keep(sum[n]);
  }
}

// int8, 8-bit codes: sums of 32 bits.
template <int Q>
LGQ_INLINE void quad_wide_row(const uint8_t *codes, const int32_t *x, __m256i (&acc)[kHalves]) {
  const BytePairs pairs = byte_pairs(_mm256_set1_epi32(x[Q]));
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) {
    acc[n] = _mm256_add_epi32(acc[n], products_of_bytes(run_at(codes + n * 32, Q), pairs));
    keep(acc[n]);
  }
}

template <int BITS, int Q>
LGQ_INLINE void quad_row(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves]) {
  // Reads of wider codes run far enough ahead by themselves.
  constexpr bool fetches = BITS < 4 && !quad_is_split(BITS, Q) && quad_shift(BITS, Q) == 0;
  if constexpr (fetches) fetch_ahead(codes + quad_run(BITS, Q) * kRunBytes, 4);
  if constexpr (BITS == 8)
    quad_wide_row<Q>(codes, x, sum);
  else
    quad_narrow_row<BITS, Q>(codes, x, sum);
}

template <int BITS, int... Q>
LGQ_INLINE void unit_row(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves],
                         std::integer_sequence<int, Q...>) {
  (quad_row<BITS, Q>(codes, x, sum), ...);
}

template <int BITS>
LGQ_INLINE void segment_int8(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  constexpr int several = kUnitsIn16<BITS>;
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads;
  const __m256i start = _mm256_set1_epi32(reinterpret_cast<const int32_t *>(a.init)[s]);
  __m256i acc[kHalves];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) acc[n] = a.symmetric ? start : _mm256_mullo_epi32(zeros_of(a, at, n), start);
  for (int u = 0; u < segment.units;) {
    const int end = segment.units - u < several ? segment.units : u + several;
    __m256i sum[kHalves];
#pragma GCC unroll 8
    for (int n = 0; n < kHalves; ++n) sum[n] = BITS == 8 ? acc[n] : _mm256_setzero_si256();
    do {
      unit_row<BITS>(codes, x, sum, std::make_integer_sequence<int, kQuads>());
      codes += kRunBytes * BITS;
      x += kQuads;
    } while (++u < end);
#pragma GCC unroll 8
    for (int n = 0; n < kHalves; ++n) acc[n] = BITS == 8 ? sum[n] : _mm256_add_epi32(acc[n], widened(sum[n]));
  }
  const __m256 step = _mm256_broadcast_ss(a.scale + s);
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) add_segment(a, at, n, _mm256_mul_ps(_mm256_cvtepi32_ps(acc[n]), step));
}

// exact, 8-bit codes: spread to 32-bit lanes, converted and multiplied as float32. Memory hides it.
template <int J>
LGQ_INLINE __m256 byte_product(__m256i bytes, const float *x, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_of_lanes<J>(bytes)), _mm256_broadcast_ss(x + J), sum);
}

LGQ_INLINE void segment_floats(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const float *x = reinterpret_cast<const float *>(a.x) + int64_t{segment.unit} * kUnit;
  const __m256 start = _mm256_broadcast_ss(a.init + s);
  __m256 acc[kHalves];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n)
    acc[n] = a.symmetric ? start : _mm256_mul_ps(start, _mm256_cvtepi32_ps(zeros_of(a, at, n)));
  for (int q = 0; q < segment.units * kQuads; ++q, codes += kRunBytes, x += 4) {
#pragma GCC unroll 8
    for (int n = 0; n < kHalves; ++n) {
      const __m256i bytes = run_at(codes + n * 32, 0);
      acc[n] = byte_product<1>(bytes, x, byte_product<0>(bytes, x, acc[n]));
      acc[n] = byte_product<3>(bytes, x, byte_product<2>(bytes, x, acc[n]));
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) add_segment(a, at, n, acc[n]);
}

// One block of outputs for the only row.
template <int BITS, int T>
void row_avx2(const RowArgs &a) {
  std::memset(a.totals, 0, kBlock * sizeof(float));
  for (int64_t s = 0; s < a.count; ++s) {
    const Segment &segment = a.segments[s];
    const int64_t at = int64_t{segment.group} * kBlock;
    if constexpr (T == kInt8)
      segment_int8<BITS>(a, segment, s, at);
    else if constexpr (T == kFloat)
      segment_floats(a, segment, s, at);
    else
      segment_digits<BITS, digits_of(T)>(a, segment, s, at);
  }
}

}  // namespace
