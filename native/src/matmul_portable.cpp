// The quantized product in plain C++: correct everywhere, vectorised by the compiler as far as the baseline allows.
#include "matmul_quads.h"

namespace {

// Codes minus zeros of one unit and 16 outputs, [input][output].
template <int BITS, class Number>
void decode_unit(const uint8_t *vector, const int32_t *zero, Number (*out)[kVector]) {
  uint32_t lane[BITS][kVector];
  for (int run = 0; run < BITS; ++run) std::memcpy(lane[run], vector + run * kRunBytes, sizeof lane[run]);
  for (int k = 0; k < kUnit; ++k) {
    const int quad = k / 4, byte = 8 * (k % 4);
    if (quad_is_split(BITS, quad)) {
      for (int l = 0; l < kVector; ++l) {
        const uint32_t low = lane[quad - 6][l] >> (byte + 6) & 3, high = lane[BITS == 3 ? 2 : 0][l] >> (byte + quad) & 1;
        out[k][l] = static_cast<Number>(static_cast<int32_t>(low | high << 2) - zero[l]);
      }
    } else {
      const uint32_t *from = lane[quad_run(BITS, quad)];
      const int shift = byte + quad_shift(BITS, quad);
      for (int l = 0; l < kVector; ++l)
        out[k][l] = static_cast<Number>(static_cast<int32_t>(from[l] >> shift & ((1u << BITS) - 1)) - zero[l]);
    }
  }
}

template <int BITS, class Number, class Input, int MR>
void tile_as(const TileArgs &a) {
  const int32_t *zeros = reinterpret_cast<const int32_t *>(a.grid->zero);
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    Number acc[MR][kVector] = {};
    Number codes[kUnit][kVector];
    for (int u = 0; u < a.units; ++u) {
      decode_unit<BITS>(a.codes + u * a.unit_bytes + v * 64, zeros + v * kVector, codes);
      const Input *x = reinterpret_cast<const Input *>(a.x) + u * kUnit * MR;
      for (int m = 0; m < MR; ++m)
        for (int k = 0; k < kUnit; ++k) {
          const Number xk = static_cast<Number>(x[(k / 4 * MR + m) * 4 + k % 4]);
          for (int l = 0; l < kVector; ++l) acc[m][l] += xk * codes[k][l];
        }
    }
    const float *scale = a.grid->scale + v * kVector;
    for (int m = 0; m < MR; ++m) {
      float *total = a.totals + m * kBlock + v * kVector;
      const float row_scale = sizeof(Input) == 1 ? a.scale[m] : 1.0f;
      for (int l = 0; l < kVector; ++l) total[l] += static_cast<float>(acc[m][l]) * row_scale * scale[l];
    }
  }
}

struct Portable : QuadKernel {
  static int form(const Product &p) { return p.mode == LGQ_INT8 ? kInt8 : kFloat; }

  template <int BITS, int T>
  static void grid(const uint16_t *scales, const uint8_t *zeros, Grid *g) {
    int32_t *zero = reinterpret_cast<int32_t *>(g->zero);
    for (int o = 0; o < kBlock; ++o) {
      g->scale[o] = half_to_float(scales[o]);
      zero[o] = zeros[o];
    }
  }

  template <int BITS, int T, int MR, int AHEAD>
  static void tile(const TileArgs &a) {
    if constexpr (T == kInt8)
      tile_as<BITS, int32_t, int8_t, MR>(a);
    else
      tile_as<BITS, float, float, MR>(a);
  }
};

}  // namespace

const lgq::MatmulKernels lgq::kMatmulPortable = QuadEntries<Portable, kInt8, kFloat>::kernels;
