// Several rows with AVX-512 in integer dot products: 4 rows and 4 vectors of outputs in registers.
//
// int8: the accumulator starts at -zero * sum(x).
// digits: a row is a fixed-point number whose first two digits (matmul_quads.h) are multiplied one after the other into the same
// sums (16 bits * 8 bits * 128 inputs are below 2^31), and so are the last two of four; the third of three mostly is 0
// (matmul_rare_third.h). [digit][quad][row of the tile][4 inputs], with three digits [row of the tile] RareThird's `rare` after them.
// The sums are what matmul_avx512_row.h makes of the row alone, to the bit.
#pragma once

#include "matmul_avx512_codes.h"

namespace {

// Quad Q's part of fetching LINES cache lines a unit into the first-level cache, or of -LINES what follows them in the stream.
// What one row fetches is in matmul_avx512_row.h.
template <int LINES, int Q>
LGQ_INLINE void fetch_lines(const uint8_t *next) {
  constexpr int lines = LINES < 0 ? -LINES : LINES;
#pragma GCC unroll 4
  for (int i = Q * lines / kQuads; i < (Q + 1) * lines / kQuads; ++i)
    if (LINES < 0)
      fetch_stream(next + i * 64);
    else
      _mm_prefetch(reinterpret_cast<const char *>(next + i * 64), _MM_HINT_T0);
}

template <int BITS, int MR, int Q>
LGQ_INLINE void add_quad_of_rows(const uint8_t *codes, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][MR]) {
  __m512i w[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) w[v] = quad_bytes<BITS, Q>(codes + v * 64);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const __m512i xm = _mm512_set1_epi32(x[Q * MR + m]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) acc[v][m] = _mm512_dpbusd_epi32(acc[v][m], w[v], xm);
  }
}

template <int BITS, int MR, int LINES, int... Q>
LGQ_INLINE void add_unit_of_rows(const uint8_t *codes, const uint8_t *next, const int32_t *x,
                                 __m512i (&acc)[kVectorsPerBlock][MR], std::integer_sequence<int, Q...>) {
  ((fetch_lines<LINES, Q>(next), add_quad_of_rows<BITS, MR, Q>(codes, x, acc)), ...);
}

// acc[v][m] += codes of the segment * words [quad][row]; fetches LINES lines for each unit.
template <int BITS, int MR, int LINES>
LGQ_INLINE void add_words(const TileArgs &a, const int32_t *x, __m512i (&acc)[kVectorsPerBlock][MR]) {
  const uint8_t *codes = a.codes, *next = a.next;
  for (int u = 0; u < a.units; ++u) {
    add_unit_of_rows<BITS, MR, LINES>(codes, next, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    next += a.unit_bytes;
    x += kQuads * MR;
  }
}

template <int BITS, int MR, int LINES>
LGQ_INLINE void tile_int8(const TileArgs &a) {
  __m512i acc[kVectorsPerBlock][MR];
  const int32_t *init = reinterpret_cast<const int32_t *>(a.init);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512i zero = _mm512_load_si512(a.grid->zero + v * kVector);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m512i start = _mm512_set1_epi32(init[m]);
      acc[v][m] = a.grid->symmetric ? start : _mm512_mullo_epi32(zero, start);
    }
  }
  add_words<BITS, MR, LINES>(a, reinterpret_cast<const int32_t *>(a.x), acc);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512 scale = _mm512_load_ps(a.grid->scale + v * kVector);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + v * kVector;
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[v][m]), _mm512_set1_ps(a.scale[m]));
      _mm512_store_ps(total, _mm512_fmadd_ps(scaled, scale, _mm512_load_ps(total)));
    }
  }
}

// Row m's totals of vector v += scale * (sum * step + start).
LGQ_INLINE void add_fixed_point(const TileArgs &a, int v, int m, __m512 sum, float step) {
  __m512 start = _mm512_set1_ps(a.init[m]);
  if (!a.grid->symmetric) start = _mm512_mul_ps(start, _mm512_load_ps(a.grid->zero + v * kVector));
  float *total = a.totals + m * kBlock + v * kVector;
  const __m512 exact = _mm512_fmadd_ps(sum, _mm512_set1_ps(step), start);
  _mm512_store_ps(total, _mm512_fmadd_ps(exact, _mm512_load_ps(a.grid->scale + v * kVector), _mm512_load_ps(total)));
}

template <int MR>
LGQ_INLINE void clear(__m512i (&acc)[kVectorsPerBlock][MR]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[v][m] = _mm512_setzero_si512();
}

// Two digits after each other; x is the first one's words and becomes those after the second.
template <int BITS, int MR, int LINES>
LGQ_INLINE void add_two_digits(const TileArgs &a, const int32_t *&x, __m512i (&acc)[kVectorsPerBlock][MR]) {
  const int words = a.units * kQuads * MR;
  clear(acc);
  add_words<BITS, MR, LINES>(a, x, acc);
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[v][m] = _mm512_slli_epi32(acc[v][m], 8);
  add_words<BITS, MR, 0>(a, x + words, acc);
  x += 2 * words;
}

