// The packed weight: one flat buffer that describes itself.
//
//   header | segments | permutation (only when inputs are reordered) | scales | zeros | codes
//
// Inputs are ordered by group and cut into segments of at most 128 that share one grid; each segment is padded to whole
// units of 32 inputs (the activations there are zero). Outputs are cut into blocks of 64 = 4 vectors of 16. Codes lie in
// the order in which a matrix-vector product reads them, so that one thread reads one stream:
//
//   [block][unit][run: 1..bits][vector][64 bytes]
//
// In each 64 bytes, the 32-bit lane l belongs to output l of the vector, and byte j of the lane to inputs j mod 4: "quad"
// q of a unit is inputs 4q..4q+3, one byte each. Where the fields of the 8 quads are, as (run, shift in the byte):
//
//   8 bits  quad q: run q                      4 bits  quad q: run q/2, shift 4*(q%2)
//   2 bits  quad q: run q/4, shift 2*(q%4)     3 bits  quads 0..5: run q/2, shift 3*(q%2); quads 6, 7: low two bits at
//                                                      shift 6 of run q-6, high bit at shift q of run 2
//
// So one mask and at most one shift (two and a select for a quarter of the 3-bit codes) give 64 codes as bytes, which is
// what the integer dot products want; taking the even or the odd bytes gives pairs of 16-bit floats.
#pragma once

#include <cstdint>

namespace lgq {

constexpr int kVector = 16;
constexpr int kVectorsPerBlock = 4;
constexpr int kBlock = kVector * kVectorsPerBlock;
constexpr int kUnit = 32;
constexpr int kQuads = kUnit / 4;
constexpr int kRunBytes = kBlock * 4;
constexpr int kSegment = 128;
constexpr int64_t kAlign = 64;
constexpr uint64_t kMagic = 0x31304B5051474Cull;  // "LGQPK01"

struct Segment {
  int32_t unit;      // first unit
  int32_t units;     // number of units, 1..4
  int32_t group;     // row of scales and zeros
  int32_t position;  // first input in packed order
  int32_t inputs;    // number of real inputs, 1..128
};

struct PackedHeader {
  uint64_t magic;
  int64_t total_bytes;
  int64_t in_features, out_features, groups;
  int64_t segments, units, blocks;
  int64_t segments_at, permutation_at, scales_at, zeros_at, codes_at;  // byte offsets from the header
  int32_t bits;
  int32_t symmetric;  // 1: every zero is `zero`
  int32_t zero;
  int32_t permuted;  // 1: position p of the packed order is input permutation[p]; 0: positions are inputs
};

// A header with its pointers resolved.
struct PackedView {
  const PackedHeader *header;
  const Segment *segments;
  const int32_t *permutation;  // (in_features,) or null
  const uint16_t *scales;      // float16 (blocks, groups, 64)
  const uint8_t *zeros;        // (blocks, groups, 64)
  const uint8_t *codes;

  int64_t input(int64_t position) const { return permutation != nullptr ? permutation[position] : position; }
  int64_t grid_at(int64_t out, int64_t group) const {
    return (out / kBlock * header->groups + group) * kBlock + out % kBlock;
  }
  int64_t unit_bytes() const { return static_cast<int64_t>(kUnit) * kBlock * header->bits / 8; }
};

}  // namespace lgq
