// One row with AVX-512: memory is the limit, so every instruction for each code counts, and what is done once a segment
// counts too: the loop over segments is here, with the totals in registers.
//
// Memory delivers its bandwidth to loops of one run (3 bits: a unit) that load every line once and in its order. Unrolled
// over a unit, with a load for each quad, or with one run out of order, it is 0.5 to 0.8 of that. What else is fetched by hand
// was measured: on Zen 4 only 8-bit codes in int8, 2 KiB ahead (fetching others loses 5 to 40 %), and activations where fetch_x
// says so; on Emerald Rapids (FETCH) every line twice and the scales, or 4 bits reach 0.84 instead of 1.00 of a bare read.
//
// int8: a field is masked where it lies, not shifted: code * 2^shift is still an unsigned byte for the integer dot
// product. Each shift has sums of its own, whole multiples of 2^shift, that are shifted back once a segment.
// digits: a float32 as four of them (matmul_quads.h), a bfloat16 or float16 as two and seldom a third (matmul_rare_third.h);
// their sums would take too many registers for each shift, and an unpacked code serves all of them.
#pragma once

#include "matmul_avx512_codes.h"

namespace {

LGQ_INLINE void load_run(const uint8_t *codes, __m512i (&run)[kVectorsPerBlock]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    run[v] = run_at(codes + v * 64, 0);
    keep(run[v]);
  }
}

constexpr int kScalesAhead = 4;  // segments

// The lines of a run that follows `codes`, into the second-level cache and, with FETCH, later into the first.
template <bool FETCH>
LGQ_INLINE void fetch_run(const uint8_t *codes) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    if (FETCH)
      fetch_stream(codes + v * 64);
    else
      _mm_prefetch(reinterpret_cast<const char *>(codes + v * 64 + kStreamNear), _MM_HINT_T1);
  }
}

// Fields of a byte: which bits, and how far above their place in the code they lie.
struct Field {
  int mask, shift;
};

template <int BITS>
constexpr int kFields = BITS == 3 ? 5 : 8 / BITS;

// Runs that a loop takes at a time: no field of one lies in another but at 3 bits.
template <int BITS>
constexpr int kRepeated = BITS == 3 ? 3 : 1;

constexpr Field field_of(int bits, int f) {
  constexpr Field three[] = {{0x07, 0}, {0x38, 3}, {0xC0, 6}, {0x40, 4}, {0x80, 5}};
  return bits == 3 ? three[f] : Field{((1 << bits) - 1) << bits * f, bits * f};
}

// The quad that a run's field belongs to, or -1: the run has no such field.
constexpr int field_quad(int bits, int run, int f) {
  if (bits != 3) return run * (8 / bits) + f;
  if (f < 2) return 2 * run + f;
  if (run < 2) return f == 2 ? 6 + run : -1;
  return f == 2 ? -1 : 3 + f;
}

template <int BITS, int RUN, int F>
LGQ_INLINE void field_int8(const __m512i (&run)[kVectorsPerBlock], const int32_t *x,
                           __m512i (&acc)[kVectorsPerBlock][kFields<BITS>]) {
  constexpr int quad = field_quad(BITS, RUN, F);
  if constexpr (quad >= 0) {
    const __m512i xq = _mm512_set1_epi32(x[quad]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      const __m512i codes =
          BITS == 8 ? run[v] : _mm512_and_si512(run[v], _mm512_set1_epi8(static_cast<char>(field_of(BITS, F).mask)));
      acc[v][F] = _mm512_dpbusd_epi32(acc[v][F], codes, xq);
      keep(acc[v][F]);
    }
  }
}

template <int BITS, bool FETCH, int RUN, int... F>
LGQ_INLINE void run_int8(const uint8_t *codes, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][kFields<BITS>],
                         std::integer_sequence<int, F...>) {
  __m512i run[kVectorsPerBlock];
  load_run(codes + RUN * kRunBytes, run);
  if constexpr (FETCH || BITS == 8) fetch_run<FETCH>(codes + RUN * kRunBytes);
  (field_int8<BITS, RUN, F>(run, x, acc), ...);
}

// What repeats: one run, at 3 bits the three of a unit.
template <int BITS, bool FETCH, int... RUN>
LGQ_INLINE void runs_int8(const uint8_t *codes, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][kFields<BITS>],
                          std::integer_sequence<int, RUN...>) {
  (run_int8<BITS, FETCH, RUN>(codes, x, acc, std::make_integer_sequence<int, kFields<BITS>>()), ...);
}

template <int BITS, int... F>
LGQ_INLINE __m512i sum_fields(const __m512i (&acc)[kFields<BITS>], std::integer_sequence<int, F...>) {
  __m512i sum = acc[0];
  ((F > 0 ? void(sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[F], field_of(BITS, F).shift))) : void()), ...);
  return sum;
}

