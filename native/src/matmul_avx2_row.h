// One row with AVX2: memory is the limit where codes take few enough instructions, so nothing may wait for memory meanwhile.
//
// Loops go round once a run of codes (3 bits: a unit). Unrolled over a unit, every load has an instruction of its own and a
// stride of 1 or 2 KiB, and memory delivers 0.65 to 0.75 of its bandwidth instead of 0.9 (Zen 3, 4 and 8 bits), whatever is
// fetched ahead.
//
// Codes are loaded once, in the order in which they lie where the sums of a block fit into registers (int8 but 3 bits, and
// 8 bits). Elsewhere a pass takes two or four registers of outputs through a whole segment, so that their sums stay in
// registers; it reads every other or fourth line, and fetches lines in their order meanwhile, a segment ahead.
#pragma once

#include "matmul_avx2_codes.h"

namespace {

// Codes are fetched this many bytes ahead of where they are read.
constexpr int kRowAhead = 1536;  // 1 KiB and 3 KiB reach 0.02 to 0.1 less of the bandwidth
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

// D digits of a quad: one (int8), two, two and a third that lies apart, or four.
template <int D>
struct Digits {
  static constexpr int kNear = D == 3 ? 2 : D;
  const int32_t *x, *third;

  __m256i operator()(int quad, int d) const {
    return broadcast(D == 3 && d == 2 ? third + quad : x + quad * kNear + d);
  }
  Digits again() const { return {repeated(x), D == 3 ? repeated(third) : third}; }
  void skip(int quads) {
    x += quads * kNear;
    if (D == 3) third += quads;
  }
};

// One quad for two registers of outputs.
template <int D>
LGQ_INLINE void add_quad(__m256i a, __m256i b, const Digits<D> &x, int quad, __m256i *sum) {
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) {
    const __m256i digit = x(quad, d);
    add_bytes(a, digit, sum[d]);
    add_bytes(b, digit, sum[D + d]);
  }
}

// One run of 2 or 4 bits for W registers of outputs, two at a time.
template <int BITS, int D, int W>
LGQ_INLINE void add_run_digits(const uint8_t *codes, Digits<D> x, __m256i (&sum)[W][D]) {
#pragma GCC unroll 4
  for (int n = 0; n < W; n += 2) {
    if (n > 0) x = x.again();
    const __m256i a = loaded(codes + n * 32), b = loaded(codes + n * 32 + 32);
    add_quad<D>(quad_of_run<BITS, 0>(a), quad_of_run<BITS, 0>(b), x, 0, sum[n]);
    add_quad<D>(quad_of_run<BITS, 1>(a), quad_of_run<BITS, 1>(b), x, 1, sum[n]);
    if constexpr (BITS == 2) {
      add_quad<D>(quad_of_run<BITS, 2>(a), quad_of_run<BITS, 2>(b), x, 2, sum[n]);
      add_quad<D>(quad_of_run<BITS, 3>(a), quad_of_run<BITS, 3>(b), x, 3, sum[n]);
    }
  }
}

// One unit of 3 bits for W registers of outputs, two at a time.
template <int D, int W>
LGQ_INLINE void add_unit_of_3_digits(const uint8_t *codes, Digits<D> x, __m256i (&sums)[W][D]) {
#pragma GCC unroll 2
  for (int n = 0; n < W; n += 2) {
    __m256i *sum = sums[n];
    const uint8_t *half = codes + n * 32;
    if (n > 0) x = x.again();
    const __m256i a = loaded(half), b = loaded(half + 32);
    const __m256i high_a = loaded(half + 2 * kRunBytes), high_b = loaded(half + 2 * kRunBytes + 32);
    add_quad<D>(quad_of_run<3, 0>(a), quad_of_run<3, 0>(b), x, 0, sum);
    add_quad<D>(quad_of_run<3, 1>(a), quad_of_run<3, 1>(b), x, 1, sum);
    add_quad<D>(split_quad<6>(a, high_a), split_quad<6>(b, high_b), x, 6, sum);
    const __m256i c = loaded(half + kRunBytes), d = loaded(half + kRunBytes + 32);
    add_quad<D>(quad_of_run<3, 0>(c), quad_of_run<3, 0>(d), x, 2, sum);
    add_quad<D>(quad_of_run<3, 1>(c), quad_of_run<3, 1>(d), x, 3, sum);
    add_quad<D>(split_quad<7>(c, high_a), split_quad<7>(d, high_b), x, 7, sum);
    add_quad<D>(quad_of_run<3, 0>(high_a), quad_of_run<3, 0>(high_b), x, 4, sum);
    add_quad<D>(quad_of_run<3, 1>(high_a), quad_of_run<3, 1>(high_b), x, 5, sum);
  }
}

