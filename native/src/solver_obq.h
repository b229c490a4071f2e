// Optimal Brain Quantizer (arXiv 2208.11580, section 5), one row at a time: round the weight whose rounding costs
// least, min (w - q)^2 / [H^-1]_pp over the inverse of what is left, and let the rest make up for it. A weight that
// was pushed off its grid by more than half a step goes first (same section, "outliers").
//
// The inverse is never updated. Removing column p subtracts v v^T with v = [H^-1]_:p / sqrt([H^-1]_pp), a pivoted
// Cholesky step, so the column needed next is the original one minus the stored v's times their p-th elements:
// cols^3 / 6 multiply-adds a row, read only, instead of the cols^3 of updating a full matrix. What is left is kept
// compact by moving the last element into the hole. Double precision: the greedy order is a chain of comparisons, and
// one that falls the other way changes everything after it.
#pragma once

#include "parallel.h"
#include "solver.h"
#include "solver_tile.h"

namespace {

using lgq::ObqArgs;

constexpr int kWide = kLanes / 2;  // doubles in a vector
typedef double dvec __attribute__((vector_size(kWide * sizeof(double)), aligned(kWide * sizeof(double)), may_alias));
typedef int64_t lvec __attribute__((vector_size(kWide * sizeof(int64_t)), aligned(kWide * sizeof(int64_t)), may_alias));

inline dvec load_d(const double *p) { return *reinterpret_cast<const dvec*>(p); }
inline void store_d(double *p, dvec v) { *reinterpret_cast<dvec*>(p) = v; }

struct ObqState {
  int64_t ld;                    // cols in whole vectors, plus a cache line against power-of-two strides
  double *w, *d, *step, *zero;   // (ld,) remaining weights, diagonal of their inverse, and grid
  int64_t *column;               // (ld,) where they come from
  double *coefficient;           // (ld,)
  double *v;                     // (cols, ld)
};

inline void start_row(const ObqArgs &a, int64_t row, const ObqState &s) {
  for (int64_t i = 0; i < s.ld; ++i) {
    const bool real = i < a.cols;
    const int64_t g = real ? a.group[i] : 0;
    s.w[i] = real ? a.w[row * a.cols + i] : 0.0;
    s.d[i] = real ? a.hinv[i * a.cols + i] : 1.0;
    s.step[i] = a.scales[g * a.rows + row];
    s.zero[i] = a.zeros[g * a.rows + row];
    s.column[i] = i;
  }
}

// Nearest level of the grid, in steps from zero.
template <class T>
inline T nearest(T w, T step, T zero, double max_code) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer, ties to even
  const T low = -zero, high = max_code - zero;
  T x = w / step;
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + magic) - magic;
}

struct Choice {
  dvec key = dvec{} + __builtin_huge_val();
  lvec column = lvec{} + INT64_MAX, position = lvec{};

  void offer(dvec keys, lvec columns, lvec positions, lvec allowed) {
    const lvec better = allowed & ((keys < key) | ((keys == key) & (columns < column)));
    key = better ? keys : key;
    column = better ? columns : column;
    position = better ? positions : position;
  }
  int best_lane() const {
    int l = 0;
    for (int k = 1; k < kWide; ++k)
      if (key[k] < key[l] || (key[k] == key[l] && column[k] < column[l])) l = k;
    return l;
  }
};

// Position of the weight to round next among the first m; of equal ones that with the lowest column.
inline int64_t choose(const ObqState &s, int64_t m, double max_code) {
  Choice cheapest, farthest;
  lvec lane;
  for (int l = 0; l < kWide; ++l) lane[l] = l;
  for (int64_t i = 0; i < m; i += kWide) {
    const dvec step = load_d(s.step + i), w = load_d(s.w + i);
    const dvec e = w - nearest(w, step, load_d(s.zero + i), max_code) * step, off = e / step;
    const lvec position = lane + i, column = *reinterpret_cast<const lvec*>(s.column + i), real = position < m;
    cheapest.offer(e * e / load_d(s.d + i), column, position, real);
    farthest.offer(off < 0.0 ? off : -off, column, position, real);
  }
  const int far = farthest.best_lane();
  // 1e-6: a value exactly between two levels is half a step away and no outlier
  return -farthest.key[far] > 0.5 + 1e-6 ? farthest.position[far] : cheapest.position[cheapest.best_lane()];
}

