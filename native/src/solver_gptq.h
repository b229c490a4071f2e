// GPTQ over all columns: the plain sweep, or a search in windows of which the first part is kept.
//
// What decides in a window B is d G d with d = t - q and G = (U_BB^T U_BB)^-1: the loss that is left once the columns after
// it have been compensated. A sweep over a copy of the window's weights t finds codes to start from, coordinate descent
// better ones, and the kept columns are swept once more with these values given, which leaves their errors behind.
#pragma once

#include "lightgptq.h"
#include "parallel.h"
#include "solver.h"
#include "solver_descent.h"
#include "solver_sweep.h"

namespace {

// Scratch of a window for all panels of a strip.
struct Window {
  float *swept, *q;  // (panels, LGQ_WINDOW, MR)
  float *d;          // (LGQ_WINDOW, MR)
  float *slivers;    // of G
  double *loss;      // (panels, MR): of the sweep to start from, which nobody asks for
  uint8_t *codes;    // (panels, MR, LGQ_WINDOW)
};

// Good values for the columns [b, e) of every panel, in window.q as (panels, e - b, MR).
inline void search_window(const SweepArgs &a, const Strip &s, const Window &window, int64_t b, int64_t e, const float *g) {
  const int64_t n = e - b;
  for (int64_t q = 0; q < s.panels; ++q)
    std::memcpy(window.swept + q * n * MR, s.p + (q * a.cols + b) * MR, static_cast<size_t>(n * MR) * 4);
  SweepArgs alone = a;
  alone.u = a.u + b * a.ldu + b, alone.cols = n, alone.group = a.group + b, alone.err = nullptr;
  alone.rows = s.rows, alone.codes = window.codes, alone.ldcodes = n;
  sweep_columns(alone, {0, s.rows, s.panels, window.swept, s.grid, s.pack, window.loss});
  pack_curvature(g, n, n, window.slivers);
  for (int64_t q = 0; q < s.panels; ++q) {
    const DescentPanel panel{s.p + (q * a.cols + b) * MR, window.q + q * n * MR, window.d, window.slivers,
                             s.grid + q * a.groups * 2 * MR, a.group + b, n, static_cast<float>(a.max_code)};
    const int64_t rows = min64(MR, s.rows - q * MR);
    load_codes(panel, rows, window.codes + q * MR * n, n);
    descend_panel(panel, a.cycles);
  }
}

inline void search_columns(const SweepArgs &a, const Strip &s, const Window &window) {
  for (int64_t r = 0; r < s.panels * MR; ++r) s.loss[r] = 0.0;
  const float *g = a.curvature;
  int64_t ready = 0;  // columns that have taken the errors of all windows but the last
  for (int64_t b = 0, last = 0; b < a.cols;) {
    const int64_t e = min64(b + LGQ_WINDOW, a.cols), n = e - b;
    subtract_errors(a, s, last, b, b, ready);
    subtract_errors(a, s, 0, b, max64(b, ready), e);
    search_window(a, s, window, b, e, g);
    const int64_t fixed = e == a.cols ? e : b + LGQ_KEPT;
    sweep_block<true>(a, s, b, fixed, window.q, n);
    g += n * n, ready = e, last = b, b = fixed;
  }
}

inline void sweep_strip(const SweepArgs &a, const Strip &s, const Window &window) {
  load_strip(a, s);
  if (a.cycles > 0)
    search_columns(a, s, window);
  else
    sweep_columns(a, s);
  for (int64_t r = 0; r < s.rows; ++r) a.loss[s.first + r] = s.loss[r];
  if (a.err) store_errors(a, s);
}

bool sweep(const SweepArgs &a) {
  const int64_t height = strip_rows(a.rows, a.threads), strips = ceil_div(a.rows, height), panels = height / MR;
  const int64_t wide = a.cycles > 0 ? min64(LGQ_WINDOW, a.cols) : 0;
  int64_t next = 0, done = 0;
  // A thread that gets no memory leaves its strips to the others, so only a machine without any fails.
  auto work = [&](int, int) {
    Scratch p(panels * a.cols * MR * 4), grid(panels * a.groups * 2 * MR * 4);
    Scratch pack(max64(KC, NB) * NB * 4), loss(2 * panels * MR * 8), codes(panels * MR * wide);
    Scratch swept(panels * wide * MR * 4), q(panels * wide * MR * 4), d(wide * MR * 4);
    Scratch slivers(ceil_div(wide, NR) * NR * wide * 4);
    if (!p.as<float>() || !grid.as<float>() || !pack.as<float>() || !loss.as<double>() || !codes.as<uint8_t>() ||
        !swept.as<float>() || !q.as<float>() || !d.as<float>() || !slivers.as<float>())
      return;
    const Window window{swept.as<float>(), q.as<float>(), d.as<float>(), slivers.as<float>(),
                        loss.as<double>() + panels * MR, codes.as<uint8_t>()};
    for (int64_t i = take(&next); i < strips; i = take(&next), take(&done)) {
      const int64_t first = i * height, rows = min64(height, a.rows - first);
      sweep_strip(a, {first, rows, ceil_div(rows, MR), p.as<float>(), grid.as<float>(), pack.as<float>(),
                      loss.as<double>()}, window);
    }
  };
  lgq::parallel(static_cast<int>(min64(a.threads, strips)), work);
  return done == strips;
}

}  // namespace
