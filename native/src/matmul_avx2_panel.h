// Several rows with AVX2: codes are unpacked once for all tiles, to 8 KiB that stay in the first-level cache, and tiles only
// load, multiply and add. It pays for a single tile too: unpacking reads codes in the order in which they lie and fetches them
// ahead, where tiles of two registers of outputs would read every fourth line (4 rows: exact 1783 instead of 3867
// microseconds, int8 945 instead of 1291).
//
// int8: a segment as bytes [quad][64 outputs][4 inputs], as 8-bit codes lie.
// exact: a unit as the weights themselves [input][64 outputs]. scale * (code - zero) is exact in float32, so nothing is
// left to do with sums.
#pragma once

#include "matmul_avx2_codes.h"

namespace {

template <int BITS, int... Q>
LGQ_INLINE void unpack_bytes(const uint8_t *half, uint8_t *panel, std::integer_sequence<int, Q...>) {
  (_mm256_store_si256(reinterpret_cast<__m256i *>(panel + Q * kRunBytes), quad_bytes<BITS, Q>(half)), ...);
}

template <int J>
LGQ_INLINE void unpack_weight(__m256i bytes, __m256 scale, __m256 shift, float *panel) {
  _mm256_store_ps(panel + J * kBlock, _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_of_lanes<J>(bytes)), scale, shift));
}

template <int BITS, int Q>
LGQ_INLINE void unpack_quad(const uint8_t *half, __m256 scale, __m256 shift, float *panel) {
  const __m256i bytes = quad_bytes<BITS, Q>(half);
  unpack_weight<0>(bytes, scale, shift, panel + 4 * Q * kBlock);
  unpack_weight<1>(bytes, scale, shift, panel + 4 * Q * kBlock);
  unpack_weight<2>(bytes, scale, shift, panel + 4 * Q * kBlock);
  unpack_weight<3>(bytes, scale, shift, panel + 4 * Q * kBlock);
}

template <int BITS, int... Q>
LGQ_INLINE void unpack_floats(const uint8_t *half, __m256 scale, __m256 shift, float *panel,
                              std::integer_sequence<int, Q...>) {
  (unpack_quad<BITS, Q>(half, scale, shift, panel), ...);
}

template <int BITS, int T>
void unpack_panel(const uint8_t *codes, int units, const Grid &grid, uint8_t *panel) {
  constexpr auto quads = std::make_integer_sequence<int, kQuads>();
  for (int u = 0; u < units; ++u, codes += kRunBytes * BITS, panel += kQuads * kRunBytes) {
    for (int n = 0; n < kHalves; ++n) {
      if (n % 2 == 0) fetch_ahead(codes + n * BITS * 32, BITS);
      if constexpr (T == kFloat) {
        const __m256 scale = _mm256_load_ps(grid.scale + n * 8);
        const __m256 shift = _mm256_mul_ps(scale, _mm256_load_ps(grid.zero + n * 8));
        unpack_floats<BITS>(codes + n * 32, scale, _mm256_sub_ps(_mm256_setzero_ps(), shift),
                            reinterpret_cast<float *>(panel) + n * 8, quads);
      } else {
        unpack_bytes<BITS>(codes + n * 32, panel + n * 32, quads);
      }
    }
  }
}

// MR rows x 8 NH outputs. Twelve sums, two weights and an activation fill the registers; with a third weight the compiler
// spills sums (Zen 3: 3.0 instead of 2.7 cycles for 32 codes and a row), with 8 sums it takes 3.1, and 2 would be the peak.
template <int MR, int NH>
LGQ_INLINE void panel_floats(const TileArgs &a, int h0) {
  __m256 acc[NH][MR];
  float *totals = a.totals + h0 * 8;
#pragma GCC unroll 4
  for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[n][m] = _mm256_load_ps(totals + m * kBlock + n * 8);
  const float *w = reinterpret_cast<const float *>(a.codes) + h0 * 8, *x = reinterpret_cast<const float *>(a.x);
  for (int q = 0; q < a.units * kQuads; ++q, x += 4 * MR) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, w += kBlock) {
      __m256 weights[NH];
#pragma GCC unroll 4
      for (int n = 0; n < NH; ++n) {
        weights[n] = _mm256_load_ps(w + n * 8);
        if (n < 2) asm("" : "+x"(weights[n]));  // stays in a register
      }
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const __m256 xm = _mm256_broadcast_ss(x + m * 4 + j);
#pragma GCC unroll 4
        for (int n = 0; n < NH; ++n) acc[n][m] = _mm256_fmadd_ps(weights[n], xm, acc[n][m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) _mm256_store_ps(totals + m * kBlock + n * 8, acc[n][m]);
}

template <int MR>
LGQ_INLINE void panel_floats_tile(const TileArgs &a) {
  panel_floats<MR, 3>(a, 0);
  panel_floats<MR, 3>(a, 3);
  panel_floats<MR, 2>(a, 6);
}

// Narrow codes: sums of 16 bits.
template <int MR, int NH, int Q>
LGQ_INLINE void quad_narrow(const uint8_t *codes, const int32_t *x, __m256i (&sum)[NH][MR]) {
#pragma GCC unroll 2
  for (int n = 0; n < NH; ++n) {
    const __m256i bytes = run_at(codes + n * 32, Q);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      sum[n][m] = _mm256_add_epi16(sum[n][m], _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(x[Q * MR + m])));
      keep(sum[n][m]);
    }
  }
}

