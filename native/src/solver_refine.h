// Refinement: given all other columns, the best real values of a block B are q_B + r_B H_BB^-1 with r = (w - q) H; a
// sweep over the block alone rounds them and coordinate descent improves them, where the block is a group also with other
// zeros and a better scale, and a row takes what lowers its loss most.
//
// A strip holds W and D = W - Q in the sweep's layout, (panel, column, MR rows), columns in the order of the blocks. What
// a block needs of D H is one product over all columns; the rest works on the block's columns and stays in cache.
#pragma once

#include "parallel.h"
#include "solver.h"
#include "solver_descent.h"
#include "solver_grid.h"
#include "solver_sweep.h"
#include "solver_tile.h"

namespace {

using lgq::RefineArgs;

// A run of columns [begin, begin + n) in the order of the blocks.
struct RefineBlock {
  int64_t begin, n;
  const float *u;  // (n, n) upper, H_BB^-1 = U^T U
};

struct RefineStrip {
  int64_t first, rows, panels;
  float *w, *d;    // (panels, cols, MR)
  float *grid;     // (panels, groups, 2, MR): scales, zeros as floats
  float *before;   // (panels, 1, 2, MR): a group's grid when its turn comes
  float *tried;    // (panels, 1, 2, MR): the same with other zeros
  float *pull;     // (panels, n, MR): D H
  float *target;   // (panels, n, MR): the best real values
  float *swept;    // (panels, n, MR): the same, and what a sweep makes of it
  float *gain;     // (panels, MR): change of the loss by the best codes so far, at most 0
  float *half, *steps, *move;               // (n, MR) of one panel
  float *to_half, *to_missing, *curvature;  // slivers of U^T, U and H_BB, each (ceil(n / NR), n, NR)
  float *pack;             // slivers of H, (cols / KC, ceil(n / NR), KC, NR)
  float *sweep_pack;       // slivers of U
  double *loss;            // (panels, MR): a sweep's
  int32_t *group;          // (n,)
  uint8_t *codes, *best;   // (panels, MR, n)
};

// Lays the arrays of floats out from base on, for blocks of up to n columns; how many floats they take. Base may be null.
inline int64_t lay_out(const RefineArgs &a, int64_t panels, int64_t n, float *base, RefineStrip &s) {
  int64_t used = 0;
  const auto next = [&](int64_t floats) {
    float *at = base ? base + used : nullptr;
    used += ceil_div(floats, 16) * 16;
    return at;
  };
  const int64_t wide = ceil_div(n, NR) * NR;
  s.w = next(panels * a.cols * MR);
  s.d = next(panels * a.cols * MR);
  s.grid = next(panels * a.groups * 2 * MR);
  s.before = next(panels * 2 * MR);
  s.tried = next(panels * 2 * MR);
  s.pull = next(panels * n * MR);
  s.target = next(panels * n * MR);
  s.swept = next(panels * n * MR);
  s.gain = next(panels * MR);
  s.half = next(n * MR);
  s.steps = next(n * MR);
  s.move = next(n * MR);
  s.to_half = next(wide * n);
  s.to_missing = next(wide * n);
  s.curvature = next(wide * n);
  s.pack = next(ceil_div(a.cols, KC) * KC * wide);
  s.sweep_pack = next(max64(KC, NB) * NB);
  return used;
}

inline void load_refined_strip(const RefineArgs &a, const RefineStrip &s) {
  for (int64_t q = 0; q < s.panels; ++q) {
    const int64_t first = s.first + q * MR, rows = min64(MR, s.first + s.rows - first);
    float *grid = s.grid + q * a.groups * 2 * MR, *d = s.d + q * a.cols * MR;
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t r = 0; r < MR; ++r) {
        grid[(2 * g) * MR + r] = r < rows ? a.scales[g * a.rows + first + r] : 1.0f;
        grid[(2 * g + 1) * MR + r] = r < rows ? static_cast<float>(a.zeros[g * a.rows + first + r]) : 0.0f;
      }
    float *w = s.w + q * a.cols * MR;
    for (int64_t r = 0; r < MR; ++r) {  // row by row, since a row stays in cache and its columns come in any order
      const float *from = a.w + (first + r) * a.ldw;
      const uint8_t *codes = a.codes + (first + r) * a.ldcodes;
      for (int64_t c = 0; c < a.cols; ++c) {
        const int64_t column = a.order[c], at = c * MR + r;
        if (r >= rows) {
          w[at] = d[at] = 0.0f;
          continue;
        }
        const float *scale = grid + a.group[column] * 2 * MR + r;
        w[at] = from[column];
        d[at] = from[column] - (static_cast<float>(codes[column]) - scale[MR]) * scale[0];
      }
    }
  }
}

