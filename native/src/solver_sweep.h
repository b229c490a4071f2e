// The GPTQ sweep (arXiv 2210.17323, algorithm 1), left-looking: column j of a strip of rows takes the errors of all
// columns before it in one product, then is rounded. Errors overwrite the weights in a strip buffer laid out
// (panel, column, MR rows), so the sweep is a matrix product whose operand is its own output, and a strip reads U once.
#pragma once

#include "parallel.h"
#include "solver.h"
#include "solver_tile.h"

namespace {

using lgq::SweepArgs;

// Rows of one strip: each element of U is packed once per strip and then used for this many rows. The strip is read
// once per NB columns, so it need not stay in a cache: 256 and 512 rows differ by 5 % (Zen 4, 4096 columns).
constexpr int64_t kStripRows = 512;

struct Strip {
  int64_t first, rows, panels;
  float *p;     // (panels, cols, MR): weights to the right of the sweep, errors to the left
  float *grid;  // (panels, groups, 2, MR): scales, zeros as floats
  float *pack;  // slivers of U
  double *loss; // (panels, MR)
};

inline void load_strip(const SweepArgs &a, const Strip &s) {
  for (int64_t q = 0; q < s.panels; ++q) {
    float *p = s.p + q * a.cols * MR;
    float *grid = s.grid + q * a.groups * 2 * MR;
    const int64_t first = s.first + q * MR, rows = min64(MR, s.first + s.rows - first);
    // 16 columns at a time: one cache line of every row
    for (int64_t c = 0; c < a.cols; c += 16) {
      const int64_t width = min64(16, a.cols - c);
      for (int64_t r = 0; r < MR; ++r)
        for (int64_t i = 0; i < width; ++i)
          p[(c + i) * MR + r] = r < rows ? a.w[(first + r) * a.ldw + c + i] : 0.0f;
    }
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t r = 0; r < MR; ++r) {
        grid[(2 * g) * MR + r] = r < rows ? a.scales[g * a.rows + first + r] : 1.0f;
        grid[(2 * g + 1) * MR + r] = r < rows ? static_cast<float>(a.zeros[g * a.rows + first + r]) : 0.0f;
      }
  }
}

inline void store_errors(const SweepArgs &a, const Strip &s) {
  for (int64_t q = 0; q < s.panels; ++q) {
    const float *p = s.p + q * a.cols * MR;
    const int64_t first = s.first + q * MR, rows = min64(MR, s.first + s.rows - first);
    for (int64_t c = 0; c < a.cols; c += 16) {
      const int64_t width = min64(16, a.cols - c);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) a.err[(first + r) * a.lderr + c + i] = p[(c + i) * MR + r];
    }
  }
}

// U[k0 : k0 + depth, j : j + width] as (depth, NR), zero past the last column.
inline void pack_sliver(const SweepArgs &a, int64_t k0, int64_t depth, int64_t j, int64_t width, float *out) {
  for (int64_t k = 0; k < depth; ++k) {
    const float *row = a.u + (k0 + k) * a.ldu + j;
    if (width == NR) {
      for (int n = 0; n < NR; ++n) out[k * NR + n] = row[n];
    } else {
      for (int n = 0; n < NR; ++n) out[k * NR + n] = n < width ? row[n] : 0.0f;
    }
  }
}

// Round `width` columns, at most NR, from j on, one after the other, while their weights stay in registers (w, updated by every column
// before j), or give them the values that are wanted (n, MR). Writes the errors to p, the codes to the caller's array and
// adds err^2 to loss.
template <bool kGiven>
inline void round_sliver(const SweepArgs &a, const Strip &s, int64_t panel, int64_t j, int64_t width,
                         const float *diagonal, const float *given, vec (&w)[NR][2], vec (&loss)[2]) {
  float *p = s.p + panel * a.cols * MR + j * MR;
  const float *grid = s.grid + panel * a.groups * 2 * MR;
  alignas(64) int32_t code[NR][MR];
  const float max_code = static_cast<float>(a.max_code);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds |x| < 2^22 to the nearest integer, ties to even
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n) {
    const int64_t column = n < width ? j + n : j;
    const float *scale = grid + static_cast<int64_t>(a.group[column]) * 2 * MR;
    const float pivot = n < width ? diagonal[n * NR + n] : 1.0f;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vec step = load(scale + v * kLanes), zero = load(scale + MR + v * kLanes);
      // clamping to [-zero, max_code - zero] before rounding is the same as after, since both ends are integers
      const vec low = -zero, high = max_code - zero;
      vec x = (kGiven && n < width ? load(given + n * MR + v * kLanes) : w[n][v]) / step;
      x = x > low ? x : low;
      x = x < high ? x : high;
      x = (x + magic) - magic;
      *reinterpret_cast<ivec*>(&code[n][v * kLanes]) = __builtin_convertvector(x + zero, ivec);
      const vec err = (w[n][v] - x * step) / pivot;
      loss[v] += err * err;
      if (n < width) store(p + n * MR + v * kLanes, err);
#pragma GCC unroll 12
      for (int m = n + 1; m < NR; ++m) w[m][v] -= err * diagonal[n * NR + m];
    }
  }
  const int64_t first = s.first + panel * MR, rows = min64(MR, s.first + s.rows - first);
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t *out = a.codes + (first + r) * a.ldcodes + j;
    for (int64_t n = 0; n < width; ++n) out[n] = static_cast<uint8_t>(code[n][r]);
  }
}