// 8-bit codes: sums of 32 bits.
template <int MR, int NH, int Q>
LGQ_INLINE void quad_wide(const uint8_t *codes, const int32_t *x, __m256i (&sum)[NH][MR]) {
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const BytePairs pairs = byte_pairs(_mm256_set1_epi32(x[Q * MR + m]));
#pragma GCC unroll 2
    for (int n = 0; n < NH; ++n)
      sum[n][m] = _mm256_add_epi32(sum[n][m], products_of_bytes(run_at(codes + n * 32, Q), pairs));
  }
}

template <int BITS, int MR, int NH, int... Q>
LGQ_INLINE void panel_unit(const uint8_t *codes, const int32_t *x, __m256i (&sum)[NH][MR],
                           std::integer_sequence<int, Q...>) {
  if constexpr (BITS == 8)
    (quad_wide<MR, NH, Q>(codes, x, sum), ...);
  else
    (quad_narrow<MR, NH, Q>(codes, x, sum), ...);
}

// acc += the products of one unit. Sums of 2- and 3-bit codes would fit into 16 bits for longer, but kept in registers from
// unit to unit they are spilled (16 rows: 3210 and 3455 microseconds instead of the 2278 of 4 bits).
template <int BITS, int MR, int NH>
LGQ_INLINE void add_unit(const uint8_t *codes, const int32_t *x, __m256i (&acc)[NH][MR]) {
  constexpr auto quads = std::make_integer_sequence<int, kQuads>();
  if constexpr (BITS == 8) {
    panel_unit<BITS>(codes, x, acc, quads);
  } else {
    __m256i sum[NH][MR];
#pragma GCC unroll 2
    for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[n][m] = _mm256_setzero_si256();
    panel_unit<BITS>(codes, x, sum, quads);
#pragma GCC unroll 2
    for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) acc[n][m] = _mm256_add_epi32(acc[n][m], widened(sum[n][m]));
  }
}

// MR rows x 8 NH outputs; sums start at -zero * sum(x).
template <int BITS, int MR, int NH>
LGQ_INLINE void panel_int8(const TileArgs &a, int h0) {
  __m256i acc[NH][MR];
#pragma GCC unroll 2
  for (int n = 0; n < NH; ++n) {
    const __m256i zero = _mm256_load_si256(reinterpret_cast<const __m256i *>(a.grid->zero + (h0 + n) * 8));
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m256i start = _mm256_set1_epi32(reinterpret_cast<const int32_t *>(a.init)[m]);
      acc[n][m] = a.grid->symmetric ? start : _mm256_mullo_epi32(zero, start);
    }
  }
  const uint8_t *codes = a.codes + h0 * 32;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x);
  for (int u = 0; u < a.units; ++u, codes += kQuads * kRunBytes, x += kQuads * MR) add_unit<BITS>(codes, x, acc);
#pragma GCC unroll 2
  for (int n = 0; n < NH; ++n) {
    const __m256 scale = _mm256_load_ps(a.grid->scale + (h0 + n) * 8);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + (h0 + n) * 8;
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[n][m]), _mm256_broadcast_ss(a.scale + m));
      _mm256_store_ps(total, _mm256_fmadd_ps(scaled, scale, _mm256_load_ps(total)));
    }
  }
}

template <int BITS, int MR>
LGQ_INLINE void panel_int8_tile(const TileArgs &a) {
  for (int h0 = 0; h0 < kHalves; h0 += 2) panel_int8<BITS, MR, 2>(a, h0);
}

}  // namespace
