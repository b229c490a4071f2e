// One row with AVX-512: memory is the limit, so every instruction for each code counts, and what is done once a segment
// counts too: the loop over segments is here, with the totals in registers.
//
// Memory delivers its bandwidth to loops of one run (3 bits: a unit) that load every line once and in its order. Unrolled
// over a unit, with a load for each quad, or with one run out of order, it is 0.5 to 0.8 of that. What is fetched by hand was
// measured case by case (2 cores of Zen 4): 8-bit codes in int8, 2 KiB ahead, and activations where fetch_x says so.
//
// int8: a field is masked where it lies, not shifted: code * 2^shift is still an unsigned byte for the integer dot
// product. Each shift has sums of its own, whole multiples of 2^shift, that are shifted back once a segment.
// digits: a float32 as four of them (matmul_quads.h), a bfloat16 or float16 as two and seldom a third (matmul_rare_third.h);
// their sums would take too many registers for each shift, and an unpacked code serves all of them.
#pragma once

#include <immintrin.h>

#include <utility>

#include "matmul_rare_third.h"

namespace {

template <int SHIFT>
LGQ_INLINE __m512i shift_right(__m512i v) {  // negative: left
  if constexpr (SHIFT > 0)
    return _mm512_srli_epi32(v, SHIFT);
  else if constexpr (SHIFT < 0)
    return _mm512_slli_epi32(v, -SHIFT);
  else
    return v;
}

// Keeps a value in the register that it is in: the compiler would otherwise keep copies of sums in memory, and load the
// same codes once for each of their fields.
#if defined(LGQ_EMULATE_AVX512)
LGQ_INLINE void keep(__m512i &) {}
#else
LGQ_INLINE void keep(__m512i &v) { asm("" : "+v"(v)); }
#endif

LGQ_INLINE __m512i run_at(const uint8_t *vector, int run) { return _mm512_load_si512(vector + run * kRunBytes); }

LGQ_INLINE void load_run(const uint8_t *codes, __m512i (&run)[kVectorsPerBlock]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    run[v] = run_at(codes + v * 64, 0);
    keep(run[v]);
  }
}

constexpr int kRowAhead = 2048;  // bytes

// Into the second-level cache.
LGQ_INLINE void fetch_run(const uint8_t *codes) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) _mm_prefetch(reinterpret_cast<const char *>(codes + v * 64), _MM_HINT_T1);
}

// Field F of a run that holds whole fields, as unsigned bytes.
template <int BITS, int F>
LGQ_INLINE __m512i quad_of_run(__m512i run) {
  const __m512i field = shift_right<F * BITS>(run);
  return BITS == 8 ? field : _mm512_and_si512(field, _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1)));
}

// Quad 6 or 7 of 3 bits, from the run with its low bits and that with its high ones.
template <int Q>
LGQ_INLINE __m512i split_quad(__m512i low, __m512i high) {
  const __m512i merged = _mm512_ternarylogic_epi32(shift_right<6>(low), shift_right<Q - 2>(high), _mm512_set1_epi8(3), 0xE4);
  return _mm512_and_si512(merged, _mm512_set1_epi8(7));  // merged: mask ? low : high
}

// Quad Q of a unit as unsigned bytes.
template <int BITS, int Q>
LGQ_INLINE __m512i quad_bytes(const uint8_t *vector) {
  if constexpr (quad_is_split(BITS, Q))
    return split_quad<Q>(run_at(vector, Q - 6), run_at(vector, 2));
  else
    return quad_of_run<BITS, quad_shift(BITS, Q) / BITS>(run_at(vector, quad_run(BITS, Q)));
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

template <int BITS, int RUN, int... F>
LGQ_INLINE void run_int8(const uint8_t *codes, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][kFields<BITS>],
                         std::integer_sequence<int, F...>) {
  __m512i run[kVectorsPerBlock];
  load_run(codes + RUN * kRunBytes, run);
  if constexpr (BITS == 8) fetch_run(codes + kRowAhead);
  (field_int8<BITS, RUN, F>(run, x, acc), ...);
}

