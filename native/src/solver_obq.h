// Optimal Brain Quantizer (arXiv 2208.11580, section 4), one row at a time: repeatedly round the weight whose rounding
// costs least, min (w - q)^2 / [H^-1]_jj over the inverse of what is left, and let the rest make up for it.
//
// The inverse is never updated. Removing column p subtracts v v^T with v = [H^-1]_:p / sqrt([H^-1]_pp), a pivoted
// Cholesky step, so the column needed next is the original one minus the stored v's times their p-th elements:
// cols^3 / 6 multiply-adds a row, read only, instead of the cols^3 of updating a full matrix. What is left is kept
// compact by moving the last element into the hole.
#pragma once

#include <atomic>
#include <cmath>

#include "solver.h"
#include "solver_tile.h"

namespace {

using lightgptq::ObqArgs;

struct ObqState {
  int64_t ld;    // cols padded to whole vectors, plus one cache line against power-of-two strides
  float *w, *d, *step, *zero;  // (ld,) remaining weights, diagonal of the inverse and grid
  int32_t* index;              // (ld,) their columns
  float* coefficient;          // (cols,)
  float* v;                    // (cols, ld)
};

inline void start_row(const ObqArgs& a, int64_t row, const ObqState& s) {
  for (int64_t i = 0; i < s.ld; ++i) {
    const bool real = i < a.cols;
    const int64_t g = real ? a.group[i] : 0;
    s.w[i] = real ? a.w[row * a.cols + i] : 0.0f;
    s.d[i] = real ? a.hinv[i * a.cols + i] : 1.0f;
    s.step[i] = a.scales[g * a.rows + row];
    s.zero[i] = static_cast<float>(a.zeros[g * a.rows + row]);
    s.index[i] = static_cast<int32_t>(i);
  }
}

// Position of the cheapest of the first m weights; of equal ones that with the lowest column. NaN costs never win.
inline int64_t cheapest(const ObqState& s, int64_t m, float max_code) {
  const float magic = 12582912.0f;  // 1.5 * 2^23, see round_sliver
  vec best = vec{} + HUGE_VALF;
  ivec column = ivec{} + INT32_MAX, where = ivec{};
  ivec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int64_t i = 0; i < m; i += kLanes) {
    const vec zero = load(s.zero + i), low = -zero, high = max_code - zero, step = load(s.step + i), w = load(s.w + i);
    vec x = w / step;
    x = x > low ? x : low;
    x = x < high ? x : high;
    x = (x + magic) - magic;
    const vec e = w - x * step, cost = e * e / load(s.d + i);
    const ivec index = *reinterpret_cast<const ivec*>(s.index + i), at = lane + static_cast<int32_t>(i);
    const ivec better = (at < static_cast<int32_t>(m)) & ((cost < best) | ((cost == best) & (index < column)));
    best = better ? cost : best;
    column = better ? index : column;
    where = better ? at : where;
  }
  int l = 0;
  for (int k = 1; k < kLanes; ++k)
    if (best[k] < best[l] || (best[k] == best[l] && column[k] < column[l])) l = k;
  return where[l];
}

// out[0:m] -= sum_s coefficient[s] * v[s][0:m]
inline void subtract_removed(const ObqState& s, int64_t removed, int64_t m, float* out) {
  int64_t i = 0;
  for (; i + 8 * kLanes <= ceil_div(m, kLanes) * kLanes; i += 8 * kLanes) {
    vec acc[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) acc[n] = load(out + i + n * kLanes);
    for (int64_t k = 0; k < removed; ++k) {
      const float c = s.coefficient[k];
      const float* v = s.v + k * s.ld + i;
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) acc[n] -= load(v + n * kLanes) * c;
    }
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) store(out + i + n * kLanes, acc[n]);
  }
  for (; i < m; i += kLanes) {
    vec acc = load(out + i);
    for (int64_t k = 0; k < removed; ++k) acc -= load(s.v + k * s.ld + i) * s.coefficient[k];
    store(out + i, acc);
  }
}

double obq_row(const ObqArgs& a, int64_t row, const ObqState& s) {
  start_row(a, row, s);
  const float max_code = static_cast<float>(a.max_code);
  double loss = 0.0;
  for (int64_t m = a.cols; m > 0; --m) {
    const int64_t removed = a.cols - m, p = cheapest(s, m, max_code), last = m - 1, column = s.index[p];
    float x = s.w[p] / s.step[p];
    x = x > -s.zero[p] ? x : -s.zero[p];
    x = x < max_code - s.zero[p] ? x : max_code - s.zero[p];
    x = std::nearbyintf(x);
    const float e = s.w[p] - x * s.step[p], pivot = s.d[p], scaled = e / pivot, root = 1.0f / std::sqrt(pivot);
    a.codes[row * a.cols + column] = static_cast<uint8_t>(static_cast<int32_t>(x + s.zero[p]));
    loss += static_cast<double>(e) * e / pivot;

    s.w[p] = s.w[last], s.d[p] = s.d[last], s.step[p] = s.step[last], s.zero[p] = s.zero[last];
    s.index[p] = s.index[last];
    for (int64_t k = 0; k < removed; ++k) {
      float* v = s.v + k * s.ld;
      s.coefficient[k] = v[p];
      v[p] = v[last];
    }
    float* v = s.v + removed * s.ld;
    const float* inverse = a.hinv + column * a.cols;
    for (int64_t i = 0; i < last; ++i) v[i] = inverse[s.index[i]];
    for (int64_t i = last; i < ceil_div(last, kLanes) * kLanes; ++i) v[i] = 0.0f;
    subtract_removed(s, removed, last, v);
    for (int64_t i = 0; i < last; ++i) {
      s.w[i] -= scaled * v[i];
      v[i] *= root;
      s.d[i] -= v[i] * v[i];
    }
  }
  return loss;
}

bool obq(const ObqArgs& a) {
  const int64_t ld = ceil_div(a.cols, 16) * 16 + 16;
  std::atomic<int64_t> next{0}, done{0};
#pragma omp parallel num_threads(static_cast<int>(min64(a.threads, a.rows)))
  {
    Scratch vectors(6 * ld), v(a.cols * ld);
    if (vectors.data() && v.data()) {
      float* f = vectors.data();
      const ObqState s{ld,     f, f + ld, f + 2 * ld, f + 3 * ld, reinterpret_cast<int32_t*>(f + 4 * ld),
                       f + 5 * ld, v.data()};
      for (int64_t row = next++; row < a.rows; row = next++, ++done) a.loss[row] = obq_row(a, row, s);
    }
  }
  return done == a.rows;
}

}  // namespace
