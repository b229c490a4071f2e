// The loops around the register tile, the same for every instruction set: blocks of outputs, bands of rows, segments of
// inputs, tiles of rows. A file of one instruction set includes this and supplies `Kernel`:
//
//   template <int BITS, int T> static void grid(scales, zeros, Grid *)         scale and zero of 64 outputs
//   template <int BITS, int T, int MR, int AHEAD> static void tile(TileArgs)   totals += one segment for MR rows; fetches
//                                                                              1 / AHEAD of the next one, 0: nothing
//   static constexpr int kAloneAhead                                           AHEAD of a tile that is alone
//   static constexpr bool has_row(T)                                           whether it has, for a product of one row,
//   template <int BITS, int T> static void row(RowArgs)                        totals = all segments
//   static constexpr int least_panel_rows(BITS, T)                             rows of a band from which codes are unpacked
//   static constexpr int panel_units(BITS, T)                                  for all tiles, so many units at once, and
//   template <int BITS, int T> static void unpack(codes, units, const Grid &,  multiplied by panel_tile, whose `codes`
//                                                 uint8_t *panel)              are what unpack left; 0: always, then it
//   template <int BITS, int T, int MR, int AHEAD> static void panel_tile(TileArgs)   has no tile; kNever: no panels
//   static void store_row(const float *totals, const float *bias, void *y, ...)
//   static int64_t word_bytes(T)                                               bytes of prepared activation per input
//
// T says what an activation is, see below.
// Internal linkage throughout: the linker must not merge versions compiled with different flags.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "matmul.h"

namespace {

using namespace lgq;

// Forms of a prepared activation: one byte, rounded to 8 bits per segment (int8 arithmetic); itself as bfloat16 or float32;
// three or four bytes, the digits of a fixed-point number (matmul_quads.h, matmul_rare_third.h).
constexpr int kInt8 = 0, kBf16 = 1, kFloat = 4, kThreeDigits = 13, kFourDigits = 14;

// 4 rows x 4 vectors: each activation that is broadcast serves four products. 8 or 12 rows x 2 vectors have fewer loads
// in all, but their broadcasts compete with the dot products (Zen 4, int8: 0.81 and 0.75 of peak against 0.88).
constexpr int kTileRows = 4;
// While they multiply, each of the first four tiles of a band fetches a quarter of the segment that follows; all of it
// during one tile is more than memory delivers (16 rows: 0.89 against 0.99 of peak). With two or three tiles the second
// fetches everything: half of it fetched and half not is worse still (8 rows: 561 against 387 microseconds).
constexpr int kShares = 4;
constexpr int64_t kBand = 64;  // rows whose totals (16 KiB) stay in the first-level cache through all segments

constexpr int kNever = kBand + 1;  // rows of a band
constexpr int64_t kChunkBytes = 1 << 19;  // of a band's activations, half of a second-level cache

// What codes are unpacked to: bytes of a segment or floats of a unit.
constexpr int kPanelBytes = kUnit * kBlock * 4;

struct Tile {
  int64_t start;
  int rows;
};

// Rows are cut into tiles of four; one row left over is a tile of its own, two or three are padded to four (the padding is
// multiplied, never stored; it is 0, since some processors take a hundred cycles for what old memory may hold, subnormal numbers).
inline Tile tile_of(int64_t row, int64_t rows) {
  const int64_t full = rows - rows % kTileRows;
  if (row >= full && rows - full == 1) return {full, 1};
  return {row - row % kTileRows, kTileRows};
}

inline int64_t padded_rows(int64_t rows) { return rows == 1 ? 1 : (rows + kTileRows - 1) / kTileRows * kTileRows; }

// The prepared activations in the scratch buffer, in the order in which a block of outputs reads them:
//
//   [band of 64 rows][segment][tile][word][row of the tile]
//
// and after them [band][segment][row] start values of accumulators and scales. With whole rows of a tile beside each other a
// tile's words would begin tens of kilobytes after the last tile's, where no prefetcher looks.
struct Activations {
  uint8_t *words;
  float *init;   // int8: int32 of the same size
  float *scale;  // int8, digits
  int64_t rows, input_bytes, segments, units;

  Activations(const Product &p, int64_t bytes)
      : words(p.scratch),
        rows(padded_rows(p.rows)),
        input_bytes(bytes),
        segments(p.w.header->segments),
        units(p.w.header->units) {
    init = reinterpret_cast<float *>(words + rows * units * kUnit * input_bytes);
    scale = init + rows * segments;
  }
  static int64_t bytes(const Product &p, int64_t input_bytes) {
    return padded_rows(p.rows) * (p.w.header->units * kUnit * input_bytes + p.w.header->segments * 8);
  }

