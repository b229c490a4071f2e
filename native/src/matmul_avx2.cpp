// The quantized product with AVX2 and FMA.
//
// int8: products of unsigned codes and signed activations are summed in 16 bits over one unit (8 quads of at most
// 2 * 15 * 127 fit); those of 8-bit codes would not fit and are made in 16 bits and summed in 32. The accumulator starts
// at -zero * sum(x).
// exact, one row, 2 to 4 bits: the same products with the three or four digits of a fixed-point activation
// (matmul_quads.h), 8 instructions for 32 codes. Otherwise byte codes are spread to 32-bit lanes by a byte shuffle,
// converted and multiplied as float32: 14 instructions, but four rows share most of them.
#include <immintrin.h>

#include <utility>

#include "matmul_quads.h"

namespace {

#define LGQ_INLINE static inline __attribute__((always_inline))

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

// Quad Q of a unit as unsigned bytes.
template <int BITS, int Q>
LGQ_INLINE __m256i quad_bytes(const uint8_t *half) {
  if constexpr (BITS == 8) {
    return run_at(half, Q);
  } else if constexpr (quad_is_split(BITS, Q)) {
    const __m256i low = _mm256_and_si256(shift_right<6>(run_at(half, Q - 6)), _mm256_set1_epi8(3));
    const __m256i high = _mm256_and_si256(shift_right<Q - 2>(run_at(half, 2)), _mm256_set1_epi8(4));
    return _mm256_or_si256(low, high);
  } else {
    return _mm256_and_si256(shift_right<quad_shift(BITS, Q)>(run_at(half, quad_run(BITS, Q))),
                            _mm256_set1_epi8((1 << BITS) - 1));
  }
}

// Registers of 8 outputs that one pass works on, so that accumulators fit into 16 registers.
template <int MR>
constexpr int halves_at_once() {
  return MR == 1 ? 8 : 2;
}

// Keeps a sum in its register and in its order: the compiler would otherwise make all products of a unit first, and
// write them to memory until it adds them up as a tree (one row, 2 bits: 4.1 instead of 2.2 cycles for 32 codes).
LGQ_INLINE void keep(__m256i &sum) { asm("" : "+x"(sum)); }

// Byte J of every lane, alone in the lane.
template <int J>
LGQ_INLINE __m256i byte_of_lanes(__m256i bytes) {
  constexpr char z = -128;
  const __m128i pick = _mm_setr_epi8(J, z, z, z, 4 + J, z, z, z, 8 + J, z, z, z, 12 + J, z, z, z);
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(pick));
}

template <int J, int MR>
LGQ_INLINE void multiply_byte(__m256i bytes, const float *x, __m256 (&acc)[MR]) {
  const __m256 w = _mm256_cvtepi32_ps(byte_of_lanes<J>(bytes));
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) acc[m] = _mm256_fmadd_ps(w, _mm256_broadcast_ss(x + m * 4 + J), acc[m]);
}

template <int BITS, int MR, int NH, int Q>
LGQ_INLINE void quad_exact(const uint8_t *codes, const float *x, __m256 (&acc)[NH][MR]) {
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256i bytes = quad_bytes<BITS, Q>(codes + n * 32);
    multiply_byte<0>(bytes, x + Q * MR * 4, acc[n]);
    multiply_byte<1>(bytes, x + Q * MR * 4, acc[n]);
    multiply_byte<2>(bytes, x + Q * MR * 4, acc[n]);
    multiply_byte<3>(bytes, x + Q * MR * 4, acc[n]);
  }
}

template <int BITS, int MR, int NH, int... Q>
LGQ_INLINE void unit_exact(const uint8_t *codes, const float *x, __m256 (&acc)[NH][MR],
                           std::integer_sequence<int, Q...>) {
  (quad_exact<BITS, MR, NH, Q>(codes, x, acc), ...);
}

