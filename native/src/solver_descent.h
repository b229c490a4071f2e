// Coordinate descent over the codes of a block of columns towards real values t: with d = t - q and the block's curvature
// G the loss of a row is d G d, and a column takes the grid point nearest to q_j + (d G)_j / G_jj, given all others.
//
// A panel's q and d are (n, MR). What a few columns need of d G is one product over the block, as wide as a register
// tile; inside the tile every step corrects it for the columns after it.
#pragma once

#include "solver_tile.h"

namespace {

// What a panel's descent works on: up to MR rows and n columns.
struct DescentPanel {
  const float *target;  // (n, MR)
  float *q, *d;         // (n, MR)
  const float *slivers; // G as (ceil(n / NR), n, NR)
  const float *grid;    // (groups, 2, MR): scales, zeros as floats
  const int32_t *group; // (n,)
  int64_t n;
  float max_code;
};

// One visit to NR columns from j on; whether any of them moved. Inlined, its tile is spilled and half as fast.
__attribute__((noinline)) inline bool descend_sliver(const DescentPanel &p, int64_t j) {
  const float *sliver = p.slivers + j * p.n, magic = 12582912.0f;  // 1.5 * 2^23, see round_sliver
  vec pull[NR][2];
  clear_tile(pull);
  multiply_tile(p.d, sliver, p.n, pull);
  ivec moved{};
#pragma GCC unroll 12
  for (int i = 0; i < NR; ++i) {
    if (j + i >= p.n) continue;
    const float *curvature = sliver + (j + i) * NR, *scale = p.grid + p.group[j + i] * 2 * MR;
    const float inverse = curvature[i] > 0.0f ? 1.0f / curvature[i] : 0.0f;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int64_t at = (j + i) * MR + v * kLanes;
      const vec step = load(scale + v * kLanes), low = -load(scale + MR + v * kLanes), high = p.max_code + low;
      const vec old = load(p.q + at);
      vec x = (old + pull[i][v] * inverse) / step;
      x = x > low ? x : low;
      x = x < high ? x : high;
      const vec now = ((x + magic) - magic) * step, by = now - old;
      moved |= now != old;
      store(p.q + at, now);
      store(p.d + at, load(p.target + at) - now);
#pragma GCC unroll 12
      for (int m = i + 1; m < NR; ++m) pull[m][v] -= by * curvature[m];
    }
  }
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= moved[lane];
  return any != 0;
}

// q and d of codes (rows, n) with leading dimension ldcodes; 0 in the lanes that are no row.
inline void load_codes(const DescentPanel &p, int64_t rows, const uint8_t *codes, int64_t ldcodes) {
  for (int64_t j = 0; j < p.n; ++j) {
    const float *scale = p.grid + p.group[j] * 2 * MR, *zero = scale + MR;
    for (int64_t r = 0; r < MR; ++r) {
      const float step = r < rows ? static_cast<float>(codes[r * ldcodes + j]) - zero[r] : 0.0f;
      p.q[j * MR + r] = step * scale[r];
      p.d[j * MR + r] = p.target[j * MR + r] - p.q[j * MR + r];
    }
  }
}

// The codes that q stands for.
inline void store_codes(const DescentPanel &p, int64_t rows, uint8_t *codes, int64_t ldcodes) {
  for (int64_t j = 0; j < p.n; ++j) {
    const float *scale = p.grid + p.group[j] * 2 * MR, *zero = scale + MR;
    for (int64_t r = 0; r < rows; ++r)
      codes[r * ldcodes + j] = static_cast<uint8_t>(p.q[j * MR + r] / scale[r] + zero[r] + 0.5f);
  }
}

// Cycles over all columns, as long as anything moves.
inline void descend_panel(const DescentPanel &p, int32_t cycles) {
  bool moved = true;
  for (int32_t cycle = 0; cycle < cycles && moved; ++cycle) {
    moved = false;
    for (int64_t j = 0; j < p.n; j += NR) moved |= descend_sliver(p, j);
  }
}

// A symmetric G (n, ldg) as slivers of NR columns, (ceil(n / NR), n, NR), zero past the last.
inline void pack_curvature(const float *g, int64_t ldg, int64_t n, float *out) {
  for (int64_t j = 0; j < n; j += NR)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < NR; ++i) out[j * n + k * NR + i] = j + i < n ? g[k * ldg + j + i] : 0.0f;
}

}  // namespace
