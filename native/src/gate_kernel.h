// A gate's activation times what it lets through. Internal linkage, as vector.h says.
#pragma once

#include <cstdint>
#include <cstring>

#include "gate.h"
#include "lightgptq.h"
#include "vector.h"

namespace {

// x / (1 + e^-x), as arXiv 1702.03118, equation 5.
LGQ_INLINE vec silu(vec x, vec exponent) {
  const vec small = exponential(select(exponent < 0.0f, exponent, -exponent));
  return x * (select(exponent < 0.0f, small, vec{} + 1.0f) / (1.0f + small));
}

// x / 2 (1 + tanh(z)) = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415, section 2).
LGQ_INLINE vec activate(vec x, int32_t activation) {
  if (activation == LGQ_SILU) return silu(x, x);
  return silu(x, 1.5957691216f * (x + 0.044715f * x * x * x));
}

template <class F>
void gate_as(typename F::Type *gate, const typename F::Type *up, int64_t count, int32_t activation) {
  using Type = typename F::Type;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) F::store(gate + i, activate(F::load(gate + i), activation) * F::load(up + i));
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(Type);
  Type last[kLanes] = {}, through[kLanes] = {};
  std::memcpy(last, gate + i, bytes);
  std::memcpy(through, up + i, bytes);
  F::store(last, activate(F::load(last), activation) * F::load(through));
  std::memcpy(gate + i, last, bytes);
}

void apply_gate(void *gate, const void *up, int64_t count, int32_t dtype, int32_t activation) {
  if (dtype == LGQ_F32)
    gate_as<F32>(static_cast<float *>(gate), static_cast<const float *>(up), count, activation);
  else if (dtype == LGQ_BF16)
    gate_as<Bf16>(static_cast<uint16_t *>(gate), static_cast<const uint16_t *>(up), count, activation);
  else
    gate_as<Half>(static_cast<uint16_t *>(gate), static_cast<const uint16_t *>(up), count, activation);
}

}  // namespace