// Row m's totals of vector v += scale * sum * step.
LGQ_INLINE void add_third(const TileArgs &a, int v, int64_t m, __m512 sum) {
  float *total = a.totals + m * kBlock + v * kVector;
  const __m512 exact = _mm512_mul_ps(sum, _mm512_set1_ps(a.scale[m]));
  _mm512_store_ps(total, _mm512_fmadd_ps(exact, _mm512_load_ps(a.grid->scale + v * kVector), _mm512_load_ps(total)));
}

// The third digits [quad][row]: one by one, or of every quad of the rows that have many. `rare`: [row].
template <int BITS, int MR>
LGQ_INLINE void add_thirds(const TileArgs &a, const int32_t *third, const uint32_t *rare) {
  uint32_t dense = 0;
  for (int m = 0; m < MR; ++m) dense |= static_cast<uint32_t>(__builtin_popcount(rare[m]) > kMostRare) << m;
  if (dense != 0) {
    __m512i acc[kVectorsPerBlock][MR];
    clear(acc);
    add_words<BITS, MR, 0>(a, third, acc);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsPerBlock; ++v)
        if (dense >> m & 1) add_third(a, v, m, _mm512_cvtepi32_ps(acc[v][m]));
  }
#pragma GCC unroll 1
  for (int pair = 0; pair < MR; pair += 2) {
    uint64_t left = dense >> pair & 1 ? 0 : rare[pair];
    if (pair + 1 < MR && !(dense >> (pair + 1) & 1)) left |= static_cast<uint64_t>(rare[pair + 1]) << 32;
#pragma GCC unroll 1
    for (; left != 0; left &= left - 1) {
      const int at = __builtin_ctzll(left), quad = at & 31, m = pair + (at >> 5);
      __m512 sums[kVectorsPerBlock];
      multiply_one_quad<BITS>(a.codes, quad, third[quad * MR + m], sums);
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsPerBlock; ++v) add_third(a, v, m, sums[v]);
    }
  }
}

template <int BITS, int T, int MR, int LINES>
LGQ_INLINE void tile_digits(const TileArgs &a) {
  __m512i acc[kVectorsPerBlock][MR];
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x);
  add_two_digits<BITS, MR, LINES>(a, x, acc);
  if constexpr (T == kRareThird) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) add_fixed_point(a, v, m, _mm512_cvtepi32_ps(acc[v][m]), a.scale[m] * 256.0f);
    add_thirds<BITS, MR>(a, x, reinterpret_cast<const uint32_t *>(x + a.units * kQuads * MR));
  } else {
    __m512 high[kVectorsPerBlock][MR];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) high[v][m] = _mm512_cvtepi32_ps(acc[v][m]);
    add_two_digits<BITS, MR, 0>(a, x, acc);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const __m512 low = _mm512_cvtepi32_ps(acc[v][m]);
        add_fixed_point(a, v, m, _mm512_fmadd_ps(high[v][m], _mm512_set1_ps(65536.0f), low), a.scale[m]);
      }
  }
}

// A tile with codes of BITS; fetches LINES lines a unit.
template <int BITS, int T, int MR, int LINES>
LGQ_INLINE void integer_tile(const TileArgs &a) {
  if constexpr (T == kInt8)
    tile_int8<BITS, MR, LINES>(a);
  else
    tile_digits<BITS, T, MR, LINES>(a);
}

// Words of one segment and row.
template <int T>
void prepare_digits(const Product &p, const Activations &x, int64_t row, const Tile &tile, int64_t s) {
  const Segment &segment = p.w.segments[s];
  const int n = segment.units * kUnit, quads = n / 4;
  const int64_t lane = row - tile.start, at = x.number_at(tile.start, s) + lane;
  alignas(64) float f[kSegment];
  load_segment(p, row, segment, f);
  x.init[at] = static_cast<float>(p.w.header->symmetric ? -p.w.header->zero : -1) * sum_of(f, n);
  auto *to = reinterpret_cast<int32_t *>(x.words_at(tile.start, segment)) + lane;
  constexpr int digits = T == kRareThird ? 3 : 4;
  int32_t words[kSegment / 4 * digits];
  if constexpr (T == kRareThird) {
    uint32_t rare;
    x.scale[at] = round_to_rare_third<false>(f, n, RareThird(words, words + 2 * quads, &rare));
    for (int q = 0; q < quads; ++q)
      for (int d = 0; d < digits; ++d) to[(d * quads + q) * tile.rows] = d < 2 ? words[q * 2 + d] : words[2 * quads + q];
    to[3 * quads * tile.rows] = static_cast<int32_t>(rare);
  } else {
    x.scale[at] = round_to_digits<digits>(f, n, {reinterpret_cast<uint8_t *>(words), 4});
    for (int q = 0; q < quads; ++q)
      for (int d = 0; d < digits; ++d) to[(d * quads + q) * tile.rows] = words[q * digits + d];
  }
}

}  // namespace
