// The quantized product with AVX2 and FMA.
//
// int8: integer products of bytes. exact, one row: integer products with the digits of a fixed-point activation, three of
// bfloat16 and float16 (matmul_avx2_digits.h), four of float32 but for 8 bits (matmul_quads.h), 4 to 8 instructions for 32
// codes, where float32 takes 14; otherwise float32.
#include "matmul_avx2_digits.h"
#include "matmul_avx2_panel.h"

namespace {

struct Avx2 : QuadKernel {
  static int form(const Product &p) {
    if (p.mode == LGQ_INT8) return kInt8;
    if (p.rows > 1) return kFloat;
    if (p.dtype != LGQ_F32) return kRareThird;
    return p.w.header->bits == 8 ? kFloat : kFourDigits;
  }

  static constexpr int64_t word_bytes(int T) { return T == kRareThird ? 4 : QuadKernel::word_bytes(T); }
  static constexpr bool has_panels(int T) { return T == kInt8 || T == kFloat; }

  static constexpr bool has_row(int) { return true; }

  template <int BITS, int T>
  static void row(const RowArgs &a) {
    if constexpr (T == kInt8 || T == kRareThird || (T == kFloat) == (BITS == 8))
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

  static constexpr int least_panel_rows(int, int) { return 0; }
  static constexpr int panel_units(int, int T) { return T == kInt8 ? 4 : 1; }

  template <int BITS, int T>
  static void unpack(const uint8_t *codes, int units, const Grid &grid, uint8_t *panel) {
    if constexpr (has_panels(T)) unpack_panel<BITS, T>(codes, units, grid, panel);
  }

  template <int BITS, int T, int MR, int>
  static void panel_tile(const TileArgs &a) {
    if constexpr (T == kFloat) panel_floats_tile<MR>(a);
    if constexpr (T == kInt8) panel_int8_tile<BITS, MR>(a);
  }
};

using Quads = QuadEntries<Avx2, kInt8, kFloat, kFourDigits>;

void prepare_rows(const Product &p, int64_t begin, int64_t end) {
  if (Avx2::form(p) != kRareThird)
    Quads::prepare_rows(p, begin, end);
  else if (p.w.header->bits == 8)
    prepare_rare_third<true>(p);
  else
    prepare_rare_third<false>(p);
}

void multiply_blocks(const Product &p, int64_t begin, int64_t end) {
  multiply_in_form<Avx2, kInt8, kFloat, kRareThird, kFourDigits>(p, Avx2::form(p), begin, end);
}

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx2 = {Quads::scratch_bytes, prepare_rows, multiply_blocks};
