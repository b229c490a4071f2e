// Unpacking and multiplying codes with AVX2: what the kernels for one row and for several share.
//
// Products of unsigned codes and signed bytes are summed in 16 bits over as many units as fit; those of 8-bit codes would not
// fit and are made in 16 bits and summed in 32.
#pragma once

#include <immintrin.h>

#include <utility>

#include "matmul_quads.h"

namespace {

constexpr int kHalves = 2 * kVectorsPerBlock;  // registers of 8 outputs in a block

// A vector of 16 outputs is two registers; `half` points to one.
LGQ_INLINE __m256i run_at(const uint8_t *half, int run) {
  return _mm256_load_si256(reinterpret_cast<const __m256i *>(half + run * kRunBytes));
}

template <int SHIFT>
LGQ_INLINE __m256i shift_right(__m256i v) {
  if constexpr (SHIFT > 0)
    return _mm256_srli_epi32(v, SHIFT);
  else
    return v;
}

// Field F of a run that holds whole fields, as unsigned bytes.
template <int BITS, int F>
LGQ_INLINE __m256i quad_of_run(__m256i run) {
  const __m256i field = shift_right<F * BITS>(run);
  return BITS == 8 ? field : _mm256_and_si256(field, _mm256_set1_epi8(static_cast<char>((1 << BITS) - 1)));
}

// Quad 6 or 7 of 3 bits, from the run with its low bits and that with its high ones.
template <int Q>
LGQ_INLINE __m256i split_quad(__m256i low, __m256i high) {
  return _mm256_or_si256(_mm256_and_si256(shift_right<6>(low), _mm256_set1_epi8(3)),
                         _mm256_and_si256(shift_right<Q - 2>(high), _mm256_set1_epi8(4)));
}

// Quad Q of a unit as unsigned bytes.
template <int BITS, int Q>
LGQ_INLINE __m256i quad_bytes(const uint8_t *half) {
  if constexpr (quad_is_split(BITS, Q))
    return split_quad<Q>(run_at(half, Q - 6), run_at(half, 2));
  else
    return quad_of_run<BITS, quad_shift(BITS, Q) / BITS>(run_at(half, quad_run(BITS, Q)));
}

// Byte J of every lane, alone in the lane.
template <int J>
LGQ_INLINE __m256i byte_of_lanes(__m256i bytes) {
  constexpr char z = -128;
  const __m128i pick = _mm_setr_epi8(J, z, z, z, 4 + J, z, z, z, 8 + J, z, z, z, 12 + J, z, z, z);
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(pick));
}

// Units whose products fit into sums of 16 bits: 8 quads each of at most 2 (2^BITS - 1) 128.
template <int BITS>
constexpr int kUnitsIn16 = BITS == 4 ? 1 : BITS == 3 ? 2 : 4;

// Keeps a sum in its register and in its order: the compiler would otherwise make all products of a unit first, and
// write them to memory until it adds them up as a tree (one row, 2 bits: 4.1 instead of 2.2 cycles for 32 codes).
LGQ_INLINE void keep(__m256i &sum) { asm("" : "+x"(sum)); }

// A load that is made once: the compiler would otherwise repeat it for every field.
LGQ_INLINE __m256i loaded(const uint8_t *half) {
  __m256i codes = run_at(half, 0);
  keep(codes);
  return codes;
}

// The same pointer, of which the compiler does not know it: broadcasts of what lies there are made again instead of being kept
// on the stack.
LGQ_INLINE const int32_t *repeated(const int32_t *x) {
  asm("" : "+r"(x));
  return x;
}

LGQ_INLINE __m256i broadcast(const int32_t *x) { return _mm256_set1_epi32(*x); }

// sum += codes * x in 16 bits.
LGQ_INLINE void add_bytes(__m256i codes, __m256i x, __m256i &sum) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  keep(sum);
}

// Pairs of 16-bit sums added up in 32 bits.
LGQ_INLINE __m256i widened(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

// Even and odd bytes as signed numbers of 16 bits: 8-bit codes times activations do not fit into 16 bits.
struct BytePairs {
  __m256i even, odd;
};

LGQ_INLINE BytePairs byte_pairs(__m256i x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}

LGQ_INLINE __m256i products_of_bytes(__m256i codes, const BytePairs &x) {
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(codes, 8);
  return _mm256_add_epi32(_mm256_madd_epi16(low, x.even), _mm256_madd_epi16(high, x.odd));
}

// Codes are fetched this many bytes before they are needed: 1 KiB reaches 0.82 of the bandwidth at one row and 4 bits,
// 2 to 8 KiB 0.89 to 0.93.
constexpr int kAhead = 4096;

LGQ_INLINE void fetch_ahead(const uint8_t *codes, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char *>(codes + kAhead + i * 64), _MM_HINT_T0);
}

}  // namespace
