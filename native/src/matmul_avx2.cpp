// The quantized product with AVX2 and FMA.
//
// exact: byte codes are spread to 32-bit lanes by a byte shuffle, converted and multiplied as float32.
// int8: products of unsigned codes and signed activations are summed in 16 bits over one unit (8 quads of at most
// 2 * 15 * 127 fit); those of 8-bit codes would not fit and are made in 16 bits and summed in 32. The accumulator starts
// at -zero * sum(x).
#include <immintrin.h>

#include <utility>

#include "matmul_driver.h"

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
    for (int m = 0; m < MR; ++m) acc[n][m] = _mm256_mul_ps(zero, _mm256_broadcast_ss(a.init + m));
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
    for (int m = 0; m < MR; ++m) acc[n][m] = _mm256_mullo_epi32(zero, _mm256_set1_epi32(init[m]));
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

struct Avx2 {
  static int terms(const Product &p) { return p.mode == LGQ_INT8 ? 0 : 1; }
  static constexpr int64_t word_bytes(int terms) { return terms == 0 ? 1 : 4; }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    for (int o = 0; o < kBlock; o += 8) {
      const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i *>(scales + o));
      _mm256_store_ps(g->scale + o, _mm256_cvtph_ps(half));
      const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(zeros + o)));
      _mm256_store_ps(g->zero + o, T == 0 ? _mm256_castsi256_ps(zero) : _mm256_cvtepi32_ps(zero));
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    constexpr int NH = halves_at_once<MR>();
    for (int h0 = 0; h0 < 2 * kVectorsPerBlock; h0 += NH) {
      if constexpr (T == 0)
        tile_int8<BITS, MR, NH>(a, h0);
      else
        tile_exact<BITS, MR, NH>(a, h0);
    }
  }

  static void store_row(const float *totals, const float *bias, void *y, int32_t dtype, int64_t at, int count) {
    for (int o = 0; o < count; ++o) store_float(y, dtype, at + o, totals[o] + bias[o]);
  }
};

void prepare_rows(const Product &p, int64_t begin, int64_t end) {
  const bool int8 = p.mode == LGQ_INT8;
  const int64_t word = Avx2::word_bytes(Avx2::terms(p));
  const Activations x(p, word);
  alignas(32) float f[kSegment];
  alignas(32) int8_t q[kSegment];
  for (int64_t row = begin; row < end; ++row) {
    const Tile tile = tile_of(row, p.rows);
    const int64_t lane = row - tile.start;
    for (int64_t s = 0; s < x.segments; ++s) {
      const Segment &segment = p.w.segments[s];
      const int n = segment.units * kUnit;
      load_segment(p, row, segment, f);
      const int64_t at = tile.start * x.segments + s * tile.rows + lane;
      uint8_t *out = x.words + tile.start * x.row_bytes + int64_t{segment.unit} * kUnit * tile.rows * word;
      if (int8) {
        x.scale[at] = round_to_int8(f, n, q);
        int32_t sum = 0;
        for (int k = 0; k < n; ++k) sum += q[k];
        reinterpret_cast<int32_t *>(x.init)[at] = -sum;
      } else {
        float sum[8] = {};
        for (int k = 0; k < n; k += 8)
          for (int l = 0; l < 8; ++l) sum[l] += f[k + l];
        x.init[at] = -(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
      }
      for (int quad = 0; quad < n / 4; ++quad) {
        if (int8)
          std::memcpy(out + (quad * tile.rows + lane) * 4, q + quad * 4, 4);
        else
          std::memcpy(out + (quad * tile.rows + lane) * 16, f + quad * 4, 16);
      }
    }
  }
}

int64_t scratch_bytes(const Product &p) { return Activations::bytes(p, Avx2::word_bytes(Avx2::terms(p))); }

void multiply_blocks(const Product &p, int64_t begin, int64_t end) {
  if (Avx2::terms(p) == 0)
    multiply_blocks_with<Avx2, 0>(p, begin, end);
  else
    multiply_blocks_with<Avx2, 1>(p, begin, end);
}

}  // namespace

const lgq::MatmulKernels lgq::kMatmulAvx2 = {scratch_bytes, prepare_rows, multiply_blocks};