// What repeats: one run, at 3 bits the three of a unit.
template <int BITS, int... RUN>
LGQ_INLINE void runs_int8(const uint8_t *codes, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][kFields<BITS>],
                          std::integer_sequence<int, RUN...>) {
  (run_int8<BITS, RUN>(codes, x, acc, std::make_integer_sequence<int, kFields<BITS>>()), ...);
}

template <int BITS, int... F>
LGQ_INLINE __m512i sum_fields(const __m512i (&acc)[kFields<BITS>], std::integer_sequence<int, F...>) {
  __m512i sum = acc[0];
  ((F > 0 ? void(sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[F], field_of(BITS, F).shift))) : void()), ...);
  return sum;
}

// sum(code * x) of one segment for every output of the block, less what the zero takes off, as a float.
template <int BITS>
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
    runs_int8<BITS>(codes, x, acc, std::make_integer_sequence<int, kRepeated<BITS>>());
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

// D digits of a unit's quads; of three the last lies apart (RareThird).
template <int D>
struct Digits {
  static constexpr int kNear = D == 3 ? 2 : D;
  const int32_t *x, *third;

  __m512i operator()(int quad, int d) const {
    return _mm512_set1_epi32(D == 3 && d == 2 ? third[quad] : x[quad * kNear + d]);
  }
  void skip(int quads) {
    x += quads * kNear;
    if (D == 3) third += quads;
  }
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

template <int BITS, int D>
LGQ_INLINE void add_run(const uint8_t *codes, const Digits<D> &x, __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i run[kVectorsPerBlock];
  load_run(codes, run);
  add_field<BITS, 0>(run, x, 0, acc);
  if constexpr (BITS <= 4) add_field<BITS, 1>(run, x, 1, acc);
  if constexpr (BITS == 2) {
    add_field<BITS, 2>(run, x, 2, acc);
    add_field<BITS, 3>(run, x, 3, acc);
  }
}

// Every line once and in its order, or memory gives half of what it could.
template <int D>
LGQ_INLINE void add_unit_of_3(const uint8_t *codes, const Digits<D> &x, __m512i (&acc)[kVectorsPerBlock][D]) {
  __m512i first[kVectorsPerBlock], second[kVectorsPerBlock], third[kVectorsPerBlock];
  load_run(codes, first);
  add_field<3, 0>(first, x, 0, acc);
  add_field<3, 1>(first, x, 1, acc);
  load_run(codes + kRunBytes, second);
  add_field<3, 0>(second, x, 2, acc);
  add_field<3, 1>(second, x, 3, acc);
  load_run(codes + 2 * kRunBytes, third);
  add_field<3, 0>(third, x, 4, acc);
  add_field<3, 1>(third, x, 5, acc);
  add_split<6>(first, third, x, acc);
  add_split<7>(second, third, x, acc);
}

// Sums of one segment, acc[v][d] of vector v and digit d.
template <int BITS, int D>
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
      add_unit_of_3(codes, x, acc);
    else
      add_run<BITS>(codes, x, acc);
  }
}

// sum(x (code - zero)) from the sums of the digits, the highest first.
template <int D>
LGQ_INLINE __m512 finish_digits(const RowArgs &a, int64_t s, const uint8_t *zeros, const __m512i (&digits)[D]) {
  const __m512 start = _mm512_set1_ps(a.init[s]);
  __m512 sum = _mm512_cvtepi32_ps(digits[0]), below = start;
#pragma GCC unroll 3
  for (int d = 1; d < D; ++d) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(digits[d]));
  if (!a.symmetric) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(zeros));
    below = _mm512_mul_ps(start, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
  }
  return _mm512_fmadd_ps(sum, _mm512_set1_ps(a.scale[s]), below);
}

