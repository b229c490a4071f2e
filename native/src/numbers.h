// The three types of numbers as C++ types, for functions that are written once for all of them and compiled without flags of
// their own. Internal linkage.
#pragma once

#include "convert.h"

namespace lgq {
namespace {

template <class Number>
struct Format;
template <>
struct Format<float> {
  static float load(float f) { return f; }
  static float store(float f) { return f; }
};
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
template <>
struct Format<Bf16> {
  static float load(Bf16 b) { return bf16_to_float(b.bits); }
  static Bf16 store(float f) { return {float_to_bf16(f)}; }
};
template <>
struct Format<Half> {
  static float load(Half h) { return half_to_float(h.bits); }
  static Half store(float f) { return {float_to_half(f)}; }
};

}  // namespace
}  // namespace lgq