template <int N, int D>
LGQ_INLINE void clear(__m256i (&sum)[N][D]) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) sum[n][d] = _mm256_setzero_si256();
}

// Sums of two digits are joined, 256 times the first and the second.
constexpr int joined(int digits) { return (digits + 1) / 2; }

template <int D>
LGQ_INLINE void add_widened(const __m256i (&sum)[D], __m256i *acc) {
  const __m256i high = _mm256_set1_epi16(256);
#pragma GCC unroll 2
  for (int d = 0; d < D; d += 2) {
    if (d + 1 < D) acc[d / 2] = _mm256_add_epi32(acc[d / 2], _mm256_madd_epi16(sum[d], high));
    acc[d / 2] = _mm256_add_epi32(acc[d / 2], widened(sum[d + 1 < D ? d + 1 : d]));
  }
}

// A pass through one segment. `next`: what is fetched meanwhile, one line for each two registers.
template <int BITS, int D, int W>
LGQ_INLINE void pass_digits(const uint8_t *codes, int units, Digits<D> x, const uint8_t *&next, __m256i (&acc)[W][joined(D)]) {
  constexpr int several = kUnitsIn16<BITS>, runs = BITS == 3 ? 3 : 1;
  clear(acc);
  for (int u = 0; u < units; u += several) {
    const uint8_t *end = codes + (units - u < several ? units - u : several) * (kRunBytes * BITS);
    __m256i sum[W][D];
    clear(sum);
#pragma GCC unroll 1
    for (; codes != end; codes += runs * kRunBytes, next += runs * W * 32) {
      fetch_lines(next, runs * W / 2);
      if constexpr (BITS == 3)
        add_unit_of_3_digits(codes, x, sum);
      else
        add_run_digits<BITS>(codes, x, sum);
      x.skip(kQuads * runs / BITS);
    }
#pragma GCC unroll 4
    for (int n = 0; n < W; ++n) add_widened(sum[n], acc[n]);
  }
}

// One run of 8-bit codes in sums of 32 bits.
LGQ_INLINE void add_products(const uint8_t *codes, const BytePairs &x, __m256i (&sum)[kHalves]) {
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n) {
    sum[n] = _mm256_add_epi32(sum[n], products_of_bytes(run_at(codes + n * 32, 0), x));
    keep(sum[n]);
  }
}

// int8, one run of 2, 4 or 8 bits: sums of 16 bits, at 8 bits of 32.
template <int BITS>
LGQ_INLINE void add_run(const uint8_t *codes, const int32_t *x, __m256i (&sum)[kHalves]) {
  fetch_lines(codes + kRowAhead, kRunBytes / 64);
  if constexpr (BITS == 8) {
    add_products(codes, byte_pairs(broadcast(x)), sum);
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

template <int BITS>
LGQ_INLINE void add_units(const uint8_t *codes, const int32_t *x, int units, __m256i (&sum)[kHalves]) {
  const uint8_t *end = codes + units * (kRunBytes * BITS);
#pragma GCC unroll 1
  for (; codes != end; codes += kRunBytes, x += kQuads / BITS) add_run<BITS>(codes, x, sum);
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

// int8, 3-bit codes, of which a unit is what repeats: in two passes.
LGQ_INLINE void segment_int8_of_3(const RowArgs &a, const Segment &segment, int64_t s, int64_t at) {
  constexpr int width = 4;
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes, *next = codes + segment.units * a.unit_bytes + kRowAhead;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads;
  const __m256i start = _mm256_set1_epi32(reinterpret_cast<const int32_t *>(a.init)[s]);
  const __m256 step = _mm256_broadcast_ss(a.scale + s);
#pragma GCC unroll 1
  for (int h = 0; h < kHalves; h += width) {
    __m256i acc[width][1];
    pass_digits<3, 1>(codes + h * 32, segment.units, Digits<1>{x, nullptr}, next, acc);
#pragma GCC unroll 4
    for (int n = 0; n < width; ++n) {
      const __m256i below = a.symmetric ? start : _mm256_mullo_epi32(zeros_of(a, at, h + n), start);
      add_segment(a, at, h + n, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(acc[n][0], below)), step));
    }
  }
}

// exact, float32 activations, 8-bit codes: spread to 32-bit lanes, converted and multiplied as float32. Memory hides it.
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