// sum(code * x) of one segment for every output of the block, less what the zero takes off, as a float.
template <int BITS, bool FETCH>
LGQ_INLINE void row_segment_int8(const RowArgs &a, const Segment &segment, int64_t s, const uint8_t *zeros,
                                 __m512 (&sums)[kVectorsPerBlock]) {
  __m512i acc[kVectorsPerBlock][kFields<BITS>];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 5
    for (int f = 0; f < kFields<BITS>; ++f) acc[v][f] = _mm512_setzero_si512();
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads;
  const uint8_t *end = codes + segment.units * a.unit_bytes;
#pragma GCC unroll 1
  for (; codes != end; codes += kRepeated<BITS> * kRunBytes, x += kQuads * kRepeated<BITS> / BITS)
    runs_int8<BITS, FETCH>(codes, x, acc, std::make_integer_sequence<int, kRepeated<BITS>>());
  const __m512i start = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(a.init)[s]);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512i sum = sum_fields<BITS>(acc[v], std::make_integer_sequence<int, kFields<BITS>>());
    __m512i below = start;
    if (!a.symmetric) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(zeros + v * kVector));
      below = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), start);
    }
    sums[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum, below)), _mm512_set1_ps(a.scale[s]));
  }
}

// D digits of each quad, beside each other.
template <int D>
struct Digits {
  const int32_t *x;

  __m512i operator()(int quad, int d) const { return _mm512_set1_epi32(x[quad * D + d]); }
  void skip(int quads) { x += quads * D; }
};

template <int D>
LGQ_INLINE void add_quad(const __m512i (&codes)[kVectorsPerBlock], const Digits<D> &x, int quad,
                         __m512i (&acc)[kVectorsPerBlock][D]) {
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) {
    const __m512i digit = x(quad, d);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      acc[v][d] = _mm512_dpbusd_epi32(acc[v][d], codes[v], digit);
      keep(acc[v][d]);
    }
  }
}

// Field F of a run as the quad `quad`.
template <int BITS, int F, int D>
LGQ_INLINE void add_field(const __m512i (&run)[kVectorsPerBlock], const Digits<D> &x, int quad,
                          __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i codes[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) codes[v] = quad_of_run<BITS, F>(run[v]);
  add_quad(codes, x, quad, acc);
}

template <int Q, int D>
LGQ_INLINE void add_split(const __m512i (&low)[kVectorsPerBlock], const __m512i (&high)[kVectorsPerBlock],
                          const Digits<D> &x, __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i codes[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) codes[v] = split_quad<Q>(low[v], high[v]);
  add_quad(codes, x, Q, acc);
}

template <int BITS, bool FETCH, int D>
LGQ_INLINE void add_run(const uint8_t *codes, const Digits<D> &x, __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i run[kVectorsPerBlock];
  load_run(codes, run);
  if constexpr (FETCH) fetch_run<FETCH>(codes);
  add_field<BITS, 0>(run, x, 0, acc);
  if constexpr (BITS <= 4) add_field<BITS, 1>(run, x, 1, acc);
  if constexpr (BITS == 2) {
    add_field<BITS, 2>(run, x, 2, acc);
    add_field<BITS, 3>(run, x, 3, acc);
  }
}

// Every line once and in its order, or memory gives half of what it could.
template <bool FETCH, int D>
LGQ_INLINE void add_unit_of_3(const uint8_t *codes, const Digits<D> &x, __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i first[kVectorsPerBlock], second[kVectorsPerBlock], third[kVectorsPerBlock];
  load_run(codes, first);
  if constexpr (FETCH) fetch_run<FETCH>(codes);
  add_field<3, 0>(first, x, 0, acc);
  add_field<3, 1>(first, x, 1, acc);
  load_run(codes + kRunBytes, second);
  if constexpr (FETCH) fetch_run<FETCH>(codes + kRunBytes);
  add_field<3, 0>(second, x, 2, acc);
  add_field<3, 1>(second, x, 3, acc);
  load_run(codes + 2 * kRunBytes, third);
  if constexpr (FETCH) fetch_run<FETCH>(codes + 2 * kRunBytes);
  add_field<3, 0>(third, x, 4, acc);
  add_field<3, 1>(third, x, 5, acc);
  add_split<6>(first, third, x, acc);
  add_split<7>(second, third, x, acc);
}

// Sums of one segment, acc[v][d] of vector v and digit d.
template <int BITS, bool FETCH, int D>
LGQ_INLINE void sum_digits(const RowArgs &a, const Segment &segment, Digits<D> x, __m512i (&acc)[kVectorsPerBlock][D]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[v][d] = _mm512_setzero_si512();
  const uint8_t *codes = a.codes + segment.unit * a.unit_bytes;
  const uint8_t *end = codes + segment.units * a.unit_bytes;
#pragma GCC unroll 1
  for (; codes != end; codes += kRepeated<BITS> * kRunBytes, x.skip(kQuads * kRepeated<BITS> / BITS)) {
    if constexpr (BITS == 3)
      add_unit_of_3<FETCH>(codes, x, acc);
    else
      add_run<BITS, FETCH>(codes, x, acc);
  }
}