// The symmetric H at columns k0 to k0 + depth and j to j + NR of the blocks' order, as (depth, NR), zero past the end.
inline void pack_symmetric(const RefineArgs &a, int64_t k0, int64_t depth, int64_t j, int64_t end, float *out) {
  for (int n = 0; n < NR; ++n) {
    if (j + n >= end) {
      for (int64_t k = 0; k < depth; ++k) out[k * NR + n] = 0.0f;
      continue;
    }
    const float *row = a.h + a.order[j + n] * a.ldh;
    for (int64_t k = 0; k < depth; ++k) out[k * NR + n] = row[a.order[k0 + k]];
  }
}

// Slivers of H's columns in the block, whole rows at a time: they come in any order and are read once.
inline void pack_pull(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  const int64_t slivers = ceil_div(b.n, NR);
  for (int64_t j = 0; j < slivers * NR; ++j) {
    const float *row = j < b.n ? a.h + a.order[b.begin + j] * a.ldh : nullptr;
    for (int64_t k0 = 0; k0 < a.cols; k0 += KC) {
      float *out = s.pack + (k0 * slivers + j / NR * KC) * NR + j % NR;
      const int64_t depth = min64(KC, a.cols - k0);
      for (int64_t k = 0; k < depth; ++k) out[k * NR] = row ? row[a.order[k0 + k]] : 0.0f;
    }
  }
}

// pull = D H in the block's columns.
inline void pull_block(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  const int64_t slivers = ceil_div(b.n, NR);
  pack_pull(a, s, b);
  for (int64_t k0 = 0; k0 < a.cols; k0 += KC)
    for (int64_t q = 0; q < s.panels; ++q)
      for (int64_t t = 0; t < slivers; ++t) {
        vec acc[NR][2];
        clear_tile(acc);
        multiply_tile(s.d + (q * a.cols + k0) * MR, s.pack + (k0 * slivers + t * KC) * NR, min64(KC, a.cols - k0), acc);
        float *out = s.pull + (q * b.n + t * NR) * MR;
#pragma GCC unroll 12
        for (int n = 0; n < NR; ++n)
          if (t * NR + n < b.n)
            for (int v = 0; v < 2; ++v) {
              float *at = out + n * MR + v * kLanes;
              store(at, k0 == 0 ? acc[n][v] : load(at) + acc[n][v]);
            }
      }
}

inline void pack_block(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  const int64_t n = b.n, end = b.begin + n;
  for (int64_t j = 0; j < n; j += NR) {
    pack_symmetric(a, b.begin, n, b.begin + j, end, s.curvature + j * n);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < NR; ++i) {
        const bool inside = j + i < n;
        s.to_missing[j * n + k * NR + i] = inside && k <= j + i ? b.u[k * n + j + i] : 0.0f;
        s.to_half[j * n + k * NR + i] = inside && k >= j + i ? b.u[(j + i) * n + k] : 0.0f;
      }
  }
  for (int64_t i = 0; i < n; ++i) s.group[i] = a.single_groups ? 0 : a.group[a.order[b.begin + i]];
}

// out = a @ B for one panel, a and out (n, MR), B as slivers of which only depths [from, to) of column j are not 0.
enum class Triangle { upper, lower };
template <Triangle kShape>
inline void multiply_block(const float *a, const float *slivers, int64_t n, float *out) {
  for (int64_t j = 0; j < n; j += NR) {
    const bool upper = kShape == Triangle::upper;
    const int64_t from = upper ? 0 : j, to = upper ? min64(j + NR, n) : n;
    vec acc[NR][2];
    clear_tile(acc);
    multiply_tile(a + from * MR, slivers + j * n + from * NR, to - from, acc);
#pragma GCC unroll 12
    for (int i = 0; i < NR; ++i)
      if (j + i < n) {
        store(out + (j + i) * MR, acc[i][0]);
        store(out + (j + i) * MR + kLanes, acc[i][1]);
      }
  }
}

// target = Q_B + D H U^T U
inline void aim_block(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  for (int64_t q = 0; q < s.panels; ++q) {
    float *target = s.target + q * b.n * MR;
    const float *w = s.w + (q * a.cols + b.begin) * MR, *d = s.d + (q * a.cols + b.begin) * MR;
    multiply_block<Triangle::lower>(s.pull + q * b.n * MR, s.to_half, b.n, s.half);
    multiply_block<Triangle::upper>(s.half, s.to_missing, b.n, target);
    for (int64_t i = 0; i < b.n * MR; ++i) target[i] += w[i] - d[i];
  }
}

