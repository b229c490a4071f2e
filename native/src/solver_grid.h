// The scale and zero of least weighted error, sum_i h_i (w_i - q(w_i))^2, for every row and group: the best of the
// candidates given, then the scale in closed form for the codes that it has, a few times over.
#pragma once

#include "convert.h"
#include "parallel.h"
#include "solver.h"
#include "solver_tile.h"

namespace {

using lgq::GridArgs;

// One group of one row, padded to whole vectors with weight 0 and importance 0.
struct Group {
  const float *w, *h;
  int64_t width;
};

struct Fit {
  float loss, scale;  // weighted error; the scale that would be best for the same codes
};

template <bool WithScale>
inline Fit try_scale(const Group &g, float scale, float zero, float max_code) {
  const float magic = 12582912.0f, inverse = 1.0f / scale;  // 1.5 * 2^23, see round_sliver
  const vec low = vec{} - zero, high = vec{} + (max_code - zero);
  vec loss = {}, product = {}, norm = {};
  for (int64_t i = 0; i < g.width; i += kLanes) {
    const vec w = load(g.w + i), h = load(g.h + i);
    vec x = w * inverse;
    x = x > low ? x : low;
    x = x < high ? x : high;
    x = (x + magic) - magic;
    const vec e = w - x * scale;
    loss += h * e * e;
    if (WithScale) {
      product += h * x * w;
      norm += h * x * x;
    }
  }
  float sums[3] = {};
  for (int l = 0; l < kLanes; ++l) sums[0] += loss[l], sums[1] += product[l], sums[2] += norm[l];
  return {sums[0], sums[2] > 0.0f ? sums[1] / sums[2] : scale};
}

// To float16 with the sign kept and never 0, as it will be stored; 0 when float16 cannot hold it.
inline float storable(float scale) {
  const float magnitude = __builtin_fmaxf(__builtin_fabsf(scale), 0x1p-24f);
  if (!(magnitude <= 65504.0f)) return 0.0f;
  return __builtin_copysignf(lgq::half_to_float(lgq::float_to_half(magnitude)), scale);
}

inline void search_group(const GridArgs &a, const Group &g, int64_t at) {
  const float max_code = static_cast<float>(a.max_code);
  const int64_t stride = a.rows * a.groups;
  float best = __builtin_inff(), scale = a.scales[at];
  int32_t zero = a.zeros[at];
  for (int64_t c = 0; c < a.candidates; ++c) {
    const float loss =
        try_scale<false>(g, a.scales[c * stride + at], static_cast<float>(a.zeros[c * stride + at]), max_code).loss;
    if (loss < best) best = loss, scale = a.scales[c * stride + at], zero = a.zeros[c * stride + at];
  }
  for (int32_t r = 0; r < a.refits; ++r) {
    const float fitted = storable(try_scale<true>(g, scale, static_cast<float>(zero), max_code).scale);
    if (fitted == 0.0f || fitted == scale) break;
    const float loss = try_scale<false>(g, fitted, static_cast<float>(zero), max_code).loss;
    if (!(loss < best)) break;
    best = loss, scale = fitted;
  }
  a.best_scales[at] = scale;
  a.best_zeros[at] = zero;
}

bool search_grid(const GridArgs &a) {
  const int64_t padded = ceil_div(a.group_width, kLanes) * kLanes;
  int64_t next = 0, done = 0;
  auto work = [&](int, int) {
    Scratch memory(2 * padded * 4);
    float *w = memory.as<float>();
    if (!w) return;
    std::memset(w, 0, static_cast<size_t>(2 * padded) * 4);
    float *h = w + padded;
    for (int64_t row = take(&next); row < a.rows; row = take(&next), take(&done))
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t first = g * a.group_width, width = min64(a.group_width, a.cols - first);
        std::memcpy(w, a.w + row * a.ldw + first, static_cast<size_t>(width) * 4);
        std::memcpy(h, a.importance + first, static_cast<size_t>(width) * 4);
        for (int64_t i = width; i < padded; ++i) w[i] = h[i] = 0.0f;
        search_group(a, {w, h, ceil_div(width, kLanes) * kLanes}, row * a.groups + g);
      }
  };
  lgq::parallel(static_cast<int>(min64(a.threads, a.rows)), work);
  return done == a.rows;
}

}  // namespace
