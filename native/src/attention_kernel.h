// One query token of up to kHeadsAtOnce heads against a key head: y = softmax(scale q k^T) v, in one pass over both.
//
// Tokens come in blocks. Weights are relative to the largest score so far; what was summed is rescaled when a larger one
// comes (arXiv 1805.02867, algorithm 3). Internal linkage, as vector.h says.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "vector.h"
#include "lightgptq.h"

namespace {

using lgq::kHeadsAtOnce;

// The block's values wait in the first-level cache for its weights: 64 tokens of 64 floats are 16 KiB.
constexpr int64_t kBlock = 64;
constexpr float kInfinity = __builtin_inff();
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

struct Scratch {
  alignas(64) float q[kHeadsAtOnce][LGQ_WIDEST_HEAD];    // times scale
  alignas(64) float sum[kHeadsAtOnce][LGQ_WIDEST_HEAD];  // of weight * v
  alignas(64) float weight[kHeadsAtOnce][kBlock];        // of a block's tokens; before that, their scores
  float rescale[kHeadsAtOnce];                           // of sums, before a block is added
  float largest[kHeadsAtOnce];                           // score
  float weights[kHeadsAtOnce];                           // their sum
};

// weight[g][t] = q[g] . k[t] over whole vectors, for HEADS heads from the first one and four tokens.
template <class F, int HEADS>
LGQ_INLINE void score(Scratch &s, int64_t first, const typename F::Type *const (&k)[4], int64_t t, int64_t whole) {
  vec sum[HEADS][4] = {};
  for (int64_t d = 0; d < whole; d += kLanes)
    for (int i = 0; i < 4; ++i) {
      const vec column = F::load(k[i] + d);
      for (int g = 0; g < HEADS; ++g) sum[g][i] += at(s.q[first + g] + d) * column;
    }
  for (int g = 0; g < HEADS; ++g) {
    const quad scores = totals(sum[g]);
    std::memcpy(s.weight[first + g] + t, &scores, sizeof scores);
  }
}

template <class F>
LGQ_INLINE void score_block(Scratch &s, int64_t heads, const typename F::Type *k, int64_t stride, int64_t tokens,
                            int64_t dim) {
  constexpr int kHeads = kRegisters / 8;
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t t = 0; t < tokens; t += 4) {
    const typename F::Type *rows[4];  // past the last token it comes again
    for (int64_t i = 0; i < 4; ++i) rows[i] = k + (t + i < tokens ? t + i : tokens - 1) * stride;
    int64_t g = 0;
    for (; g + kHeads <= heads; g += kHeads) score<F, kHeads>(s, g, rows, t, whole);
    for (; g < heads; ++g) score<F, 1>(s, g, rows, t, whole);
  }
  if (whole < dim)
    for (int64_t t = 0; t < tokens; ++t, k += stride)
      for (int64_t g = 0; g < heads; ++g)
        for (int64_t d = whole; d < dim; ++d) s.weight[g][t] += s.q[g][d] * F::load_one(k[d]);
}

// A head's scores become weights.
LGQ_INLINE void weigh(Scratch &s, int64_t g, int64_t tokens) {
  float *weight = s.weight[g];
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = tokens; t < padded; ++t) weight[t] = -kInfinity;
  vec most = at(weight);
  for (int64_t t = kLanes; t < padded; t += kLanes) most = select(at(weight + t) > most, at(weight + t), most);
  const float before = s.largest[g];
  float top = before;
  for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
  // Where all scores are -infinity, so are their distances from 0: no weights, and 0 / 0 in the end, as it should be.
  const float reference = top == -kInfinity ? 0.0f : top;
  s.rescale[g] = top > before ? exponential(vec{} + (before - reference))[0] : 1.0f;
  s.largest[g] = top;
  vec sum = {};
  for (int64_t t = 0; t < padded; t += kLanes) sum += at(weight + t) = exponential(at(weight + t) - reference);
  s.weights[g] = s.weights[g] * s.rescale[g] + total(sum);
}

// sum[g] = sum[g] * rescale[g] + weight[g] v in VECTORS vectors of columns, for HEADS heads from the first one.
template <class F, int HEADS, int VECTORS>
LGQ_INLINE void add(Scratch &s, int64_t first, const typename F::Type *v, int64_t stride, int64_t tokens, int64_t d) {
  vec sum[HEADS][VECTORS];
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < VECTORS; ++i) sum[g][i] = at(s.sum[first + g] + d + i * kLanes) * s.rescale[first + g];
  v += d;
  for (int64_t t = 0; t < tokens; ++t, v += stride)
    for (int i = 0; i < VECTORS; ++i) {
      const vec column = F::load(v + i * kLanes);
      for (int g = 0; g < HEADS; ++g) sum[g][i] += column * s.weight[first + g][t];
    }
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < VECTORS; ++i) at(s.sum[first + g] + d + i * kLanes) = sum[g][i];
}

