// One row with AVX2: memory is the limit where codes take few enough instructions, so nothing may wait for memory meanwhile.
//
// Loops go round once a run of codes: unrolled over a unit, every load has an instruction of its own and a stride of 2 KiB, and
// memory delivers 0.70 of its bandwidth instead of 0.9 (Zen 3, 4 and 8 bits), whatever is fetched ahead. Codes are loaded once,
// in the order in which they lie where the sums of a block fit into registers (int8, 8 bits).
#pragma once

#include "matmul_avx2_codes.h"

namespace {

// Codes are fetched this many bytes ahead of where they are read.
constexpr int kRowAhead = 2048;
// Segments between a row of scales that is fetched and the one in use.
constexpr int kScalesAhead = 8;

LGQ_INLINE void fetch_lines(const uint8_t *at, int lines) {
#pragma GCC unroll 12
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char *>(at + i * 64), _MM_HINT_T0);
}

LGQ_INLINE void fetch_grid(const RowArgs &a, int64_t at) {
  const int64_t ahead = at + kScalesAhead * kBlock;
  fetch_lines(reinterpret_cast<const uint8_t *>(a.scales + ahead), 2);
  if (!a.symmetric) fetch_lines(a.zeros + ahead, 1);
}

// sum += scale * (the sum of one segment) for outputs 8h, 8h + 1, ...; `at`: the segment's row of scales and zeros.
LGQ_INLINE void add_segment(const RowArgs &a, int64_t at, int h, __m256 sum) {
  const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(a.scales + at) + h));
  float *total = a.totals + h * 8;
  _mm256_store_ps(total, _mm256_fmadd_ps(sum, scale, _mm256_load_ps(total)));
}

LGQ_INLINE __m256i zeros_of(const RowArgs &a, int64_t at, int h) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(a.zeros + at + h * 8)));
}

// int8, one run of 2, 4 or 8 bits: sums of 16 bits, at 8 bits of 32.
template <int BITS>
LGQ_INLINE void add_run(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves]) {
  fetch_lines(codes + kRowAhead, kRunBytes / 64);
  if constexpr (BITS == 8) {
    const BytePairs pairs = byte_pairs(broadcast(x));
#pragma GCC unroll 8
    for (int n = 0; n < kHalves; ++n) {
      sum[n] = _mm256_add_epi32(sum[n], products_of_bytes(run_at(codes + n * 32, 0), pairs));
      keep(sum[n]);
    }
  } else {
#pragma GCC unroll 8
    for (int n = 0; n < kHalves; ++n) {
      const __m256i run = loaded(codes + n * 32);
      add_bytes(quad_of_run<BITS, 0>(run), broadcast(x), sum[n]);
      add_bytes(quad_of_run<BITS, 1>(run), broadcast(x + 1), sum[n]);
      if constexpr (BITS == 2) {
        add_bytes(quad_of_run<BITS, 2>(run), broadcast(x + 2), sum[n]);
        add_bytes(quad_of_run<BITS, 3>(run), broadcast(x + 3), sum[n]);
      }
    }
  }
}

// int8, one unit of 3 bits.
LGQ_INLINE void add_unit_of_3(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves]) {
  fetch_lines(codes + kRowAhead, 3 * kRunBytes / 64);
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) {
    const uint8_t *half = codes + n * 32;
    const __m256i a = loaded(half), b = loaded(half + kRunBytes), c = loaded(half + 2 * kRunBytes);
    add_bytes(quad_of_run<3, 0>(a), broadcast(x), sum[n]);
    add_bytes(quad_of_run<3, 1>(a), broadcast(x + 1), sum[n]);
    add_bytes(quad_of_run<3, 0>(b), broadcast(x + 2), sum[n]);
    add_bytes(quad_of_run<3, 1>(b), broadcast(x + 3), sum[n]);
    add_bytes(quad_of_run<3, 0>(c), broadcast(x + 4), sum[n]);
    add_bytes(quad_of_run<3, 1>(c), broadcast(x + 5), sum[n]);
    add_bytes(split_quad<6>(a, c), broadcast(x + 6), sum[n]);
    add_bytes(split_quad<7>(b, c), broadcast(x + 7), sum[n]);
  }
}

template <int BITS>
LGQ_INLINE void add_units(const uint8_t *codes, const int32_t *x, int units, __m256i (&sum)[kHalves]) {
  constexpr int step = BITS == 3 ? 3 * kRunBytes : kRunBytes, quads = BITS == 3 ? kQuads : kQuads / BITS;
  const uint8_t *end = codes + units * (kRunBytes * BITS);
#pragma GCC unroll 1
  for (; codes != end; codes += step, x += quads) {
    if constexpr (BITS == 3)
      add_unit_of_3(codes, x, sum);
    else
      add_run<BITS>(codes, x, sum);
  }
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
  if constexpr (BITS == 8) {
    add_units<BITS>(codes, x, segment.units, acc);
  } else {
    for (int u = 0; u < segment.units; u += several) {
      __m256i sum[kHalves];
#pragma GCC unroll 8
      for (int n = 0; n < kHalves; ++n) sum[n] = _mm256_setzero_si256();
      const int units = segment.units - u < several ? segment.units - u : several;
      add_units<BITS>(codes + u * (kRunBytes * BITS), x + u * kQuads, units, sum);
#pragma GCC unroll 8
      for (int n = 0; n < kHalves; ++n) acc[n] = _mm256_add_epi32(acc[n], widened(sum[n]));
    }
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
    fetch_lines(codes + kRowAhead, kRunBytes / 64);
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

}  // namespace