// p[:, j : j + NR] -= errors[:, k0 : k0 + depth] @ U[k0 : k0 + depth, j : j + NR]
inline void update_sliver(float *p, const float *pack, int64_t k0, int64_t depth, int64_t j, int64_t width) {
  vec acc[NR][2];
  clear_tile(acc);
  multiply_tile(p + k0 * MR, pack, depth, acc);
  float *c = p + j * MR;
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n)
    if (n < width) {
      store(c + n * MR, load(c + n * MR) - acc[n][0]);
      store(c + n * MR + kLanes, load(c + n * MR + kLanes) - acc[n][1]);
    }
}

// The factor's slivers of block [b, e), each down to its own diagonal.
inline void pack_triangle(const SweepArgs &a, int64_t b, int64_t e, float *out) {
  for (int64_t t = 0; t * NR < e - b; ++t) {
    const int64_t depth = min64((t + 1) * NR, e - b);
    float *pack = out + t * NB * NR;
    pack_sliver(a, b, depth, b + t * NR, min64(NR, e - b - t * NR), pack);
    // columns past the end have error 0, which must not meet whatever this memory held: 0 * NaN
    std::memset(pack + depth * NR, 0, static_cast<size_t>((t + 1) * NR - depth) * NR * 4);
  }
}

// The columns of block [b, e), at most NB: everything before b has been subtracted. They are rounded, or take the values
// given for each panel, (panels, n, MR) of which the first columns count.
template <bool kGiven = false>
inline void sweep_block(const SweepArgs &a, const Strip &s, int64_t b, int64_t e, const float *given = nullptr,
                        int64_t n = 0) {
  const int64_t slivers = ceil_div(e - b, NR), stride = NB * NR;
  pack_triangle(a, b, e, s.pack);
  for (int64_t q = 0; q < s.panels; ++q) {
    float *p = s.p + q * a.cols * MR;
    vec loss[2] = {};
    for (int64_t t = 0; t < slivers; ++t) {
      const int64_t j = b + t * NR, width = min64(NR, e - j);
      vec w[NR][2];
      clear_tile(w);
      multiply_tile(p + b * MR, s.pack + t * stride, t * NR, w);
#pragma GCC unroll 12
      for (int i = 0; i < NR; ++i)
        for (int v = 0; v < 2; ++v) w[i][v] = i < width ? load(p + (j + i) * MR + v * kLanes) - w[i][v] : vec{};
      round_sliver<kGiven>(a, s, q, j, width, s.pack + t * stride + t * NR * NR,
                           kGiven ? given + (q * n + t * NR) * MR : nullptr, w, loss);
    }
    for (int r = 0; r < MR; ++r) s.loss[q * MR + r] += loss[r / kLanes][r % kLanes];
  }
}

// Columns [j, e) less what the errors of columns [from, to) cost them.
inline void subtract_errors(const SweepArgs &a, const Strip &s, int64_t from, int64_t to, int64_t j, int64_t e) {
  const int64_t slivers = ceil_div(e - j, NR), stride = KC * NR;
  for (int64_t k0 = from; k0 < to; k0 += KC) {
    const int64_t depth = min64(KC, to - k0);
    for (int64_t t = 0; t < slivers; ++t)
      pack_sliver(a, k0, depth, j + t * NR, min64(NR, e - j - t * NR), s.pack + t * stride);
    for (int64_t q = 0; q < s.panels; ++q)
      for (int64_t t = 0; t < slivers; ++t)
        update_sliver(s.p + q * a.cols * MR, s.pack + t * stride, k0, depth, j + t * NR, min64(NR, e - j - t * NR));
  }
}

// All columns of a strip whose weights and grid are loaded.
inline void sweep_columns(const SweepArgs &a, const Strip &s) {
  for (int64_t r = 0; r < s.panels * MR; ++r) s.loss[r] = 0.0;
  for (int64_t b = 0; b < a.cols; b += NB) {
    const int64_t e = min64(b + NB, a.cols);
    subtract_errors(a, s, 0, b, b, e);
    sweep_block(a, s, b, e);
  }
}

inline int64_t strip_rows(int64_t rows, int64_t threads) {
  const int64_t fair = ceil_div(ceil_div(rows, threads), MR) * MR;
  return max64(MR, min64(kStripRows, fair));
}

}  // namespace
