// What kernels share that multiply four inputs at a time and have no bf16 dot products: activations in quads.
//
//   [quad of 4 inputs][digit][row of the tile][4 inputs]
//
// with one "digit" for int8 arithmetic and for float32.
//
// Fixed point: with 2^e the power of two at or below a segment's largest |x|, x = n 2^(e - 21), |n| < 2^22, with three
// digits, and x = n 2^(e - 29) with four. A bfloat16 down to 2^-14 of the largest and a float16 down to 2^-11 are exact in
// three digits, a float32 down to 2^-6 in four; what is smaller is off by at most half a step, 2^-22 or 2^-30 of the largest.
// A float32 accumulator that has met the largest product rounds everything after it to 2^-24 of that, so this is
// no less exact than float32 sums, and the sums themselves are made without rounding.
#pragma once

#include "matmul_driver.h"

namespace {

constexpr bool has_digits(int T) { return T > 10; }
constexpr int digits_of(int T) { return has_digits(T) ? T - 10 : 1; }

typedef float quad_floats __attribute__((vector_size(16)));
typedef int32_t quad_numbers __attribute__((vector_size(16)));
typedef uint32_t quad_words __attribute__((vector_size(16)));
typedef uint8_t quad_bytes16 __attribute__((vector_size(16)));

struct QuadKernel {
  static int code_offset(const Product &) { return 0; }
  static constexpr int64_t word_bytes(int T) { return T == kFloat ? 4 : digits_of(T); }
  static constexpr bool has_row(int) { return false; }
  static constexpr int least_panel_rows(int, int) { return kNever; }
  static constexpr int kAloneAhead = 0;

  static void store_row(const float *totals, const float *bias, void *y, int32_t dtype, int64_t at, int count) {
    for (int o = 0; o < count; ++o) store_float(y, dtype, at + o, totals[o] + bias[o]);
  }
};

inline float sum_of(const float *f, int n) {
  quad_floats sum[2] = {};
  for (int k = 0; k < n; k += 8) {
    quad_floats part[2];
    std::memcpy(part, f + k, sizeof part);
    sum[0] += part[0];
    sum[1] += part[1];
  }
  sum[0] += sum[1];
  return (sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3]);
}

// Where the words of one row of a tile go: `stride` bytes from one digit to the next.
struct QuadOutput {
  uint8_t *at;
  int64_t stride;
};

// Writes the digits of n inputs, the highest first; returns the step of the last, a NaN where an input is not finite.
template <int D>
inline float round_to_digits(const float *f, int n, QuadOutput out) {
  const uint32_t most = largest_magnitude(f, n);
  const bool finite = most < kInfinity;
  constexpr int places = 8 * D - 3;
  // below 2^-90 the digits lose places: nothing that a float32 sum would notice
  const int biased = !finite ? 254 : static_cast<int>(most >> 23) < 127 - 90 ? 127 - 90 : static_cast<int>(most >> 23);
  const float inverse = bits_to_float(static_cast<uint32_t>(254 + places - biased) << 23);
  // Adding 128 to each byte makes the bytes below carry into those above as signed digits want it.
  constexpr uint32_t bias = D == 3 ? 0x00808080u : 0x80808080u;
  for (int k = 0; k < n; k += 4) {
    quad_floats value;
    std::memcpy(&value, f + k, sizeof value);
    value *= inverse;
    value += value < 0.0f ? quad_floats{} - 0.5f : quad_floats{} + 0.5f;
    const auto number = (quad_words)__builtin_convertvector(value, quad_numbers);
    const auto bytes = (quad_bytes16)((number + bias) ^ bias);
    const quad_bytes16 words = D == 3 ? __builtin_shufflevector(bytes, bytes, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15)
                                      : __builtin_shufflevector(bytes, bytes, 3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12);
    uint32_t word[4];
    std::memcpy(word, &words, sizeof word);
    for (int d = 0; d < D; ++d, out.at += out.stride) std::memcpy(out.at, word + d, 4);
  }
  return finite ? bits_to_float(static_cast<uint32_t>(biased - places) << 23) : __builtin_nanf("");
}

// One segment of one row: words, the start value of its accumulators (the negated sum) and the scale of its integers.
// The start value of a symmetric grid carries its zero, counted from `code_offset`, the code that the kernel sees as 0.
template <int T>
void prepare_quads(const Product &p, int code_offset, const Activations &x, int64_t row, const Tile &tile, int64_t s) {
  const Segment &segment = p.w.segments[s];
  const int n = segment.units * kUnit;
  const int64_t lane = row - tile.start, at = x.number_at(tile.start, s) + lane;
  constexpr int64_t bytes = T == kFloat ? 16 : 4;  // of a quad's digit
  uint8_t *words = x.words_at(tile.start, segment) + lane * bytes;
  const int factor = p.w.header->symmetric ? code_offset - p.w.header->zero : -1;
  alignas(64) float f[kSegment];
  load_segment(p, row, segment, f);
  if constexpr (has_digits(T)) {
    x.init[at] = static_cast<float>(factor) * sum_of(f, n);
    x.scale[at] = round_to_digits<digits_of(T)>(f, n, {words, tile.rows * bytes});
  } else if constexpr (T == kFloat) {
    x.init[at] = static_cast<float>(factor) * sum_of(f, n);
    for (int k = 0; k < n; k += 4, words += tile.rows * bytes) std::memcpy(words, f + k, bytes);
  } else {
    int8_t q[kSegment];
    x.scale[at] = round_to_int8(f, n, q);
    int32_t sum = 0;
    for (int k = 0; k < n; ++k) sum += q[k];
    reinterpret_cast<int32_t *>(x.init)[at] = factor * sum;
    for (int k = 0; k < n; k += 4, words += tile.rows * bytes) std::memcpy(words, q + k, bytes);
  }
}

template <int T>
void prepare_rows_as(const Product &p, int code_offset, int64_t begin, int64_t end) {
  const Activations x(p, QuadKernel::word_bytes(T));
  for (int64_t row = begin; row < end; ++row) {
    const Tile tile = tile_of(row, p.rows);
    for (int64_t s = 0; s < x.segments; ++s) prepare_quads<T>(p, code_offset, x, row, tile, s);
  }
  if (end == p.rows) x.clear_padding(p, T == kFloat ? 16 : 4);
}

// A kernel's entry points, for the forms that its form() chooses from.
template <class Kernel, int... T>
struct QuadEntries {
  static int64_t scratch_bytes(const Product &p) {
    return Activations::bytes(p, Kernel::word_bytes(Kernel::form(p)));
  }
  static void prepare_rows(const Product &p, int64_t begin, int64_t end) {
    const int form = Kernel::form(p);
    ((form == T ? prepare_rows_as<T>(p, Kernel::code_offset(p), begin, end) : void()), ...);
  }
  static void multiply_blocks(const Product &p, int64_t begin, int64_t end) {
    multiply_in_form<Kernel, T...>(p, Kernel::form(p), begin, end);
  }
  static constexpr MatmulKernels kernels = {scratch_bytes, prepare_rows, multiply_blocks};
};

}  // namespace