template <class F, int HEADS>
LGQ_INLINE void add_columns(Scratch &s, int64_t first, const typename F::Type *v, int64_t stride, int64_t tokens,
                            int64_t dim) {
  constexpr int kVectors = HEADS == 4 ? kRegisters / 8 : 4;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) add<F, HEADS, kVectors>(s, first, v, stride, tokens, d);
  for (; d + kLanes <= dim; d += kLanes) add<F, HEADS, 1>(s, first, v, stride, tokens, d);
  for (; d < dim; ++d)
    for (int64_t g = first; g < first + HEADS; ++g) {
      float sum = s.sum[g][d] * s.rescale[g];
      for (int64_t t = 0; t < tokens; ++t) sum += s.weight[g][t] * F::load_one(v[t * stride + d]);
      s.sum[g][d] = sum;
    }
}

template <class F>
LGQ_INLINE void add_block(Scratch &s, int64_t heads, const typename F::Type *v, int64_t stride, int64_t tokens,
                          int64_t dim) {
  int64_t g = 0;
  for (; g + 4 <= heads; g += 4) add_columns<F, 4>(s, g, v, stride, tokens, dim);
  for (; g + 2 <= heads; g += 2) add_columns<F, 2>(s, g, v, stride, tokens, dim);
  if (g < heads) add_columns<F, 1>(s, g, v, stride, tokens, dim);
}

template <class F>
LGQ_INLINE void begin_head(Scratch &s, int64_t g, const typename F::Type *q, float scale, int64_t dim) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) at(s.q[g] + d) = F::load(q + d) * scale;
  for (; d < dim; ++d) s.q[g][d] = F::load_one(q[d]) * scale;
  for (d = 0; d < dim; d += kLanes) at(s.sum[g] + d) = vec{};
  s.largest[g] = -kInfinity;
  s.weights[g] = 0.0f;
}

template <class F>
LGQ_INLINE void end_head(Scratch &s, int64_t g, typename F::Type *y, int64_t dim) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) F::store(y + d, at(s.sum[g] + d) / s.weights[g]);
  for (; d < dim; ++d) y[d] = F::round_one(s.sum[g][d] / s.weights[g]);
}

template <class F>
void attend_as(const lgq::AttendArgs &a, int64_t item) {
  using Type = typename F::Type;
  const int64_t group = a.heads / a.kv_heads, run = item % a.runs, kv_head = item / a.runs % a.kv_heads;
  const int64_t sequence = item / a.runs / a.kv_heads, dim = a.head_dim, first = run * kHeadsAtOnce;
  const int64_t heads = group - first < kHeadsAtOnce ? group - first : kHeadsAtOnce;
  const int64_t offset = (sequence * a.heads + kv_head * group + first) * dim;
  const Type *k = static_cast<const Type *>(a.k) + sequence * a.k_batch + kv_head * a.k_head;
  const Type *v = static_cast<const Type *>(a.v) + sequence * a.v_batch + kv_head * a.v_head;
  Scratch s;
  const Type *q = static_cast<const Type *>(a.q) + offset;
  for (int64_t g = 0; g < heads; ++g) begin_head<F>(s, g, q + g * dim, a.scale, dim);
  for (int64_t t = 0; t < a.tokens; t += kBlock) {
    const int64_t tokens = a.tokens - t < kBlock ? a.tokens - t : kBlock;
    score_block<F>(s, heads, k + t * a.k_token, a.k_token, tokens, dim);
    for (int64_t g = 0; g < heads; ++g) weigh(s, g, tokens);
    add_block<F>(s, heads, v + t * a.v_token, a.v_token, tokens, dim);
  }
  for (int64_t g = 0; g < heads; ++g) end_head<F>(s, g, static_cast<Type *>(a.y) + offset + g * dim, dim);
}

void attend(const lgq::AttendArgs &a, int64_t item) {
  if (a.dtype == LGQ_F32)
    attend_as<F32>(a, item);
  else if (a.dtype == LGQ_BF16)
    attend_as<Bf16>(a, item);
  else
    attend_as<Half>(a, item);
}

}  // namespace