  // The words of a tile's segment, the tile given by its first row.
  uint8_t *words_at(int64_t row, const Segment &segment) const {
    const int64_t top = top_of(row);
    const int64_t unit = top * units + height(top) * segment.unit + (row - top) * segment.units;
    return words + unit * kUnit * input_bytes;
  }
  // Zeros for the rows that the last tile lacks, in words of `word` bytes.
  void clear_padding(const Product &p, int64_t word) const {
    const Tile tile = tile_of(p.rows - 1, p.rows);
    for (int64_t lane = p.rows - tile.start; lane < tile.rows; ++lane)
      for (int64_t s = 0; s < segments; ++s) {
        const Segment &segment = p.w.segments[s];
        uint8_t *at = words_at(tile.start, segment) + lane * word;
        for (int64_t n = segment.units * kUnit * input_bytes / word; n > 0; --n, at += tile.rows * word)
          std::memset(at, 0, static_cast<size_t>(word));
        const int64_t number = number_at(tile.start, s) + lane;
        init[number] = scale[number] = 0.0f;
      }
  }
  // Where its start values and scales are.
  int64_t number_at(int64_t row, int64_t s) const {
    const int64_t top = top_of(row);
    return top * segments + height(top) * s + row - top;
  }

 private:
  static int64_t top_of(int64_t row) { return row - row % kBand; }
  int64_t height(int64_t top) const { return rows - top < kBand ? rows - top : kBand; }
};

struct Grid {
  alignas(64) float scale[kBlock];
  alignas(64) float zero[kBlock];  // int8: int32 of the same size
  bool symmetric;
};

struct TileArgs {
  const uint8_t *codes;  // first unit of the segment in this block
  const uint8_t *next;   // this tile's share of the next segment's first unit
  int units;
  int64_t unit_bytes;
  const uint8_t *x;
  const float *init;
  const float *scale;
  const Grid *grid;
  float *totals;  // [row][64]
};

// One row and one block of outputs.
struct RowArgs {
  const Segment *segments;
  int64_t count;         // of segments
  const uint8_t *codes;  // of the block
  int64_t unit_bytes;
  const uint16_t *scales;  // [group][64]
  const uint8_t *zeros;
  bool symmetric;
  const uint8_t *x;
  const float *init, *scale;  // of each segment
  float *totals;              // [64]
};

template <class Number, float (*convert)(Number)>
inline void load_inputs(const Product &p, int64_t row, const Segment &s, float *__restrict f) {
  const Number *x = static_cast<const Number *>(p.x) + row * p.x_stride;
  const int inputs = s.inputs, padded = s.units * kUnit;
  if (p.w.permutation != nullptr) {
    const int32_t *from = p.w.permutation + s.position;
    for (int k = 0; k < inputs; ++k) f[k] = convert(x[from[k]]);
  } else {
    const Number *__restrict from = x + s.position;
    for (int k = 0; k < inputs; ++k) f[k] = convert(from[k]);
  }
  for (int k = inputs; k < padded; ++k) f[k] = 0.0f;
}

inline float same(float f) { return f; }

// x of one segment and row as float, padded with zeros to whole units.
inline void load_segment(const Product &p, int64_t row, const Segment &s, float *f) {
  if (p.dtype == LGQ_F32)
    load_inputs<float, same>(p, row, s, f);
  else if (p.dtype == LGQ_BF16)
    load_inputs<uint16_t, bf16_to_float>(p, row, s, f);
  else
    load_inputs<uint16_t, half_to_float>(p, row, s, f);
}

// The bits of the largest |f|; a NaN counts as larger than infinity, so that neither gets lost.
inline uint32_t largest_magnitude(const float *f, int n) {
  uint32_t most = 0;
  for (int k = 0; k < n; ++k) {
    const uint32_t magnitude = float_to_bits(f[k]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

constexpr uint32_t kInfinity = 0x7f800000u;

// q = round(f * 127 / max|f|), ties to even; returns the scale max|f| / 127, a NaN when an input is not finite.
inline float round_to_int8(const float *f, int n, int8_t *q) {
  const uint32_t bits = largest_magnitude(f, n);
  if (bits >= kInfinity) {
    std::memset(q, 0, static_cast<size_t>(n));
    return __builtin_nanf("");
  }
  const float most = bits_to_float(bits), inverse = most > 0.0f ? 127.0f / most : 0.0f;
  float scaled[kSegment];
  for (int k = 0; k < n; ++k) scaled[k] = f[k] * inverse;
  // A product fused with the sum below would round other ties than the instruction sets without fused products do.
  asm volatile("" : : "r"(scaled) : "memory");
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low mantissa bits
  for (int k = 0; k < n; ++k) q[k] = static_cast<int8_t>(float_to_bits(scaled[k] + kRound));
  return most / 127.0f;
}

// The outputs that a block has, 64 or fewer, and their bias as float.
inline int load_bias(const Product &p, int64_t block, float *bias) {
  const int64_t first = block * kBlock, left = p.w.header->out_features - first;
  const int count = static_cast<int>(left < kBlock ? left : kBlock);
  for (int o = 0; o < kBlock; ++o)
    bias[o] = p.bias != nullptr && o < count ? load_float(p.bias, p.bias_dtype, first + o) : 0.0f;
  return count;
}

template <class Kernel, int BITS, int T>
void multiply_row_as(const Product &p, int64_t begin, int64_t end) {
  const PackedHeader &h = *p.w.header;
  const Activations x(p, Kernel::word_bytes(T));
  alignas(64) float totals[kBlock], bias[kBlock];
  RowArgs args{};
  args.segments = p.w.segments;
  args.count = h.segments;
  args.unit_bytes = static_cast<int64_t>(kUnit) * kBlock * BITS / 8;
  args.symmetric = h.symmetric != 0;
  args.x = x.words;
  args.init = x.init;
  args.scale = x.scale;
  args.totals = totals;
  for (int64_t block = begin; block < end; ++block) {
    const int count = load_bias(p, block, bias);
    args.codes = p.w.codes + block * h.units * args.unit_bytes;
    args.scales = p.w.scales + block * h.groups * kBlock;
    args.zeros = p.w.zeros + block * h.groups * kBlock;
    Kernel::template row<BITS, T>(args);
    Kernel::store_row(totals, bias, p.y, p.dtype, block * kBlock, count);
  }
}

// The rows [top, bottom) of all `rows`, and where their sums go.
struct Band {
  int64_t top, bottom, rows;
  float *totals;

  TileArgs tile(TileArgs args, const Activations &x, int64_t row, const Segment &segment, int64_t s) const {
    args.x = x.words_at(row, segment);
    const int64_t number = x.number_at(row, s);
    args.init = x.init + number;
    args.scale = x.scale + number;
    args.totals = totals + (row - top) * kBlock;
    return args;
  }
};

template <int N>
using Int = std::integral_constant<int, N>;

// Calls multiply(MR, AHEAD, row, share) for each tile of a band: its rows, 1 / AHEAD of the next segment that it fetches.
template <class F>
inline __attribute__((always_inline)) void for_tiles(const Band &band, F multiply) {
  const bool many = band.bottom - band.top >= kShares * kTileRows;
  for (int64_t row = band.top; row < band.bottom; row += kTileRows) {
    const int64_t index = (row - band.top) / kTileRows;
    if (tile_of(row, band.rows).rows == 1)
      multiply(Int<1>(), Int<0>(), row, 0);
    else if (many && index < kShares)
      multiply(Int<kTileRows>(), Int<kShares>(), row, index);
    else if (!many && index == 1)
      multiply(Int<kTileRows>(), Int<1>(), row, 0);
    else
      multiply(Int<kTileRows>(), Int<0>(), row, 0);
  }
}

// Every tile of a band with the codes of segment s.
template <class Kernel, int BITS, int T>
inline __attribute__((always_inline)) void multiply_tiles(const TileArgs &whole, const Segment &segment,
                                                          int64_t s, const Activations &x, const Band &band) {
  const uint8_t *next = whole.codes + whole.units * whole.unit_bytes;
  if (band.rows > 1 && band.rows <= kTileRows) {
    TileArgs args = band.tile(whole, x, band.top, segment, s);
    args.next = whole.codes;
    return Kernel::template tile<BITS, T, kTileRows, Kernel::kAloneAhead>(args);
  }
  for_tiles(band, [&](auto rows, auto ahead, int64_t row, int64_t share) {
    TileArgs args = band.tile(whole, x, row, segment, s);
    args.next = next + share * (args.unit_bytes / kShares);
    Kernel::template tile<BITS, T, rows.value, ahead.value>(args);
  });
}

// The same with codes that are unpacked first.
template <class Kernel, int BITS, int T>
void multiply_panels(const TileArgs &whole, const Segment &segment, int64_t s, const Activations &x, const Band &band) {
  constexpr int most = Kernel::panel_units(BITS, T);
  alignas(64) uint8_t panel[kPanelBytes];
  for (int u = 0; u < whole.units; u += most) {
    TileArgs part = whole;
    part.units = whole.units - u < most ? whole.units - u : most;
    Kernel::template unpack<BITS, T>(whole.codes + u * whole.unit_bytes, part.units, *whole.grid, panel);
    part.codes = panel;
    const uint8_t *next = whole.codes + (whole.units + u) * whole.unit_bytes;
    for_tiles(band, [&](auto rows, auto ahead, int64_t row, int64_t share) {
      TileArgs args = band.tile(part, x, row, segment, s);
      args.x += u * kUnit * x.input_bytes * rows.value;
      args.next = next + share * (args.unit_bytes / kShares);
      Kernel::template panel_tile<BITS, T, rows.value, ahead.value>(args);
    });
  }
}

template <class Kernel, int BITS, int T>
inline void multiply_segment(const TileArgs &whole, const Segment &segment, int64_t s, const Activations &x, const Band &band) {
  constexpr int least = Kernel::least_panel_rows(BITS, T);
  if constexpr (least < kNever)
    if (band.bottom - band.top >= least) return multiply_panels<Kernel, BITS, T>(whole, segment, s, x, band);
  if constexpr (least > 0) multiply_tiles<Kernel, BITS, T>(whole, segment, s, x, band);
}

// One block's share of a band: the segments [begin, end), added to the band's totals.
template <class Kernel, int BITS, int T>
void multiply_band(const Product &p, const Activations &x, int64_t block, int64_t begin, int64_t end, const Band &band) {
  const PackedHeader &h = *p.w.header;
  Grid grid;
  grid.symmetric = h.symmetric != 0;
  TileArgs args{};
  args.unit_bytes = static_cast<int64_t>(kUnit) * kBlock * BITS / 8;
  args.grid = &grid;
  for (int64_t s = begin; s < end; ++s) {
    const Segment &segment = p.w.segments[s];
    const int64_t at = (block * h.groups + segment.group) * kBlock;
    Kernel::template grid<BITS, T>(p.w.scales + at, p.w.zeros + at, &grid);
    args.codes = p.w.codes + (block * h.units + segment.unit) * args.unit_bytes;
    args.units = segment.units;
    multiply_segment<Kernel, BITS, T>(args, segment, s, x, band);
  }
}

// At most kStrip blocks. What they share, a band's activations, is read once for all of them from whatever cache holds them all,
// a chunk of segments at a time.
template <class Kernel, int BITS, int T>
void multiply_blocks_as(const Product &p, int64_t begin, int64_t end) {
  if constexpr (Kernel::has_row(T))
    if (p.rows == 1) return multiply_row_as<Kernel, BITS, T>(p, begin, end);
  const int64_t segments = p.w.header->segments;
  const Activations x(p, Kernel::word_bytes(T));
  alignas(64) float totals[kStrip][kBand * kBlock];
  alignas(64) float bias[kBlock];
  const int64_t chunk = end - begin == 1 ? segments : kChunkBytes / (kBand * kSegment * x.input_bytes);
  for (int64_t top = 0; top < p.rows; top += kBand) {
    const int64_t bottom = p.rows - top < kBand ? p.rows : top + kBand;
    for (int64_t block = begin; block < end; ++block)
      std::memset(totals[block - begin], 0, static_cast<size_t>(padded_rows(bottom - top)) * kBlock * sizeof(float));
    for (int64_t s = 0; s < segments; s += chunk)
      for (int64_t block = begin; block < end; ++block)
        multiply_band<Kernel, BITS, T>(p, x, block, s, segments - s < chunk ? segments : s + chunk,
                                       {top, bottom, p.rows, totals[block - begin]});
    for (int64_t block = begin; block < end; ++block) {
      const int count = load_bias(p, block, bias);
      for (int64_t row = top; row < bottom; ++row)
        Kernel::store_row(totals[block - begin] + (row - top) * kBlock, bias, p.y, p.dtype, row * p.y_stride + block * kBlock,
                          count);
    }
  }
}

template <class Kernel, int T>
void multiply_blocks_with(const Product &p, int64_t begin, int64_t end) {
  switch (p.w.header->bits) {
    case 2:
      return multiply_blocks_as<Kernel, 2, T>(p, begin, end);
    case 3:
      return multiply_blocks_as<Kernel, 3, T>(p, begin, end);
    case 4:
      return multiply_blocks_as<Kernel, 4, T>(p, begin, end);
    default:
      return multiply_blocks_as<Kernel, 8, T>(p, begin, end);
  }
}

// The product in the one of the forms T that `form` names.
template <class Kernel, int... T>
void multiply_in_form(const Product &p, int form, int64_t begin, int64_t end) {
  ((form == T ? multiply_blocks_with<Kernel, T>(p, begin, end) : void()), ...);
}

}  // namespace
