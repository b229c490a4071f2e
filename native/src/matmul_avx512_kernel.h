// What the two products with AVX-512 share: with its bfloat16 dot products and without.
#pragma once

#include "matmul_avx512_row.h"
#include "matmul_avx512_tile.h"

namespace {

// INTEL: what pays on Intel's processors and was measured to lose on AMD's or is not known to pay there. Where memory is the limit
// every line is fetched by hand (matmul_avx512_row.h). Codes are unpacked once for all rows: a dot product of 64 bytes takes half a
// cycle there, as shifts and masks do, so that 64 rows take 1.2 times as long without (Zen 4: a cycle, and two for each store).
template <bool INTEL>
struct Avx512 {
  static constexpr int kAloneAhead = INTEL ? -1 : 0;

  static int form(const Product &p) {
    return p.mode == LGQ_INT8 ? kInt8 : p.dtype == LGQ_F32 ? kFourDigits : kRareThird;
  }
  static constexpr int64_t word_bytes(int T) { return T == kInt8 ? 1 : 4; }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i *>(scales + v * kVector));
      _mm512_store_ps(g->scale + v * kVector, _mm512_cvtph_ps(half));
      if (g->symmetric) continue;
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(zeros + v * kVector));
      const __m512i zero = _mm512_cvtepu8_epi32(bytes);
      if (T == kInt8)
        _mm512_store_si512(g->zero + v * kVector, zero);
      else
        _mm512_store_ps(g->zero + v * kVector, _mm512_cvtepi32_ps(zero));
    }
  }

  // Lines that a tile of codes of `bits` fetches for each unit.
  static constexpr int lines(int bits, int AHEAD) { return AHEAD == 0 ? 0 : kVectorsPerBlock * bits / AHEAD; }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    integer_tile<BITS, T, MR, lines(BITS, AHEAD)>(a);
  }

  static constexpr int least_panel_rows(int BITS, int T) {
    return BITS == 8 || !INTEL ? kNever : kTileRows * (T == kInt8 ? 2 : 1) + 1;  // digits read their codes twice
  }
  static constexpr int panel_units(int, int) { return kSegment / kUnit; }

  template <int BITS, int T>
  static void unpack(const uint8_t *codes, int units, const Grid &, uint8_t *panel) {
    for (int u = 0; u < units; ++u, codes += kRunBytes * BITS, panel += kRunBytes * 8)
      unpack_unit<BITS>(codes, panel, std::make_integer_sequence<int, kQuads>());
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void panel_tile(const TileArgs &a) {
    integer_tile<8, T, MR, lines(BITS, AHEAD)>(a);
  }

  static constexpr bool has_row(int) { return true; }

  template <int BITS, int T>
  static void row(const RowArgs &a) {
    row_avx512<BITS, T, INTEL>(a);
  }

  static void prepare(const Product &p, const Activations &x, int form, int64_t row, const Tile &tile, int64_t s) {
    if (form == kInt8)
      prepare_quads<kInt8>(p, 0, x, row, tile, s);
    else if (form == kFourDigits && p.rows == 1)
      prepare_quads<kFourDigits>(p, 0, x, row, tile, s);
    else if (form == kFourDigits)
      prepare_digits<kFourDigits>(p, x, row, tile, s);
    else
      prepare_digits<kRareThird>(p, x, row, tile, s);
  }

  static void store_row(const float *totals, const float *bias, void *y, int32_t dtype, int64_t at, int count) {
    for (int v = 0; v * kVector < count; ++v) {
      const int left = count - v * kVector;
      const __mmask16 mask = left >= kVector ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(totals + v * kVector), _mm512_load_ps(bias + v * kVector));
      const int64_t to = at + v * kVector;
      if (dtype == LGQ_F32)
        _mm512_mask_storeu_ps(static_cast<float *>(y) + to, mask, sum);
      else
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(y) + to, mask,
                                 dtype == LGQ_BF16 ? round_to_bf16(sum) : _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
  }
};

template <class Kernel>
void prepare_rows_of(const Product &p, int64_t begin, int64_t end) {
  const int form = Kernel::form(p);
  if (form == kRareThird && p.rows == 1) return prepare_rare_third<false>(p);
  const Activations x(p, Kernel::word_bytes(form));
  for (int64_t row = begin; row < end; ++row) {
    const Tile tile = tile_of(row, p.rows);
    for (int64_t s = 0; s < x.segments; ++s) Kernel::prepare(p, x, form, row, tile, s);
  }
  if (end == p.rows) x.clear_padding(p, 4);
}

// A kernel's entry points, for the forms that its form() chooses from.
template <class Kernel, int... T>
constexpr MatmulKernels kernels_of() {
  using Entries = QuadEntries<Kernel, T...>;
  return {Entries::scratch_bytes, prepare_rows_of<Kernel>, Entries::multiply_blocks};
}

}  // namespace