template <int BITS, int MR, int NH>
LGQ_INLINE void tile_exact(const TileArgs &a, int h0) {
  __m256 acc[NH][MR];
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256 zero = _mm256_load_ps(a.grid->zero + (h0 + n) * 8);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m256 start = _mm256_broadcast_ss(a.init + m);
      acc[n][m] = a.grid->symmetric ? start : _mm256_mul_ps(zero, start);
    }
  }
  const uint8_t *codes = a.codes + h0 * 32;
  const float *x = reinterpret_cast<const float *>(a.x);
  for (int u = 0; u < a.units; ++u) {
    unit_exact<BITS>(codes, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    x += kUnit * MR;
  }
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256 scale = _mm256_load_ps(a.grid->scale + (h0 + n) * 8);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + (h0 + n) * 8;
      _mm256_store_ps(total, _mm256_fmadd_ps(acc[n][m], scale, _mm256_load_ps(total)));
    }
  }
}

// Narrow codes: sums of 16 bits, good for one unit.
template <int BITS, int MR, int NH, int Q>
LGQ_INLINE void quad_narrow(const uint8_t *codes, const uint8_t *x, __m256i (&sum)[NH][MR]) {
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256i bytes = quad_bytes<BITS, Q>(codes + n * 32);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m256i xm = _mm256_set1_epi32(reinterpret_cast<const int32_t *>(x)[Q * MR + m]);
      sum[n][m] = _mm256_add_epi16(sum[n][m], _mm256_maddubs_epi16(bytes, xm));
      keep(sum[n][m]);
    }
  }
}

// 8-bit codes: as 16-bit numbers, summed in 32 bits.
template <int MR, int NH, int Q>
LGQ_INLINE void quad_wide(const uint8_t *codes, const uint8_t *x, __m256i (&acc)[NH][MR]) {
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const __m256i xm = _mm256_set1_epi32(reinterpret_cast<const int32_t *>(x)[Q * MR + m]);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(xm, 8), 8), odd = _mm256_srai_epi16(xm, 8);
#pragma GCC unroll 8
    for (int n = 0; n < NH; ++n) {
      const __m256i bytes = run_at(codes + n * 32, Q);
      const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(bytes, 8);
      const __m256i pair = _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
      acc[n][m] = _mm256_add_epi32(acc[n][m], pair);
    }
  }
}

template <int BITS, int MR, int NH, int... Q>
LGQ_INLINE void unit_int8(const uint8_t *codes, const uint8_t *x, __m256i (&acc)[NH][MR],
                          std::integer_sequence<int, Q...>) {
  if constexpr (BITS == 8) {
    (quad_wide<MR, NH, Q>(codes, x, acc), ...);
  } else {
    __m256i sum[NH][MR];
#pragma GCC unroll 8
    for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[n][m] = _mm256_setzero_si256();
    (quad_narrow<BITS, MR, NH, Q>(codes, x, sum), ...);
#pragma GCC unroll 8
    for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
        acc[n][m] = _mm256_add_epi32(acc[n][m], _mm256_madd_epi16(sum[n][m], _mm256_set1_epi16(1)));
  }
}

template <int BITS, int MR, int NH>
LGQ_INLINE void tile_int8(const TileArgs &a, int h0) {
  __m256i acc[NH][MR];
  const int32_t *init = reinterpret_cast<const int32_t *>(a.init);
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256i zero = _mm256_load_si256(reinterpret_cast<const __m256i *>(a.grid->zero + (h0 + n) * 8));
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const __m256i start = _mm256_set1_epi32(init[m]);
      acc[n][m] = a.grid->symmetric ? start : _mm256_mullo_epi32(zero, start);
    }
  }
  const uint8_t *codes = a.codes + h0 * 32, *x = a.x;
  for (int u = 0; u < a.units; ++u) {
    unit_int8<BITS>(codes, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    x += kUnit * MR;
  }
#pragma GCC unroll 8
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

// The sums of 16 bits of one unit, for every digit.
template <int BITS, int D, int NH, int Q>
LGQ_INLINE void quad_digits(const uint8_t *codes, const int32_t *x, __m256i (&sum)[NH][D]) {
#pragma GCC unroll 8
  for (int n = 0; n < NH; ++n) {
    const __m256i bytes = quad_bytes<BITS, Q>(codes + n * 32);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      sum[n][d] = _mm256_add_epi16(sum[n][d], _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(x[Q * D + d])));
      keep(sum[n][d]);
    }
  }
}