struct Sums {
  vec move_pull[2], move_move[2], steps_pull[2], steps_move[2], steps_steps[2];
};

// Of one panel: products of the move to other codes, and of their steps, with D H and under H_BB.
inline void measure(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b, int64_t q, Sums &sums) {
  const float *pull = s.pull + q * b.n * MR;
  sums = {};
  for (int64_t j = 0; j < b.n; j += NR) {
    vec moved[NR][2], stepped[NR][2];
    clear_tile(moved);
    multiply_tile(s.move, s.curvature + j * b.n, b.n, moved);
    clear_tile(stepped);
    if (a.single_groups) multiply_tile(s.steps, s.curvature + j * b.n, b.n, stepped);
    for (int i = 0; i < NR && j + i < b.n; ++i)
      for (int v = 0; v < 2; ++v) {
        const int64_t at = (j + i) * MR + v * kLanes;
        const vec move = load(s.move + at), step = load(s.steps + at), pulled = load(pull + at);
        sums.move_pull[v] += move * pulled;
        sums.move_move[v] += move * moved[i][v];
        sums.steps_pull[v] += step * pulled;
        sums.steps_move[v] += step * moved[i][v];
        sums.steps_steps[v] += step * stepped[i][v];
      }
  }
}

// A sweep over the block's target on a grid (panels, groups, 2, MR), and descent from there.
inline void round_target(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b, float *grid, int64_t groups) {
  std::memcpy(s.swept, s.target, static_cast<size_t>(s.panels * b.n * MR) * 4);
  const SweepArgs sweep{nullptr, 0, b.u, b.n, s.rows, b.n, nullptr, nullptr, s.group, groups,
                        a.max_code, 0, nullptr, s.codes, b.n, nullptr, 0, nullptr, 1};
  sweep_columns(sweep, {0, s.rows, s.panels, s.swept, grid, s.sweep_pack, s.loss});
  for (int64_t q = 0; a.cycles > 0 && q < s.panels; ++q) {
    const DescentPanel panel{s.target + q * b.n * MR, s.steps, s.move, s.curvature, grid + q * groups * 2 * MR, s.group,
                             b.n, static_cast<float>(a.max_code)};
    const int64_t rows = min64(MR, s.rows - q * MR);
    uint8_t *codes = s.codes + q * MR * b.n;
    load_codes(panel, rows, codes, b.n);
    descend_panel(panel, a.cycles);
    store_codes(panel, rows, codes, b.n);
  }
}

// Codes that a sweep found on a grid, for the rows of panel q that gain by them; of a group also with the scale that
// suits them: along that scale the loss is a parabola.
inline void judge(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b, int64_t q, const float *grid) {
  const int64_t rows = min64(MR, s.rows - q * MR);
  const float *w = s.w + (q * a.cols + b.begin) * MR, *d = s.d + (q * a.cols + b.begin) * MR;
  for (int64_t i = 0; i < b.n; ++i) {
    const float *scale = grid + s.group[i] * 2 * MR, *zero = scale + MR;
    for (int64_t r = 0; r < MR; ++r) s.steps[i * MR + r] = s.move[i * MR + r] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      const float step = static_cast<float>(s.codes[(q * MR + r) * b.n + i]) - zero[r];
      s.steps[i * MR + r] = step;
      s.move[i * MR + r] = step * scale[r] - (w[i * MR + r] - d[i * MR + r]);
    }
  }
  Sums sums;
  measure(a, s, b, q, sums);
  float *kept = s.grid + (q * a.groups + a.group[a.order[b.begin]]) * 2 * MR;
  for (int64_t r = 0; r < rows; ++r) {
    const auto of = [&](const vec (&sum)[2]) { return sum[r / kLanes][r % kLanes]; };
    float change = of(sums.move_move) - 2.0f * of(sums.move_pull), scale = grid[r];
    const float norm = of(sums.steps_steps), slope = of(sums.steps_pull) - of(sums.steps_move);
    if (a.single_groups && norm > 0.0f) {
      const float fitted = storable(scale + slope / norm), by = fitted - scale;
      const float with_fitted = change + by * (by * norm - 2.0f * slope);
      if (fitted != 0.0f && with_fitted < change) change = with_fitted, scale = fitted;
    }
    if (!(change < s.gain[q * MR + r])) continue;
    s.gain[q * MR + r] = change;
    std::memcpy(s.best + (q * MR + r) * b.n, s.codes + (q * MR + r) * b.n, static_cast<size_t>(b.n));
    if (a.single_groups) kept[r] = scale, kept[MR + r] = grid[MR + r];
  }
}

