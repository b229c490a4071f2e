// H_upper += X^T X, the GPTQ Hessian (arXiv 2210.17323, section 3.1), as a matrix product over the tiles that touch
// the upper triangle. Tiles on the diagonal also write a little below it; the caller reads only the triangle.
// M += L^T X, of two matrices, over all tiles.
#pragma once

#include "parallel.h"
#include "solver.h"
#include "solver_tile.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using lgq::SyrkArgs;

constexpr int64_t kTokens = 512;  // tokens of one pass: H is read and written once per pass

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

struct Operand {
  const void *values;  // (tokens, cols), leading dimension ld
  int64_t ld, cols;
  bool bf16;
};

// Rows t0 to t0 + depth of columns j to j + Width as (depth, Width) floats, zero past the last column.
template <int Width>
inline void pack_columns(const Operand &a, int64_t t0, int64_t depth, int64_t j, float *out) {
  const int64_t width = min64(Width, a.cols - j);
  if (width < Width) std::memset(out, 0, static_cast<size_t>(depth) * Width * 4);
  for (int64_t k = 0; k < depth; ++k) {
    if (a.bf16) {
      const uint16_t *row = static_cast<const uint16_t*>(a.values) + (t0 + k) * a.ld + j;
      if (width == Width)
        for (int i = 0; i < Width; ++i) out[k * Width + i] = widen(row[i]);
      else
        for (int64_t i = 0; i < width; ++i) out[k * Width + i] = widen(row[i]);
    } else {
      const float *row = static_cast<const float*>(a.values) + (t0 + k) * a.ld + j;
      std::memcpy(out + k * Width, row, static_cast<size_t>(width) * 4);
    }
  }
}

#if defined(__AVX512BF16__)
// The same for bfloat16 dot products: word (k / 2, i) holds tokens k and k + 1 of column i; depth is padded to even.
template <int Width>
inline void pack_pairs(const Operand &a, int64_t t0, int64_t depth, int64_t j, uint32_t *out) {
  const int64_t width = min64(Width, a.cols - j);
  if (width < Width) std::memset(out, 0, static_cast<size_t>(ceil_div(depth, 2)) * Width * 4);
  for (int64_t k = 0; k < depth; k += 2, out += Width) {
    const uint16_t *even = static_cast<const uint16_t*>(a.values) + (t0 + k) * a.ld + j;
    const uint16_t *odd = even + a.ld;
    if (k + 1 == depth)
      for (int64_t i = 0; i < width; ++i) out[i] = even[i];
    else if (width == Width)
      for (int i = 0; i < Width; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    else
      for (int64_t i = 0; i < width; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
  }
}

inline __attribute__((always_inline)) void multiply_pairs(const uint32_t* __restrict a, const uint32_t* __restrict b,
                                                          int64_t pairs, vec (&acc)[NR][2]) {
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh a0 = (__m512bh)_mm512_load_si512(a + k * MR), a1 = (__m512bh)_mm512_load_si512(a + k * MR + 16);
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n) {
      const __m512bh s = (__m512bh)_mm512_set1_epi32(static_cast<int>(b[k * NR + n]));
      acc[n][0] = _mm512_dpbf16_ps(acc[n][0], a0, s);
      acc[n][1] = _mm512_dpbf16_ps(acc[n][1], a1, s);
    }
  }
}
#endif

inline void add_tile(const SyrkArgs &a, int64_t i, int64_t j, const vec (&acc)[NR][2]) {
  const int64_t height = min64(NR, a.cols - i), width = min64(MR, a.cols - j);
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n)
    if (n < height) {
      float *h = a.h + (i + n) * a.ldh + j;
      if (width == MR) {
        store_u(h, load_u(h) + acc[n][0]);
        store_u(h + kLanes, load_u(h + kLanes) + acc[n][1]);
      } else {
        for (int64_t r = 0; r < width; ++r) h[r] += acc[n][r / kLanes][r % kLanes];
      }
    }
}

struct FloatProduct {
  static int64_t words(int64_t depth) { return depth; }
  template <int Width>
  static void pack(const Operand &a, int64_t t0, int64_t depth, int64_t j, float *out) {
    pack_columns<Width>(a, t0, depth, j, out);
  }
  static void multiply(const float *a, const float *b, int64_t depth, vec (&acc)[NR][2]) {
    multiply_tile(a, b, depth, acc);
  }
};

#if defined(__AVX512BF16__)
struct PairProduct {
  static int64_t words(int64_t depth) { return ceil_div(depth, 2); }
  template <int Width>
  static void pack(const Operand &a, int64_t t0, int64_t depth, int64_t j, float *out) {
    pack_pairs<Width>(a, t0, depth, j, reinterpret_cast<uint32_t*>(out));
  }
  static void multiply(const float *a, const float *b, int64_t depth, vec (&acc)[NR][2]) {
    multiply_pairs(reinterpret_cast<const uint32_t*>(a), reinterpret_cast<const uint32_t*>(b), ceil_div(depth, 2), acc);
  }
};
#endif

// Rows [i0, i0 + NB) of H, for the tokens whose packed columns lie in panels.
template <class Product>
void syrk_block(const SyrkArgs &a, int64_t t0, int64_t depth, int64_t i0, const float *panels, float *slivers) {
  const int64_t words = Product::words(depth), end = min64(i0 + NB, a.cols);
  const Operand left{a.left, a.ldl, a.cols, a.bf16};
  for (int64_t i = i0; i < end; i += NR)
    Product::template pack<NR>(left, t0, depth, i, slivers + (i - i0) / NR * words * NR);
  for (int64_t q = a.triangle ? i0 / MR : 0; q * MR < a.cols; ++q)
    for (int64_t i = i0; i < end && (!a.triangle || i < (q + 1) * MR); i += NR) {
      vec acc[NR][2];
      clear_tile(acc);
      Product::multiply(panels + q * words * MR, slivers + (i - i0) / NR * words * NR, depth, acc);
      add_tile(a, i, q * MR, acc);
    }
}

template <class Product>
bool syrk_with(const SyrkArgs &a) {
  const int64_t panels = ceil_div(a.cols, MR), blocks = ceil_div(a.cols, NB);
  const int64_t words = Product::words(min64(kTokens, a.tokens)), threads = min64(a.threads, blocks);
  const Operand right{a.x, a.ldx, a.cols, a.bf16};
  Scratch packed(panels * words * MR * 4), slivers(threads * words * NB * 4);
  if (!packed.as<float>() || !slivers.as<float>()) return false;
  for (int64_t t0 = 0; t0 < a.tokens; t0 += kTokens) {
    const int64_t depth = min64(kTokens, a.tokens - t0);
    int64_t next_panel = 0, next_block = 0;
    auto pack = [&](int, int) {
      for (int64_t q = take(&next_panel); q < panels; q = take(&next_panel))
        Product::template pack<MR>(right, t0, depth, q * MR, packed.as<float>() + q * Product::words(depth) * MR);
    };
    auto multiply = [&](int thread, int) {
      float *mine = slivers.as<float>() + thread * words * NB;
      // longest rows first, so that the threads finish together
      for (int64_t b = take(&next_block); b < blocks; b = take(&next_block))
        syrk_block<Product>(a, t0, depth, b * NB, packed.as<float>(), mine);
    };
    lgq::parallel(static_cast<int>(threads), pack);
    lgq::parallel(static_cast<int>(threads), multiply);
  }
  return true;
}

bool syrk(const SyrkArgs &a) {
#if defined(__AVX512BF16__)
  if (a.bf16) return syrk_with<PairProduct>(a);
#endif
  return syrk_with<FloatProduct>(a);
}

}  // namespace