template <int BITS, int D, int NH, int... Q>
LGQ_INLINE void unit_digits(const uint8_t *codes, const int32_t *x, __m256i (&sum)[NH][D],
                            std::integer_sequence<int, Q...>) {
  (quad_digits<BITS, D, NH, Q>(codes, x, sum), ...);
}

// Sums of 16 bits hold one unit (8 quads of at most 2 * 15 * 128); they are widened into `acc` after each, so that codes are
// read in the order of memory.
template <int BITS, int D>
LGQ_INLINE void tile_digits(const TileArgs &a) {
  constexpr int kHalves = 2 * kVectorsPerBlock, NH = 2;
  __m256i acc[kHalves][D];
#pragma GCC unroll 8
  for (int n = 0; n < kHalves; ++n)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[n][d] = _mm256_setzero_si256();
  const uint8_t *codes = a.codes;
  const int32_t *x = reinterpret_cast<const int32_t *>(a.x);
  for (int u = 0; u < a.units; ++u) {
    for (int h0 = 0; h0 < kHalves; h0 += NH) {
      __m256i sum[NH][D];
#pragma GCC unroll 2
      for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) sum[n][d] = _mm256_setzero_si256();
      unit_digits<BITS>(codes + h0 * 32, x, sum, std::make_integer_sequence<int, kQuads>());
#pragma GCC unroll 2
      for (int n = 0; n < NH; ++n)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d)
          acc[h0 + n][d] = _mm256_add_epi32(acc[h0 + n][d], _mm256_madd_epi16(sum[n][d], _mm256_set1_epi16(1)));
    }
    codes += kRunBytes * BITS;
    x += kQuads * D;
  }
  for (int n = 0; n < kHalves; ++n) {
    __m256 digits = _mm256_cvtepi32_ps(acc[n][0]);
#pragma GCC unroll 3
    for (int d = 1; d < D; ++d)
      digits = _mm256_fmadd_ps(digits, _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(acc[n][d]));
    __m256 start = _mm256_broadcast_ss(a.init);
    if (!a.grid->symmetric) start = _mm256_mul_ps(start, _mm256_load_ps(a.grid->zero + n * 8));
    const __m256 sums = _mm256_fmadd_ps(digits, _mm256_broadcast_ss(a.scale), start);
    const __m256 scale = _mm256_load_ps(a.grid->scale + n * 8);
    float *total = a.totals + n * 8;
    _mm256_store_ps(total, _mm256_fmadd_ps(sums, scale, _mm256_load_ps(total)));
  }
}

struct Avx2 : QuadKernel {
  static int form(const Product &p) {
    if (p.mode == LGQ_INT8) return kInt8;
    if (p.rows > 1 || p.w.header->bits == 8) return kFloat;
    return p.dtype == LGQ_F32 ? kFourDigits : kThreeDigits;
  }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    for (int o = 0; o < kBlock; o += 8) {
      const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i *>(scales + o));
      _mm256_store_ps(g->scale + o, _mm256_cvtph_ps(half));
      if (g->symmetric) continue;
      const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(zeros + o)));
      _mm256_store_ps(g->zero + o, T == kInt8 ? _mm256_castsi256_ps(zero) : _mm256_cvtepi32_ps(zero));
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    constexpr int NH = halves_at_once<MR>();
    if constexpr (has_digits(T)) {
      if constexpr (MR == 1 && BITS < 8) tile_digits<BITS, digits_of(T)>(a);  // form() asks for no other
      return;
    }
    for (int h0 = 0; h0 < 2 * kVectorsPerBlock; h0 += NH) {
      if constexpr (T == kInt8)
        tile_int8<BITS, MR, NH>(a, h0);
      else if constexpr (T == kFloat)
        tile_exact<BITS, MR, NH>(a, h0);
    }
  }
};

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx2 = QuadEntries<Avx2, kInt8, kFloat, kThreeDigits, kFourDigits>::kernels;
