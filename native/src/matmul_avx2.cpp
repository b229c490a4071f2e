// The quantized product with AVX2 and FMA.
//
// int8: integer products of bytes. exact, one row, 2 to 4 bits: the same products with the three or four digits of a
// fixed-point activation (matmul_quads.h), 8 instructions for 32 codes, where float32 takes 14; otherwise float32.
#include "matmul_avx2_panel.h"
#include "matmul_avx2_row.h"

namespace {

struct Avx2 : QuadKernel {
  static int form(const Product &p) {
    if (p.mode == LGQ_INT8) return kInt8;
    if (p.rows > 1 || p.w.header->bits == 8) return kFloat;
    return p.dtype == LGQ_F32 ? kFourDigits : kThreeDigits;
  }

  static constexpr bool has_row(int) { return true; }

  template <int BITS, int T>
  static void row(const RowArgs &a) {
    if constexpr (T == kInt8 || (T == kFloat) == (BITS == 8))
      row_avx2<BITS, T>(a);
    else
      __builtin_unreachable();  // form() asks for no other
  }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    for (int o = 0; o < kBlock; o += 8) {
      const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i *>(scales + o));
      _mm256_store_ps(g->scale + o, _mm256_cvtph_ps(half));
      if (T == kInt8 && g->symmetric) continue;
      const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(zeros + o)));
      _mm256_store_ps(g->zero + o, T == kInt8 ? _mm256_castsi256_ps(zero) : _mm256_cvtepi32_ps(zero));
    }
  }

  static constexpr int panel_units(int, int T) { return T == kInt8 ? 4 : 1; }

  template <int BITS, int T>
  static void unpack(const uint8_t *codes, int units, const Grid &grid, uint8_t *panel) {
    if constexpr (!has_digits(T)) unpack_panel<BITS, T>(codes, units, grid, panel);
  }

  template <int BITS, int T, int MR>
  static void panel_tile(const TileArgs &a) {
    if constexpr (T == kFloat) panel_floats_tile<MR>(a);
    if constexpr (T == kInt8) panel_int8_tile<BITS, MR>(a);
  }
};

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx2 = QuadEntries<Avx2, kInt8, kFloat, kThreeDigits, kFourDigits>::kernels;
