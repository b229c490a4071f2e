// Scalar conversions between float32 and the 16-bit floats. Internal linkage: included by files of every instruction set.
//
// LGQ_INLINE: the same, for what must be inlined whatever the compiler thinks of its size.
#pragma once

#include <cstdint>
#include <cstring>

#include "lightgptq.h"

#if !defined(LGQ_INLINE)  // the emulation of AVX-512 has its own
#define LGQ_INLINE static inline __attribute__((always_inline))
#endif

namespace lgq {

static inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

static inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }

// Round to nearest even; a NaN stays one.
static inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  // Moving the exponent by a multiplication handles subnormals; infinities and NaN need their exponent set.
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : float_to_bits(magnitude);
  return bits_to_float(sign | bits);
}

// Round to nearest even, overflow to infinity.
static inline uint16_t float_to_half(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Adding 0.5 makes the hardware round at the subnormals' last place.
    const uint32_t sum = float_to_bits(bits_to_float(rest) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

static inline float load_float(const void *p, int32_t dtype, int64_t i) {
  if (dtype == LGQ_F32) return static_cast<const float *>(p)[i];
  const uint16_t bits = static_cast<const uint16_t *>(p)[i];
  return dtype == LGQ_BF16 ? bf16_to_float(bits) : half_to_float(bits);
}

static inline void store_float(void *p, int32_t dtype, int64_t i, float f) {
  if (dtype == LGQ_F32)
    static_cast<float *>(p)[i] = f;
  else
    static_cast<uint16_t *>(p)[i] = dtype == LGQ_BF16 ? float_to_bf16(f) : float_to_half(f);
}

}  // namespace lgq
