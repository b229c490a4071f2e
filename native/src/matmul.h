// What the product's entry point hands to the kernels of one instruction set. Everything is checked by then.
#pragma once

#include <cstdint>

#include "matmul_layout.h"

namespace lgq {

struct Product {
  PackedView w;
  const void *x;
  int64_t rows, x_stride;
  const void *bias;  // may be null
  int32_t bias_dtype;
  void *y;
  int64_t y_stride;
  int32_t dtype;  // of x and y
  int32_t mode;
  uint8_t *scratch;  // scratch_bytes(), aligned to 64: the activations as the kernel wants them
};

constexpr int64_t kStrip = 8;  // most blocks of outputs that multiply_blocks takes at once

struct MatmulKernels {
  int64_t (*scratch_bytes)(const Product &);
  void (*prepare_rows)(const Product &, int64_t begin, int64_t end);
  void (*multiply_blocks)(const Product &, int64_t begin, int64_t end);
};

extern const MatmulKernels kMatmulPortable;
extern const MatmulKernels kMatmulAvx2;
extern const MatmulKernels kMatmulAvx512;
extern const MatmulKernels kMatmulAvx512Bf16;
extern const MatmulKernels kMatmulNeon;

// Width in bits -> first shift in the byte for quads below 6 at 3 bits, all quads otherwise; see matmul_layout.h.
constexpr int quad_run(int bits, int quad) { return bits == 8 ? quad : bits == 2 ? quad / 4 : quad / 2; }
constexpr int quad_shift(int bits, int quad) {
  return bits == 8 ? 0 : bits == 4 ? 4 * (quad % 2) : bits == 2 ? 2 * (quad % 4) : 3 * (quad % 2);
}
constexpr bool quad_is_split(int bits, int quad) { return bits == 3 && quad >= 6; }

}  // namespace lgq