inline void try_codes(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  if (!a.single_groups) {
    round_target(a, s, b, s.grid, a.groups);
    for (int64_t q = 0; q < s.panels; ++q) judge(a, s, b, q, s.grid + q * a.groups * 2 * MR);
    return;
  }
  const int64_t group = a.group[a.order[b.begin]];
  for (int64_t q = 0; q < s.panels; ++q)
    std::memcpy(s.before + q * 2 * MR, s.grid + (q * a.groups + group) * 2 * MR, 2 * MR * 4);
  constexpr float kShifts[] = {0.0f, -1.0f, 1.0f};
  for (int shift = 0; shift < (a.move_zeros ? 3 : 1); ++shift) {
    for (int64_t i = 0; i < s.panels * 2 * MR; ++i) {
      const bool is_zero = i / MR % 2 == 1;
      const float moved = s.before[i] + kShifts[shift], top = static_cast<float>(a.max_code);
      s.tried[i] = !is_zero || shift == 0 ? s.before[i] : moved < 1.0f ? 1.0f : moved > top ? top : moved;
    }
    round_target(a, s, b, s.tried, 1);
    for (int64_t q = 0; q < s.panels; ++q) judge(a, s, b, q, s.tried + q * 2 * MR);
  }
}

// Rows that gain take the best codes that were found.
inline void accept(const RefineArgs &a, const RefineStrip &s, const RefineBlock &b) {
  for (int64_t row = 0; row < s.rows; ++row) {
    if (!(s.gain[row] < 0.0f)) continue;
    const int64_t q = row / MR, r = row % MR, at = s.first + row;
    a.gained[at] -= s.gain[row];
    for (int64_t i = 0; i < b.n; ++i) {
      const int64_t column = a.order[b.begin + i];
      const float *scale = s.grid + (q * a.groups + a.group[column]) * 2 * MR + r;
      const uint8_t code = s.best[row * b.n + i];
      a.codes[at * a.ldcodes + column] = code;
      const int64_t in_strip = (q * a.cols + b.begin + i) * MR + r;
      s.d[in_strip] = s.w[in_strip] - (static_cast<float>(code) - scale[MR]) * scale[0];
    }
    if (!a.single_groups) continue;
    const int64_t group = a.group[a.order[b.begin]];
    const float *scale = s.grid + (q * a.groups + group) * 2 * MR + r;
    a.scales[group * a.rows + at] = scale[0];
    a.zeros[group * a.rows + at] = static_cast<int32_t>(scale[MR]);
  }
}

inline void refine_strip(const RefineArgs &a, const RefineStrip &s) {
  load_refined_strip(a, s);
  const float *u = a.u;
  for (int64_t i = 0; i < a.blocks; ++i) {
    const RefineBlock b{a.first[i], a.first[i + 1] - a.first[i], u};
    u += b.n * b.n;
    pack_block(a, s, b);
    pull_block(a, s, b);
    aim_block(a, s, b);
    for (int64_t r = 0; r < s.panels * MR; ++r) s.gain[r] = 0.0f;
    try_codes(a, s, b);
    accept(a, s, b);
  }
}

bool refine(const RefineArgs &a) {
  int64_t widest = 0;
  for (int64_t i = 0; i < a.blocks; ++i) widest = max64(widest, a.first[i + 1] - a.first[i]);
  const int64_t height = strip_rows(a.rows, a.threads), strips = ceil_div(a.rows, height), panels = height / MR;
  int64_t next = 0, done = 0;
  // A thread that gets no memory leaves its strips to the others, so only a machine without any fails.
  auto work = [&](int, int) {
    RefineStrip s{};
    Scratch floats(lay_out(a, panels, widest, nullptr, s) * 4), loss(panels * MR * 8), group(widest * 4);
    Scratch codes(panels * MR * widest), best(panels * MR * widest);
    s.loss = loss.as<double>(), s.group = group.as<int32_t>();
    s.codes = codes.as<uint8_t>(), s.best = best.as<uint8_t>();
    if (!floats.as<float>() || !s.loss || !s.group || !s.codes || !s.best) return;
    lay_out(a, panels, widest, floats.as<float>(), s);
    for (int64_t i = take(&next); i < strips; i = take(&next), take(&done)) {
      s.first = i * height;
      s.rows = min64(height, a.rows - s.first);
      s.panels = ceil_div(s.rows, MR);
      refine_strip(a, s);
    }
  };
  lgq::parallel(static_cast<int>(min64(a.threads, strips)), work);
  return done == strips;
}

}  // namespace
