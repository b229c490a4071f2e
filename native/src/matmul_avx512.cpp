// The quantized product with AVX-512: VNNI for int8 arithmetic, BF16 dot products for exact arithmetic.
//
// exact: a code c becomes a bf16 without a conversion, by putting its bits into a mantissa: 1 + c / 2^bits (8-bit codes as
// two nibbles: 1 + low / 16 and 16 + high). All of these are exact, the constant's share is taken off by starting the
// accumulator at -(A + zero / D) * sum(x). float32 activations are split into three bf16 terms (24 bits), float16 into two;
// a single row of them is cheaper as digits of a fixed-point number, an integer dot product takes twice as many codes:
// four of float32 (matmul_quads.h), else two and seldom a third (matmul_rare_third.h).
// int8: codes are unsigned bytes, activations signed ones; the accumulator starts at -zero * sum(x).
#include "matmul_avx512_row.h"

namespace {

// Constants of the mantissa trick: x * code = D * (x * value - A * x).
template <int BITS>
struct Mantissa {
  static constexpr float A = BITS == 8 ? 17.0f : 1.0f;
  static constexpr float D = BITS == 8 ? 16.0f : static_cast<float>(1 << BITS);
};

constexpr int kAndOr = 0xEA;  // (a & b) | c

// Bytes 0 and 2 (ODD = 0) or 1 and 3 (ODD = 1) of quad Q as bf16 pairs 1 + c / 2^BITS; for 8 bits the low nibbles.
template <int BITS, int Q, int ODD>
LGQ_INLINE __m512bh pair_floats(const uint8_t *vector) {
  constexpr int bits = BITS == 8 ? 4 : BITS, top = 7 - bits;
  const __m512i mask = _mm512_set1_epi16(((1 << bits) - 1) << top), one = _mm512_set1_epi16(0x3f80);
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

// The high nibbles of 8-bit codes as bf16 pairs 16 + high.
template <int Q, int ODD>
LGQ_INLINE __m512bh high_nibbles(const uint8_t *vector) {
  const __m512i moved = shift_right<4 + 8 * ODD - 3>(run_at(vector, Q));
  return (__m512bh)_mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(0x78), _mm512_set1_epi16(0x4180), kAndOr);
}

// Quad Q's part of fetching a tile's share of a unit into the first-level cache. Only where arithmetic is the limit;
// what one row fetches is in matmul_avx512_row.h.
template <int BITS, int Q, int AHEAD>
LGQ_INLINE void fetch_share(const uint8_t *next) {
  constexpr int lines = AHEAD == 0 ? 0 : kVectorsPerBlock * BITS / (AHEAD == 0 ? 1 : AHEAD);
#pragma GCC unroll 4
  for (int i = Q * lines / kQuads; i < (Q + 1) * lines / kQuads; ++i)
    _mm_prefetch(reinterpret_cast<const char *>(next + i * 64), _MM_HINT_T0);
}

template <int BITS, int MR, int Q>
LGQ_INLINE void quad_int8(const uint8_t *codes, const uint8_t *x, __m512i (&acc)[kVectorsPerBlock][MR]) {
  __m512i w[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) w[v] = quad_bytes<BITS, Q>(codes + v * 64);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const __m512i xm = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(x)[Q * MR + m]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) acc[v][m] = _mm512_dpbusd_epi32(acc[v][m], w[v], xm);
  }
}

template <int T, int MR>
LGQ_INLINE void dot_pairs(const __m512bh (&w)[kVectorsPerBlock], const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
#pragma GCC unroll 3
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m512i xm = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(x)[t * MR + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsPerBlock; ++v) acc[v][m] = _mm512_dpbf16_ps(acc[v][m], w[v], (__m512bh)xm);
    }
  }
}

template <int BITS, int T, int MR, int Q, int ODD>
LGQ_INLINE void pair_exact(const uint8_t *codes, const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
  const uint8_t *xp = x + (2 * Q + ODD) * T * MR * 4;
  __m512bh w[kVectorsPerBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerBlock; ++v) w[v] = pair_floats<BITS, Q, ODD>(codes + v * 64);
  dot_pairs<T>(w, xp, acc);
  if constexpr (BITS == 8) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerBlock; ++v) w[v] = high_nibbles<Q, ODD>(codes + v * 64);
    dot_pairs<T>(w, xp, acc);
  }
}

template <int BITS, int T, int MR, int Q>
LGQ_INLINE void quad_exact(const uint8_t *codes, const uint8_t *x, __m512 (&acc)[kVectorsPerBlock][MR]) {
  pair_exact<BITS, T, MR, Q, 0>(codes, x, acc);
  pair_exact<BITS, T, MR, Q, 1>(codes, x, acc);
}

template <int BITS, int MR, int AHEAD, int... Q>
LGQ_INLINE void unit_int8(const uint8_t *codes, const uint8_t *next, const uint8_t *x,
                          __m512i (&acc)[kVectorsPerBlock][MR], std::integer_sequence<int, Q...>) {
  ((fetch_share<BITS, Q, AHEAD>(next), quad_int8<BITS, MR, Q>(codes, x, acc)), ...);
}