// The sums of two digits as those of one of 16 bits: 8 bits * 16 bits * 128 inputs are below 2^31.
LGQ_INLINE __m512 join_digits(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

// sum(x (code - zero)) from the sums of the first two digits of three, or of all four.
template <int D>
LGQ_INLINE __m512 finish_digits(const RowArgs &a, int64_t s, const uint8_t *zeros, const __m512i (&digits)[D]) {
  const __m512 start = _mm512_set1_ps(a.init[s]);
  __m512 below = start, sum = join_digits(digits[0], digits[1]);
  if (D == 4) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(65536.0f), join_digits(digits[D - 2], digits[D - 1]));
  if (!a.symmetric) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(zeros));
    below = _mm512_mul_ps(start, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
  }
  return _mm512_fmadd_ps(sum, _mm512_set1_ps(a.scale[s] * (D == 2 ? 256.0f : 1.0f)), below);
}

template <int BITS, bool FETCH, int D>
LGQ_INLINE void row_segment_digits(const RowArgs &a, const Segment &segment, int64_t s, const uint8_t *zeros,
                                   const Digits<D> &x, __m512 (&sums)[kVectorsPerBlock]) {
  __m512i acc[kVectorsPerBlock][D];
  sum_digits<BITS, FETCH>(a, segment, x, acc);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) sums[v] = finish_digits<D>(a, s, zeros + v * kVector, acc[v]);
}

// total[v] += sums[v] * times * scales.
LGQ_INLINE void add_to_totals(const uint16_t *scales, const __m512 (&sums)[kVectorsPerBlock], float times,
                              __m512 (&total)[kVectorsPerBlock]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i *>(scales + v * kVector));
    total[v] = _mm512_fmadd_ps(_mm512_mul_ps(sums[v], _mm512_set1_ps(times)), _mm512_cvtph_ps(half), total[v]);
  }
}

// The third digits of a segment: one by one, or of every quad if many are not 0.
template <int BITS>
LGQ_INLINE void add_thirds(const RowArgs &a, const Segment &segment, int64_t s, const RareThird &x, const uint16_t *scales,
                           __m512 (&total)[kVectorsPerBlock]) {
  __m512 sums[kVectorsPerBlock];
  uint32_t rare = *x.rare;
  if (__builtin_popcount(rare) > kMostRare) {
    __m512i acc[kVectorsPerBlock][1];
    sum_digits<BITS, false>(a, segment, Digits<1>{x.third}, acc);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) sums[v] = _mm512_cvtepi32_ps(acc[v][0]);
    return add_to_totals(scales, sums, a.scale[s], total);
  }
#pragma GCC unroll 1
  for (; rare != 0; rare &= rare - 1) {
    const int at = __builtin_ctz(rare);
    multiply_one_quad<BITS>(a.codes + segment.unit * a.unit_bytes, at, x.third[at], sums);
    add_to_totals(scales, sums, a.scale[s], total);
  }
}

// The next segment's activations: codes have driven them out of the first-level cache since they were read.
template <int BITS, int T>
LGQ_INLINE void fetch_x(const RowArgs &a, const Segment &segment) {
  constexpr bool pays = T == kInt8 ? BITS == 2 : T == kRareThird && BITS <= 4;
  constexpr int bytes = T == kInt8 ? 1 : 2;  // of an input
  const uint8_t *next = a.x + int64_t{segment.unit + segment.units} * kUnit * bytes;
#pragma GCC unroll 4
  for (int at = 0; pays && at < kSegment * bytes; at += 64)
    _mm_prefetch(reinterpret_cast<const char *>(next + at), _MM_HINT_T0);
}

// One block of outputs for the only row.
template <int BITS, int T, bool FETCH>
void row_avx512(const RowArgs &a) {
  __m512 total[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) total[v] = _mm512_setzero_ps();
  for (int64_t s = 0; s < a.count; ++s) {
    const Segment &segment = a.segments[s];
    const int64_t at = int64_t{segment.group} * kBlock;
    fetch_x<BITS, T>(a, segment);
    for (int line = 0; FETCH && line < 2; ++line)
      _mm_prefetch(reinterpret_cast<const char *>(a.scales + at + kScalesAhead * kBlock + line * 32), _MM_HINT_T0);
    __m512 sums[kVectorsPerBlock];
    if constexpr (T == kRareThird) {
      const RareThird x(a.x, a.segments, a.count, s);
      row_segment_digits<BITS, FETCH>(a, segment, s, a.zeros + at, Digits<2>{x.two}, sums);
      add_to_totals(a.scales + at, sums, 1.0f, total);
      add_thirds<BITS>(a, segment, s, x, a.scales + at, total);
    } else if constexpr (T == kInt8) {
      row_segment_int8<BITS, FETCH>(a, segment, s, a.zeros + at, sums);
      add_to_totals(a.scales + at, sums, 1.0f, total);
    } else {
      const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads * digits_of(T);
      row_segment_digits<BITS, FETCH>(a, segment, s, a.zeros + at, Digits<digits_of(T)>{x}, sums);
      add_to_totals(a.scales + at, sums, 1.0f, total);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) _mm512_store_ps(a.totals + v * kVector, total[v]);
}

}  // namespace
