// Codes to unsigned bytes with AVX-512, 64 at a time, as the integer dot products want them.
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

// To nearest even; a NaN stays one.
LGQ_INLINE __m256i round_to_bf16(__m512 f) {
  const __m512i bits = _mm512_castps_si512(f), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

LGQ_INLINE __m512i run_at(const uint8_t *vector, int run) { return _mm512_load_si512(vector + run * kRunBytes); }

constexpr int kStreamNear = 2048, kStreamFar = 8192;  // bytes

// A line of codes that follows this one, from memory into the second-level cache and later into the first.
LGQ_INLINE void fetch_stream(const uint8_t *line) {
  _mm_prefetch(reinterpret_cast<const char *>(line + kStreamFar), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char *>(line + kStreamNear), _MM_HINT_T0);
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

template <int BITS, int Q>
LGQ_INLINE void unpack_quad(const uint8_t *codes, uint8_t *panel) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512i bytes = quad_bytes<BITS, Q>(codes + v * 64);
    _mm512_store_si512(panel + v * 64, bytes);
  }
}

// A unit's codes as bytes, in the layout of 8-bit codes.
template <int BITS, int... Q>
LGQ_INLINE void unpack_unit(const uint8_t *codes, uint8_t *panel, std::integer_sequence<int, Q...>) {
  (unpack_quad<BITS, Q>(codes, panel + Q * kRunBytes), ...);
}

// sums[v] = codes * `digit` of quad `at` of a segment.
template <int BITS>
LGQ_INLINE void multiply_one_quad(const uint8_t *codes, int at, int32_t digit, __m512 (&sums)[kVectorsPerBlock]) {
  constexpr int fields = BITS == 3 ? 2 : 8 / BITS;  // whole ones in a byte
  const int quad = at % kQuads;
  const uint8_t *unit = codes + at / kQuads * (kRunBytes * BITS);
  const bool split = BITS == 3 && quad >= 6;
  const int run = split ? quad - 6 : quad / fields;
  const __m128i shift = _mm_cvtsi32_si128(split ? 6 : quad % fields * BITS), high_shift = _mm_cvtsi32_si128(quad - 2);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(split ? 3 : (1 << BITS) - 1));
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    __m512i w = run_at(unit + v * 64, run);
    if (BITS < 8) w = _mm512_and_si512(_mm512_srl_epi32(w, shift), mask);
    if (split) {
      const __m512i high = _mm512_srl_epi32(run_at(unit + v * 64, 2), high_shift);
      w = _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi8(4)));
    }
    sums[v] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_set1_epi32(digit)));
  }
}

}  // namespace