template <int BITS, int MR, int AHEAD>
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
  const uint8_t *codes = a.codes, *next = a.next, *x = a.x;
  for (int u = 0; u < a.units; ++u) {
    unit_int8<BITS, MR, AHEAD>(codes, next, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    next += kRunBytes * BITS;
    x += kUnit * MR;
  }
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

template <int BITS, int T, int MR, int AHEAD, int... Q>
LGQ_INLINE void unit_exact(const uint8_t *codes, const uint8_t *next, const uint8_t *x,
                           __m512 (&acc)[kVectorsPerBlock][MR], std::integer_sequence<int, Q...>) {
  ((fetch_share<BITS, Q, AHEAD>(next), quad_exact<BITS, T, MR, Q>(codes, x, acc)), ...);
}

template <int BITS, int T, int MR, int AHEAD>
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
    unit_exact<BITS, T, MR, AHEAD>(codes, next, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    next += kRunBytes * BITS;
    x += kUnit * 2 * T * MR;
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

constexpr bool is_terms(int T) { return T >= kOneTerm && T <= kThreeTerms; }

struct Avx512 {
  static int form(const Product &p) {
    if (p.mode == LGQ_INT8) return kInt8;
    if (p.rows == 1) return p.dtype == LGQ_F32 ? kFourDigits : kRareThird;
    return p.dtype == LGQ_BF16 ? kOneTerm : p.dtype == LGQ_F16 ? kTwoTerms : kThreeTerms;
  }
  static constexpr int64_t word_bytes(int T) {
    return T == kRareThird ? 4 : T == kInt8 || has_digits(T) ? digits_of(T) : 2 * T;
  }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i *>(scales + v * kVector));
      __m512 scale = _mm512_cvtph_ps(half);
      if (is_terms(T)) scale = _mm512_mul_ps(scale, _mm512_set1_ps(Mantissa<BITS>::D));
      _mm512_store_ps(g->scale + v * kVector, scale);
      if (g->symmetric) continue;
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(zeros + v * kVector));
      const __m512i zero = _mm512_cvtepu8_epi32(bytes);
      if (T == kInt8) {
        _mm512_store_si512(g->zero + v * kVector, zero);
      } else {
        const __m512 shifted = _mm512_fmadd_ps(_mm512_cvtepi32_ps(zero), _mm512_set1_ps(1.0f / Mantissa<BITS>::D),
                                               _mm512_set1_ps(Mantissa<BITS>::A));
        _mm512_store_ps(g->zero + v * kVector, shifted);
      }
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    if constexpr (T == kInt8)
      tile_int8<BITS, MR, AHEAD>(a);
    else if constexpr (is_terms(T))
      tile_exact<BITS, T, MR, AHEAD>(a);
  }

  static constexpr bool has_row(int T) { return !is_terms(T); }
  static constexpr int panel_units(int, int) { return 0; }

  template <int BITS, int T>
  static void row(const RowArgs &a) {
    row_avx512<BITS, T>(a);
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
                                 dtype == LGQ_BF16 ? (__m256i)_mm512_cvtneps_pbh(sum)
                                                   : _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
  }
};

// -(zero term of a symmetric grid) times the sum, or the negated sum alone.
LGQ_INLINE float start_exact(const PackedHeader &h, float sum) {
  const float A = h.bits == 8 ? Mantissa<8>::A : 1.0f, D = h.bits == 8 ? Mantissa<8>::D : static_cast<float>(1 << h.bits);
  return h.symmetric ? -(A + static_cast<float>(h.zero) / D) * sum : -sum;
}

void prepare_exact(const Product &p, const Activations &x, int terms, int64_t row, const Tile &tile, int64_t s) {
  const Segment &segment = p.w.segments[s];
  alignas(64) float f[kSegment];
  alignas(64) uint32_t pairs[3][kSegment / 2];
  load_segment(p, row, segment, f);
  const int n = segment.units * kUnit;
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < n; k += 16) {
    __m512 rest = _mm512_load_ps(f + k);
    sum = _mm512_add_ps(sum, rest);
    for (int t = 0; t < terms; ++t) {
      const __m256i term = (__m256i)_mm512_cvtneps_pbh(rest);
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(term), 16)));
      // inputs 0 1 2 3 of a quad become the pairs (0, 2), (1, 3)
      const __m256i ordered = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(term, 0xD8), 0xD8);
      _mm256_store_si256(reinterpret_cast<__m256i *>(pairs[t] + k / 2), ordered);
    }
  }
  const int64_t lane = row - tile.start;
  x.init[x.number_at(tile.start, s) + lane] = start_exact(*p.w.header, _mm512_reduce_add_ps(sum));
  auto *out = reinterpret_cast<uint32_t *>(x.words_at(tile.start, segment));
  if (tile.rows == 1 && terms == 1) {
    std::memcpy(out, pairs[0], static_cast<size_t>(n) * 2);
    return;
  }
  for (int pair = 0; pair < n / 2; ++pair)
    for (int t = 0; t < terms; ++t) out[(pair * terms + t) * tile.rows + lane] = pairs[t][pair];
}

int64_t scratch_bytes(const Product &p) { return Activations::bytes(p, Avx512::word_bytes(Avx512::form(p))); }

void prepare_rows(const Product &p, int64_t begin, int64_t end) {
  const int form = Avx512::form(p);
  if (form == kRareThird) return prepare_rare_third<false>(p);
  const Activations x(p, Avx512::word_bytes(form));
  for (int64_t row = begin; row < end; ++row) {
    const Tile tile = tile_of(row, p.rows);
    for (int64_t s = 0; s < x.segments; ++s) {
      if (form == kInt8)
        prepare_quads<kInt8>(p, 0, x, row, tile, s);
      else if (form == kFourDigits)
        prepare_quads<kFourDigits>(p, 0, x, row, tile, s);
      else
        prepare_exact(p, x, form, row, tile, s);
    }
  }
}

void multiply_blocks(const Product &p, int64_t begin, int64_t end) {
  const int form = Avx512::form(p);
  multiply_in_form<Avx512, kInt8, kOneTerm, kTwoTerms, kThreeTerms, kRareThird, kFourDigits>(p, form, begin, end);
}

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx512 = {scratch_bytes, prepare_rows, multiply_blocks};
