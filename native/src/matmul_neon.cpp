// The quantized product with NEON and its dot product (Armv8.2): everything is sums of products of signed bytes.
//
// Codes of 2, 3 and 4 bits are signed bytes as they are, those of 8 bits after 128 is taken off, also from the zeros. int8:
// one dot product per code. exact: three of them, or four for float32, over the digits of a fixed-point activation
// (matmul_quads.h), where converting every code to a float would take three instructions for a quarter as many codes.
#include <arm_neon.h>

#include <utility>

#include "matmul_quads.h"

namespace {

// A vector of 16 outputs is four registers; `quarter` points to one.
LGQ_INLINE uint32x4_t run_at(const uint8_t *quarter, int run) {
  return vreinterpretq_u32_u8(vld1q_u8(quarter + run * kRunBytes));
}

template <int SHIFT>
LGQ_INLINE uint32x4_t shift_right(uint32x4_t v) {
  if constexpr (SHIFT > 0)
    return vshrq_n_u32(v, SHIFT);
  else
    return v;
}

LGQ_INLINE uint8x16_t masked(uint32x4_t v, uint8_t mask) { return vandq_u8(vreinterpretq_u8_u32(v), vdupq_n_u8(mask)); }

// Quad Q of a unit as signed bytes.
template <int BITS, int Q>
LGQ_INLINE int8x16_t quad_bytes(const uint8_t *quarter) {
  if constexpr (BITS == 8) {
    return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(run_at(quarter, Q)), vdupq_n_u8(128)));
  } else if constexpr (quad_is_split(BITS, Q)) {
    const uint8x16_t low = masked(shift_right<6>(run_at(quarter, Q - 6)), 3);
    const uint8x16_t high = masked(shift_right<Q - 2>(run_at(quarter, 2)), 4);
    return vreinterpretq_s8_u8(vorrq_u8(low, high));
  } else {
    const uint32x4_t moved = shift_right<quad_shift(BITS, Q)>(run_at(quarter, quad_run(BITS, Q)));
    return vreinterpretq_s8_u8(masked(moved, (1 << BITS) - 1));
  }
}

// Registers of 4 outputs that one pass works on: accumulators take at most 24 of the 32 registers.
constexpr int registers_at_once(int digits, int rows) {
  return rows == 1 ? (digits == 1 ? 16 : digits == 3 ? 8 : 4) : (digits == 1 ? 4 : digits == 3 ? 2 : 1);
}

template <int BITS, int D, int MR, int NR, int Q>
LGQ_INLINE void quad_product(const uint8_t *codes, const uint8_t *x, int32x4_t (&acc)[NR][MR][D]) {
  int8x16_t digit[D];
  const uint8_t *words = x + Q * D * MR * 4;
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) {
    if constexpr (MR == 1)
      digit[d] = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t *>(words) + d));
    else
      digit[d] = vreinterpretq_s8_u8(vld1q_u8(words + d * 16));
  }
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
    const int8x16_t w = quad_bytes<BITS, Q>(codes + n * 16);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      if constexpr (MR == 1) {
        acc[n][0][d] = vdotq_s32(acc[n][0][d], w, digit[d]);
      } else {
        acc[n][0][d] = vdotq_laneq_s32(acc[n][0][d], w, digit[d], 0);
        acc[n][1][d] = vdotq_laneq_s32(acc[n][1][d], w, digit[d], 1);
        acc[n][2][d] = vdotq_laneq_s32(acc[n][2][d], w, digit[d], 2);
        acc[n][3][d] = vdotq_laneq_s32(acc[n][3][d], w, digit[d], 3);
      }
    }
  }
}

template <int BITS, int D, int MR, int NR, int... Q>
LGQ_INLINE void unit_product(const uint8_t *codes, const uint8_t *x, int32x4_t (&acc)[NR][MR][D],
                             std::integer_sequence<int, Q...>) {
  (quad_product<BITS, D, MR, NR, Q>(codes, x, acc), ...);
}

// The sum of one row and four outputs in real units: sum(x (code - zero)).
template <int T, int D>
LGQ_INLINE float32x4_t finished(const TileArgs &a, int output, int row, const int32x4_t (&acc)[D]) {
  if constexpr (T == kInt8) {
    const int32x4_t start = vdupq_n_s32(reinterpret_cast<const int32_t *>(a.init)[row]);
    const int32_t *zero = reinterpret_cast<const int32_t *>(a.grid->zero) + output;
    const int32x4_t sum = vaddq_s32(acc[0], a.grid->symmetric ? start : vmulq_s32(start, vld1q_s32(zero)));
    return vmulq_n_f32(vcvtq_f32_s32(sum), a.scale[row]);
  } else {
    float32x4_t sum = vcvtq_f32_s32(acc[0]);
#pragma GCC unroll 3
    for (int d = 1; d < D; ++d) sum = vfmaq_n_f32(vcvtq_f32_s32(acc[d]), sum, 256.0f);
    const float32x4_t start = vdupq_n_f32(a.init[row]);
    const float32x4_t shift = a.grid->symmetric ? start : vmulq_f32(start, vld1q_f32(a.grid->zero + output));
    return vfmaq_n_f32(shift, sum, a.scale[row]);
  }
}

template <int BITS, int T, int MR>
LGQ_INLINE void tile_outputs(const TileArgs &a, int first) {
  constexpr int D = digits_of(T), NR = registers_at_once(D, MR);
  int32x4_t acc[NR][MR][D];
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) acc[n][m][d] = vdupq_n_s32(0);
  const uint8_t *codes = a.codes + first * 4, *x = a.x;
  for (int u = 0; u < a.units; ++u) {
    unit_product<BITS>(codes, x, acc, std::make_integer_sequence<int, kQuads>());
    codes += kRunBytes * BITS;
    x += kUnit * D * MR;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
    const int output = first + n * 4;
    const float32x4_t scale = vld1q_f32(a.grid->scale + output);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + output;
      vst1q_f32(total, vfmaq_f32(vld1q_f32(total), finished<T, D>(a, output, m, acc[n][m]), scale));
    }
  }
}

struct Neon : QuadKernel {
  static int code_offset(const Product &p) { return p.w.header->bits == 8 ? 128 : 0; }
  static int form(const Product &p) {
    return p.mode == LGQ_INT8 ? kInt8 : p.dtype == LGQ_F32 ? kFourDigits : kThreeDigits;
  }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    constexpr int shift = BITS == 8 ? 128 : 0;
    int32_t *integers = reinterpret_cast<int32_t *>(g->zero);
    for (int o = 0; o < kBlock; o += 4) {
      vst1q_f32(g->scale + o, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + o))));
      for (int l = o; l < o + 4 && !g->symmetric; ++l) {
        if constexpr (T == kInt8)
          integers[l] = zeros[l] - shift;
        else
          g->zero[l] = static_cast<float>(zeros[l] - shift);
      }
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    constexpr int step = 4 * registers_at_once(digits_of(T), MR);
    for (int first = 0; first < kBlock; first += step) tile_outputs<BITS, T, MR>(a, first);
  }
};

}  // namespace

const lgq::MatmulKernels lgq::kMatmulNeon = QuadEntries<Neon, kInt8, kThreeDigits, kFourDigits>::kernels;