// out[0:m] -= sum_k coefficient[k] * v[k][0:m]
inline void subtract_removed(const ObqState &s, int64_t removed, int64_t m, double *out) {
  constexpr int kTile = 8;
  int64_t i = 0;
  for (; i + kTile * kWide <= ceil_div(m, kWide) * kWide; i += kTile * kWide) {
    dvec acc[kTile];
#pragma GCC unroll 8
    for (int n = 0; n < kTile; ++n) acc[n] = load_d(out + i + n * kWide);
    for (int64_t k = 0; k < removed; ++k) {
      const double c = s.coefficient[k];
      const double *v = s.v + k * s.ld + i;
#pragma GCC unroll 8
      for (int n = 0; n < kTile; ++n) acc[n] -= load_d(v + n * kWide) * c;
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTile; ++n) store_d(out + i + n * kWide, acc[n]);
  }
  for (; i < m; i += kWide) {
    dvec acc = load_d(out + i);
    for (int64_t k = 0; k < removed; ++k) acc -= load_d(s.v + k * s.ld + i) * s.coefficient[k];
    store_d(out + i, acc);
  }
}

// Moves the last of m weights to position p, in every vector kept; what column p held there becomes coefficient.
inline void take_out(const ObqState &s, int64_t p, int64_t m, int64_t removed) {
  const int64_t last = m - 1;
  s.w[p] = s.w[last];
  s.d[p] = s.d[last];
  s.step[p] = s.step[last];
  s.zero[p] = s.zero[last];
  s.column[p] = s.column[last];
  for (int64_t k = 0; k < removed; ++k) {
    double *v = s.v + k * s.ld;
    s.coefficient[k] = v[p];
    v[p] = v[last];
  }
}

inline void solve_row(const ObqArgs &a, int64_t row, const ObqState &s) {
  start_row(a, row, s);
  double loss = 0.0;
  for (int64_t m = a.cols; m > 0; --m) {
    const int64_t removed = a.cols - m, last = m - 1, p = choose(s, m, a.max_code), column = s.column[p];
    const double level = nearest(s.w[p], s.step[p], s.zero[p], a.max_code);
    const double e = s.w[p] - level * s.step[p], pivot = s.d[p], root = 1.0 / __builtin_sqrt(pivot);
    a.codes[row * a.cols + column] = static_cast<uint8_t>(static_cast<int>(level + s.zero[p]));
    loss += e * e / pivot;
    take_out(s, p, m, removed);
    double *v = s.v + removed * s.ld;
    const double *inverse = a.hinv + column * a.cols;
    for (int64_t i = 0; i < last; ++i) v[i] = inverse[s.column[i]];
    for (int64_t i = last; i < ceil_div(last, kWide) * kWide; ++i) v[i] = 0.0;
    subtract_removed(s, removed, last, v);
    for (int64_t i = 0; i < last; ++i) {
      v[i] *= root;
      s.w[i] -= e * root * v[i];
      s.d[i] -= v[i] * v[i];
    }
  }
  a.loss[row] = loss;
}

bool obq(const ObqArgs &a) {
  const int64_t ld = ceil_div(a.cols, 8) * 8 + 8;
  int64_t next = 0, done = 0;
  auto work = [&](int, int) {
    Scratch vectors(6 * ld * 8), v(a.cols * ld * 8);
    double *f = vectors.as<double>();
    if (!f || !v.as<double>()) return;
    const ObqState s{ld,     f, f + ld, f + 2 * ld, f + 3 * ld, reinterpret_cast<int64_t*>(f + 4 * ld),
                     f + 5 * ld, v.as<double>()};
    for (int64_t row = take(&next); row < a.rows; row = take(&next), take(&done)) solve_row(a, row, s);
  };
  lgq::parallel(static_cast<int>(min64(a.threads, a.rows)), work);
  return done == a.rows;
}

}  // namespace
