// The quantized product with AVX-512 and its bfloat16 dot products: several rows of bfloat16 at 2 to 4 bits; all else as
// matmul_avx512.cpp.
//
// A code c becomes a bf16 without a conversion, by putting its bits into a mantissa: 1 + c / 2^bits, which is exact; the
// constant's share is taken off by starting the accumulator at -(1 + zero / 2^bits) * sum(x). 8-bit codes would take two of
// them, four instructions for 64 codes where digits take two.
//
// This is for AMD's processors. On Intel's (Emerald Rapids) one such instruction takes as long as two integer dot products of
// twice as many codes, so that digits take less than half the time, and a single row wants its codes fetched; isa.cpp chooses.
#include "matmul_avx512_kernel.h"

namespace {

// x * code = levels * (x * value - x).
template <int BITS>
constexpr float kLevels = static_cast<float>(1 << BITS);

constexpr int kAndOr = 0xEA;  // (a & b) | c

// Bytes 0 and 2 (ODD = 0) or 1 and 3 (ODD = 1) of quad Q as bf16 pairs 1 + c / 2^BITS.
template <int BITS, int Q, int ODD>
LGQ_INLINE __m512bh pair_floats(const uint8_t *vector) {
  constexpr int top = 7 - BITS;
  const __m512i mask = _mm512_set1_epi16(((1 << BITS) - 1) << top), one = _mm512_set1_epi16(0x3f80);
  if constexpr (quad_is_split(BITS, Q)) {
    const __m512i low = shift_right<6 + 8 * ODD - top>(run_at(vector, Q - 6));
    const __m512i high = shift_right<Q + 8 * ODD - top - 2>(run_at(vector, 2));
    const __m512i merged = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(3 << top), 0xE4);
    return (__m512bh)_mm512_ternarylogic_epi32(merged, mask, one, kAndOr);
  } else {
    const __m512i moved = shift_right<quad_shift(BITS, Q) + 8 * ODD - top>(run_at(vector, quad_run(BITS, Q)));
    return (__m512bh)_mm512_ternarylogic_epi32(moved, mask, one, kAndOr);
  }
}

template <int MR>
LGQ_INLINE void dot_pairs(const __m512bh (&w)[kVectorsPerBlock], const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const __m512i xm = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(x)[m]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) acc[v][m] = _mm512_dpbf16_ps(acc[v][m], w[v], (__m512bh)xm);
  }
}

template <int BITS, int MR, int Q, int ODD>
LGQ_INLINE void pair_exact(const uint8_t *codes, const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
  const uint8_t *xp = x + (2 * Q + ODD) * MR * 4;
  __m512bh w[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) w[v] = pair_floats<BITS, Q, ODD>(codes + v * 64);
  dot_pairs(w, xp, acc);
}

template <int BITS, int MR, int Q>
LGQ_INLINE void quad_exact(const uint8_t *codes, const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
  pair_exact<BITS, MR, Q, 0>(codes, x, acc);
  pair_exact<BITS, MR, Q, 1>(codes, x, acc);
}

template <int BITS, int MR, int LINES, int... Q>
LGQ_INLINE void unit_exact(const uint8_t *codes, const uint8_t *next, const uint8_t *x,
                           __m512 (&acc)[kVectorsPerBlock][MR], std::integer_sequence<int, Q...>) {
  ((fetch_lines<LINES, Q>(next), quad_exact<BITS, MR, Q>(codes, x, acc)), ...);
}

template <int BITS, int MR, int LINES>
LGQ_INLINE void tile_exact(const TileArgs &a) {
  __m512 acc[kVectorsPerBlock][MR];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512 zero = _mm512_load_ps(a.grid->zero + v * kVector);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m512 start = _mm512_set1_ps(a.init[m]);
      acc[v][m] = a.grid->symmetric ? start : _mm512_mul_ps(zero, start);
    }
  }
  const uint8_t *codes = a.codes, *next = a.next, *x = a.x;
  for (int u = 0; u < a.units; ++u) {
    unit_exact<BITS, MR, LINES>(codes, next, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    next += kRunBytes * BITS;
    x += kUnit * 2 * MR;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    const __m512 scale = _mm512_load_ps(a.grid->scale + v * kVector);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + v * kVector;
      _mm512_store_ps(total, _mm512_fmadd_ps(acc[v][m], scale, _mm512_load_ps(total)));
    }
  }
}

// -(1 + zero / levels) times the sum with a symmetric grid, or the negated sum alone.
LGQ_INLINE float start_exact(const PackedHeader &h, float sum) {
  return h.symmetric ? -(1.0f + static_cast<float>(h.zero) / static_cast<float>(1 << h.bits)) * sum : -sum;
}

struct Avx512Bf16 : Avx512<false> {
  using Base = Avx512<false>;

  static int form(const Product &p) {
    const bool pairs = p.mode == LGQ_EXACT && p.rows > 1 && p.dtype == LGQ_BF16 && p.w.header->bits < 8;
    return pairs ? kBf16 : Base::form(p);
  }
  static constexpr int64_t word_bytes(int T) { return T == kBf16 ? 2 : Base::word_bytes(T); }
  static constexpr bool has_row(int T) { return T != kBf16 && Base::has_row(T); }
  static constexpr int least_panel_rows(int BITS, int T) { return T == kBf16 ? kNever : Base::least_panel_rows(BITS, T); }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    Base::template grid<BITS, T>(scales, zeros, g);
    for (int v = 0; T == kBf16 && v < kVectorsPerBlock; ++v) {
      float *scale = g->scale + v * kVector, *zero = g->zero + v * kVector;
      _mm512_store_ps(scale, _mm512_mul_ps(_mm512_load_ps(scale), _mm512_set1_ps(kLevels<BITS>)));
      if (g->symmetric) continue;
      const __m512 inverse = _mm512_set1_ps(1.0f / kLevels<BITS>), above = _mm512_set1_ps(1.0f);
      _mm512_store_ps(zero, _mm512_fmadd_ps(_mm512_load_ps(zero), inverse, above));
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    if constexpr (T == kBf16 && BITS < 8)
      tile_exact<BITS, MR, lines(BITS, AHEAD)>(a);
    else if constexpr (T != kBf16)
      Base::template tile<BITS, T, MR, AHEAD>(a);
  }

  static void prepare(const Product &p, const Activations &x, int form, int64_t row, const Tile &tile, int64_t s) {
    if (form != kBf16) return Base::prepare(p, x, form, row, tile, s);
    const Segment &segment = p.w.segments[s];
    alignas(64) float f[kSegment];
    load_segment(p, row, segment, f);
    const int64_t lane = row - tile.start;
    auto *out = reinterpret_cast<uint32_t *>(x.words_at(tile.start, segment)) + lane;
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < segment.units * kUnit; k += 16) {
      const __m512 part = _mm512_load_ps(f + k);
      sum = _mm512_add_ps(sum, part);
      // inputs 0 1 2 3 of a quad become the pairs (0, 2), (1, 3)
      const __m256i term = (__m256i)_mm512_cvtneps_pbh(part);
      alignas(32) uint32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i *>(pairs),
                         _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(term, 0xD8), 0xD8));
      for (int i = 0; i < 8; ++i) out[(k / 2 + i) * tile.rows] = pairs[i];
    }
    x.init[x.number_at(tile.start, s) + lane] = start_exact(*p.w.header, _mm512_reduce_add_ps(sum));
  }
};

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx512Bf16 = kernels_of<Avx512Bf16, kInt8, kRareThird, kFourDigits, kBf16>();