template <int BITS, int D>
LGQ_INLINE void row_segment_digits(const RowArgs &a, const Segment &segment, int64_t s, const uint8_t *zeros,
                                   const Digits<D> &x, __m512 (&sums)[kVectorsPerBlock]) {
  __m512i acc[kVectorsPerBlock][D];
  sum_digits<BITS, D>(a, segment, x, acc);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) sums[v] = finish_digits<D>(a, s, zeros + v * kVector, acc[v]);
}

// Adds the third digit of the quads in `rare`, given as the segment's codes and digits.
template <int BITS>
LGQ_INLINE void add_rare(const uint8_t *codes, const int32_t *third, uint32_t rare, __m512i (&sum)[kVectorsPerBlock]) {
  constexpr int fields = BITS == 3 ? 2 : 8 / BITS;  // whole ones in a byte
#pragma GCC unroll 1
  for (; rare != 0; rare &= rare - 1) {
    const int at = __builtin_ctz(rare), quad = at % kQuads;
    const uint8_t *unit = codes + at / kQuads * (kRunBytes * BITS);
    const __m512i digit = _mm512_set1_epi32(third[at]);
    const bool split = BITS == 3 && quad >= 6;
    const int run = split ? quad - 6 : quad / fields;
    const __m128i shift = _mm_cvtsi32_si128(split ? 6 : quad % fields * BITS), high_shift = _mm_cvtsi32_si128(quad - 2);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(split ? 3 : (1 << BITS) - 1));
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      __m512i w = _mm512_and_si512(_mm512_srl_epi32(run_at(unit + v * 64, run), shift), mask);
      if (split) {
        const __m512i high = _mm512_srl_epi32(run_at(unit + v * 64, 2), high_shift);
        w = _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi8(4)));
      }
      sum[v] = _mm512_dpbusd_epi32(sum[v], w, digit);
    }
  }
}

template <int BITS>
LGQ_INLINE void row_segment_rare_third(const RowArgs &a, const Segment &segment, int64_t s, const uint8_t *zeros,
                                       __m512 (&sums)[kVectorsPerBlock]) {
  const RareThird x(a.x, a.segments, a.count, s);
  const uint32_t rare = *x.rare;
  if (__builtin_popcount(rare) > kMostRare)
    return row_segment_digits<BITS, 3>(a, segment, s, zeros, {x.two, x.third}, sums);
  __m512i two[kVectorsPerBlock][2], third[kVectorsPerBlock];
  sum_digits<BITS, 2>(a, segment, {x.two, nullptr}, two);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) third[v] = _mm512_setzero_si512();
  add_rare<BITS>(a.codes + segment.unit * a.unit_bytes, x.third, rare, third);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v)
    sums[v] = finish_digits<3>(a, s, zeros + v * kVector, {two[v][0], two[v][1], third[v]});
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
template <int BITS, int T>
void row_avx512(const RowArgs &a) {
  __m512 total[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) total[v] = _mm512_setzero_ps();
  for (int64_t s = 0; s < a.count; ++s) {
    const Segment &segment = a.segments[s];
    const int64_t at = int64_t{segment.group} * kBlock;
    fetch_x<BITS, T>(a, segment);
    __m512 sums[kVectorsPerBlock];
    if constexpr (T == kInt8) {
      row_segment_int8<BITS>(a, segment, s, a.zeros + at, sums);
    } else if constexpr (T == kRareThird) {
      row_segment_rare_third<BITS>(a, segment, s, a.zeros + at, sums);
    } else {
      const int32_t *x = reinterpret_cast<const int32_t *>(a.x) + int64_t{segment.unit} * kQuads * digits_of(T);
      row_segment_digits<BITS, digits_of(T)>(a, segment, s, a.zeros + at, {x, nullptr}, sums);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i *>(a.scales + at + v * kVector));
      total[v] = _mm512_fmadd_ps(sums[v], _mm512_cvtph_ps(half), total[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) _mm512_store_ps(a.totals + v * kVector, total[v]);
}

}  // namespace
