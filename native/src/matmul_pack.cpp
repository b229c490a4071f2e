// Repacking checkpoint tensors into the kernels' layout, and back to floats. Never holds more than a few lines of
// dequantized weight.
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "convert.h"
#include "lightgptq.h"
#include "matmul.h"
#include "parallel.h"

namespace lgq {
namespace {

constexpr int64_t kMostFeatures = int64_t{1} << 30;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Inputs of every group, or null: memory ran out. Frees itself.
struct GroupCounts {
  int64_t *count;
  explicit GroupCounts(int64_t groups) : count(static_cast<int64_t *>(std::calloc(groups + 1, sizeof(int64_t)))) {}
  ~GroupCounts() { std::free(count); }
  GroupCounts(const GroupCounts &) = delete;
  GroupCounts &operator=(const GroupCounts &) = delete;
};

int32_t check_shape(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits, const int32_t *g_idx) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return LGQ_BAD_BITS;
  if (g_idx == nullptr) return LGQ_NULL_POINTER;
  if (in_features < 1 || out_features < 1 || groups < 1) return LGQ_BAD_SIZE;
  if (in_features > kMostFeatures || out_features > kMostFeatures || groups > in_features) return LGQ_BAD_SIZE;
  for (int64_t i = 0; i < in_features; ++i)
    if (g_idx[i] < 0 || g_idx[i] >= groups) return LGQ_BAD_GROUP;
  return LGQ_OK;
}

// What follows from the counts in a header: blocks, offsets and size. False when the size is beyond 2^60 bytes.
bool set_offsets(PackedHeader *h) {
  h->blocks = (h->out_features + kBlock - 1) / kBlock;
  h->segments_at = aligned(sizeof(PackedHeader));
  h->permutation_at = aligned(h->segments_at + h->segments * static_cast<int64_t>(sizeof(Segment)));
  h->scales_at = aligned(h->permutation_at + (h->permuted ? h->in_features * 4 : 0));
  h->zeros_at = h->scales_at + h->blocks * h->groups * kBlock * 2;
  h->codes_at = aligned(h->zeros_at + h->blocks * h->groups * kBlock);
  const int64_t block_bytes = h->units * (kUnit * kBlock * h->bits / 8);
  if (h->blocks > (int64_t{1} << 60) / block_bytes) return false;
  h->total_bytes = h->codes_at + h->blocks * block_bytes;
  return true;
}

// Everything in the header but what depends on the zeros.
int32_t plan(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits, const int32_t *g_idx,
             PackedHeader *h) {
  const int32_t status = check_shape(in_features, out_features, groups, bits, g_idx);
  if (status != LGQ_OK) return status;
  GroupCounts inputs(groups);
  if (inputs.count == nullptr) return LGQ_OUT_OF_MEMORY;
  bool permuted = false;
  for (int64_t i = 0; i < in_features; ++i) {
    ++inputs.count[g_idx[i]];
    permuted |= i > 0 && g_idx[i] < g_idx[i - 1];
  }
  *h = PackedHeader{};
  for (int64_t g = 0; g < groups; ++g) {
    h->segments += (inputs.count[g] + kSegment - 1) / kSegment;
    h->units += (inputs.count[g] + kUnit - 1) / kUnit;
  }
  h->magic = kMagic;
  h->in_features = in_features;
  h->out_features = out_features;
  h->groups = groups;
  h->bits = bits;
  h->permuted = permuted;
  return set_offsets(h) ? LGQ_OK : LGQ_BAD_SIZE;
}

// A header that was not damaged after lgq_pack: its parts follow from one another. Costs nothing beside a product.
bool is_consistent(const PackedHeader &h) {
  const bool counts = h.in_features >= 1 && h.out_features >= 1 && h.groups >= 1 && h.segments >= 1 && h.units >= 1 &&
                      h.in_features <= kMostFeatures && h.out_features <= kMostFeatures &&
                      h.groups <= h.in_features && h.segments <= h.units && h.units <= h.in_features;
  const bool width = h.bits == 2 || h.bits == 3 || h.bits == 4 || h.bits == 8;
  if (!counts || !width || h.zero < 0 || h.zero >= 1 << h.bits || (h.symmetric | h.permuted) >> 1 != 0) return false;
  PackedHeader expected = h;
  return set_offsets(&expected) && std::memcmp(&expected, &h, sizeof h) == 0;
}

// Cuts the groups into segments and orders the inputs by group; source[p] is the input at packed position p.
bool order_inputs(const PackedHeader &h, const int32_t *g_idx, Segment *segments, int32_t *source) {
  GroupCounts start(h.groups);
  if (start.count == nullptr) return false;
  for (int64_t i = 0; i < h.in_features; ++i) ++start.count[g_idx[i] + 1];
  int32_t unit = 0, position = 0;
  for (int64_t g = 0; g < h.groups; ++g) {
    for (int64_t left = start.count[g + 1]; left > 0; left -= kSegment) {
      const int32_t inputs = static_cast<int32_t>(left < kSegment ? left : kSegment);
      const int32_t units = (inputs + kUnit - 1) / kUnit;
      *segments++ = Segment{unit, units, static_cast<int32_t>(g), position, inputs};
      unit += units;
      position += inputs;
    }
    start.count[g + 1] += start.count[g];
  }
  for (int64_t i = 0; i < h.in_features; ++i) source[start.count[g_idx[i]]++] = static_cast<int32_t>(i);
  return true;
}

uint32_t zero_at(const int32_t *qzeros, int64_t words, int64_t group, int64_t out, int bits, int32_t offset) {
  const int64_t bit = out * bits;
  const uint32_t *row = reinterpret_cast<const uint32_t *>(qzeros) + group * words;
  uint64_t pair = row[bit / 32];
  if (bit % 32 + bits > 32) pair |= static_cast<uint64_t>(row[bit / 32 + 1]) << 32;
  return (static_cast<uint32_t>(pair >> (bit % 32)) + static_cast<uint32_t>(offset)) & ((1u << bits) - 1);
}

void pack_grid(const PackedHeader &h, const int32_t *qzeros, const uint16_t *scales_in, int32_t zero_offset,
               uint16_t *scales, uint8_t *zeros, int64_t begin, int64_t end) {
  const int64_t words = (h.out_features * h.bits + 31) / 32;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t g = 0; g < h.groups; ++g) {
      for (int64_t lane = 0; lane < kBlock; ++lane) {
        // Outputs that only pad the last block copy the last real one's zero, so that they do not hide symmetry.
        const int64_t out = block * kBlock + lane, real = out < h.out_features ? out : h.out_features - 1;
        const int64_t at = (block * h.groups + g) * kBlock + lane;
        scales[at] = out < h.out_features ? scales_in[g * h.out_features + out] : 0;
        zeros[at] = static_cast<uint8_t>(zero_at(qzeros, words, g, real, h.bits, zero_offset));
      }
    }
  }
}

// lane[o] |= field << up, where field is `bits` bits at bit `shift` of the two words low[o], high[o].
void merge_codes(const uint32_t *low, const uint32_t *high, int shift, uint32_t mask, int up, uint32_t *lane,
                 int64_t count) {
  if (high == nullptr) {
    for (int64_t o = 0; o < count; ++o) lane[o] |= ((low[o] >> shift) & mask) << up;
  } else {
    for (int64_t o = 0; o < count; ++o) lane[o] |= (((low[o] >> shift) | (high[o] << (32 - shift))) & mask) << up;
  }
}

// One unit of one block: 32 inputs (source[0..inputs), the rest padding) times 64 outputs.
void pack_unit(const PackedHeader &h, const uint32_t *qweight, const int32_t *source, int inputs, int64_t block,
               uint8_t *codes) {
  const int bits = h.bits;
  const int64_t first = block * kBlock;
  const int64_t count = h.out_features - first < kBlock ? h.out_features - first : kBlock;
  alignas(64) uint32_t lanes[8][kBlock] = {};
  for (int k = 0; k < inputs; ++k) {
    const int64_t bit = static_cast<int64_t>(source[k]) * bits;
    const int shift = static_cast<int>(bit % 32);
    const uint32_t *low = qweight + bit / 32 * h.out_features + first;
    const uint32_t *high = shift + bits > 32 ? low + h.out_features : nullptr;
    const int quad = k / 4, byte = 8 * (k % 4);
    if (quad_is_split(bits, quad)) {
      // A split field may straddle words too; both halves are taken from the whole code.
      alignas(64) uint32_t whole[kBlock] = {};
      merge_codes(low, high, shift, 7, 0, whole, count);
      merge_codes(whole, nullptr, 0, 3, byte + 6, lanes[quad - 6], count);
      merge_codes(whole, nullptr, 2, 1, byte + quad, lanes[2], count);
    } else {
      merge_codes(low, high, shift, (1u << bits) - 1, byte + quad_shift(bits, quad), lanes[quad_run(bits, quad)], count);
    }
  }
  std::memcpy(codes, lanes, static_cast<size_t>(bits) * kRunBytes);
}

// Exchanges the fields under `mask` with those `shift` bits above.
uint32_t exchange(uint32_t w, int shift, uint32_t mask) {
  const uint32_t t = ((w >> shift) ^ w) & mask;
  return w ^ t ^ (t << shift);
}

// Four codes of 3 bits as the low bits of four bytes.
uint32_t spread_quad(uint32_t v) {
  v = (v & 0x3f) | (v & 0xfc0) << 10;
  return (v & 0x00070007) | (v & 0x00380038) << 5;
}

// The same for 32 neighbouring inputs from a multiple of 32 on, which fill whole words: their fields only change places
// within a word (2 bits: a transposed 4 x 4 matrix; 4 bits: 2 x 4; 8 bits: nothing), or among three (3 bits).
void pack_straight(const PackedHeader &h, const uint32_t *qweight, int64_t input, int64_t block, uint8_t *codes) {
  const int64_t first = block * kBlock, out = h.out_features;
  const int64_t count = out - first < kBlock ? out - first : kBlock;
  const uint32_t *__restrict words = qweight + input / 32 * h.bits * out + first;
  uint32_t *__restrict lanes = reinterpret_cast<uint32_t *>(codes);
  if (count < kBlock) std::memset(codes, 0, static_cast<size_t>(h.bits) * kRunBytes);
  if (h.bits == 3) {
    for (int64_t o = 0; o < count; ++o) {
      const uint32_t a = words[o], b = words[out + o], c = words[2 * out + o];
      const uint32_t six = spread_quad(c >> 8 & 0xfff), seven = spread_quad(c >> 20);
      lanes[o] = spread_quad(a & 0xfff) | spread_quad(a >> 12 & 0xfff) << 3 | (six & 0x03030303) << 6;
      lanes[kBlock + o] =
          spread_quad((a >> 24 | b << 8) & 0xfff) | spread_quad(b >> 4 & 0xfff) << 3 | (seven & 0x03030303) << 6;
      lanes[2 * kBlock + o] = spread_quad(b >> 16 & 0xfff) | spread_quad((b >> 28 | c << 4) & 0xfff) << 3 |
                              (six & 0x04040404) << 4 | (seven & 0x04040404) << 5;
    }
    return;
  }
  for (int run = 0; run < h.bits; ++run, words += out, lanes += kBlock) {
    if (h.bits == 8)
      std::memcpy(lanes, words, static_cast<size_t>(count) * 4);
    else if (h.bits == 4)
      for (int64_t o = 0; o < count; ++o) lanes[o] = exchange(exchange(words[o], 8, 0x0000ff00), 4, 0x00f000f0);
    else
      for (int64_t o = 0; o < count; ++o) lanes[o] = exchange(exchange(words[o], 12, 0x0000f0f0), 6, 0x00cc00cc);
  }
}

// True when a unit's inputs are 32 neighbours from a multiple of 32 on.
bool is_straight(const int32_t *source, int inputs) {
  if (inputs < kUnit || source[0] % kUnit != 0) return false;
  for (int k = 1; k < kUnit; ++k)
    if (source[k] != source[0] + k) return false;
  return true;
}

uint32_t code_at(const uint8_t *vector, int bits, int quad, int lane, int byte) {
  const auto at = [&](int run) { return static_cast<uint32_t>(vector[run * kRunBytes + lane * 4 + byte]); };
  if (quad_is_split(bits, quad)) return (at(quad - 6) >> 6) | (((at(2) >> quad) & 1u) << 2);
  return (at(quad_run(bits, quad)) >> quad_shift(bits, quad)) & ((1u << bits) - 1);
}

// Calls f(segment, input, code) for every input of one output.
template <class F>
void for_each_code(const PackedView &view, int64_t out, F f) {
  const PackedHeader &h = *view.header;
  const int lane = static_cast<int>(out % kVector);
  const uint8_t *strip = view.codes + out / kBlock * h.units * view.unit_bytes() + out % kBlock / kVector * 64;
  for (int64_t s = 0; s < h.segments; ++s) {
    const Segment &segment = view.segments[s];
    for (int k = 0; k < segment.inputs; ++k) {
      const uint8_t *vector = strip + (segment.unit + k / kUnit) * view.unit_bytes();
      const int code = static_cast<int>(code_at(vector, h.bits, k % kUnit / 4, lane, k % 4));
      f(segment, view.input(segment.position + k), code);
    }
  }
}

}  // namespace

int32_t view_packed(const void *packed, int64_t packed_bytes, PackedView *view) {
  if (packed == nullptr) return LGQ_NULL_POINTER;
  if (reinterpret_cast<uintptr_t>(packed) % kAlign != 0) return LGQ_UNALIGNED;
  if (packed_bytes < static_cast<int64_t>(sizeof(PackedHeader))) return LGQ_NOT_PACKED;
  const auto *bytes = static_cast<const uint8_t *>(packed);
  const auto *h = reinterpret_cast<const PackedHeader *>(packed);
  if (h->magic != kMagic || !is_consistent(*h)) return LGQ_NOT_PACKED;
  if (h->total_bytes > packed_bytes) return LGQ_BUFFER_TOO_SMALL;
  const Segment &last = reinterpret_cast<const Segment *>(bytes + h->segments_at)[h->segments - 1];
  if (last.unit + int64_t{last.units} != h->units || last.position + int64_t{last.inputs} != h->in_features)
    return LGQ_NOT_PACKED;
  view->header = h;
  view->segments = reinterpret_cast<const Segment *>(bytes + h->segments_at);
  view->permutation = h->permuted ? reinterpret_cast<const int32_t *>(bytes + h->permutation_at) : nullptr;
  view->scales = reinterpret_cast<const uint16_t *>(bytes + h->scales_at);
  view->zeros = bytes + h->zeros_at;
  view->codes = bytes + h->codes_at;
  return LGQ_OK;
}

}  // namespace lgq

using namespace lgq;

int32_t lgq_packed_bytes(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits, const int32_t *g_idx,
                         int64_t *bytes) {
  if (bytes == nullptr) return LGQ_NULL_POINTER;
  PackedHeader header;
  const int32_t status = plan(in_features, out_features, groups, bits, g_idx, &header);
  if (status == LGQ_OK) *bytes = header.total_bytes;
  return status;
}

void lgq_advise_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes > 0 ? bytes : 0)) & ~(kHuge - 1);
  if (memory != nullptr && begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

int32_t lgq_pack(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits, int32_t zero_offset,
                 const int32_t *qweight, const int32_t *qzeros, const uint16_t *scales, const int32_t *g_idx,
                 void *packed, int64_t packed_bytes) {
  if (qweight == nullptr || qzeros == nullptr || scales == nullptr || packed == nullptr) return LGQ_NULL_POINTER;
  if (zero_offset != 0 && zero_offset != 1) return LGQ_BAD_VALUE;
  if (reinterpret_cast<uintptr_t>(packed) % kAlign != 0) return LGQ_UNALIGNED;
  PackedHeader h;
  const int32_t status = plan(in_features, out_features, groups, bits, g_idx, &h);
  if (status != LGQ_OK) return status;
  if (packed_bytes < h.total_bytes) return LGQ_BUFFER_TOO_SMALL;

  auto *bytes = static_cast<uint8_t *>(packed);
  auto *segments = reinterpret_cast<Segment *>(bytes + h.segments_at);
  auto *source = static_cast<int32_t *>(std::malloc(static_cast<size_t>(in_features) * sizeof(int32_t)));
  if (source == nullptr) return LGQ_OUT_OF_MEMORY;
  if (!order_inputs(h, g_idx, segments, source)) {
    std::free(source);
    return LGQ_OUT_OF_MEMORY;
  }
  if (h.permuted) std::memcpy(bytes + h.permutation_at, source, static_cast<size_t>(in_features) * sizeof(int32_t));

  const int64_t unit_bytes = kUnit * kBlock * bits / 8;
  uint8_t *zeros = bytes + h.zeros_at;
  parallel_for(h.blocks, 1, [&](int64_t begin, int64_t end) {
    pack_grid(h, qzeros, scales, zero_offset, reinterpret_cast<uint16_t *>(bytes + h.scales_at), zeros, begin, end);
    // Blocks innermost: the source is row-major in outputs, so this reads long runs of its rows.
    for (int64_t s = 0; s < h.segments; ++s)
      for (int u = 0; u < segments[s].units; ++u) {
        const int left = segments[s].inputs - u * kUnit, inputs = left < kUnit ? left : kUnit;
        const int32_t *from = source + segments[s].position + u * kUnit;
        const auto *words = reinterpret_cast<const uint32_t *>(qweight);
        const bool straight = is_straight(from, inputs);
        for (int64_t block = begin; block < end; ++block) {
          uint8_t *to = bytes + h.codes_at + (block * h.units + segments[s].unit + u) * unit_bytes;
          if (straight)
            pack_straight(h, words, from[0], block, to);
          else
            pack_unit(h, words, from, inputs, block, to);
        }
      }
  });
  std::free(source);

  h.zero = zeros[0];
  uint8_t different = 0;
  for (int64_t i = 0; i < h.blocks * groups * kBlock; ++i) different |= static_cast<uint8_t>(zeros[i] ^ zeros[0]);
  h.symmetric = different == 0;
  std::memcpy(packed, &h, sizeof h);
  return LGQ_OK;
}

int32_t lgq_packed_shape(const void *packed, int64_t packed_bytes, int64_t shape[4]) {
  if (shape == nullptr) return LGQ_NULL_POINTER;
  PackedView view;
  const int32_t status = view_packed(packed, packed_bytes, &view);
  if (status != LGQ_OK) return status;
  const PackedHeader &h = *view.header;
  shape[0] = h.in_features;
  shape[1] = h.out_features;
  shape[2] = h.groups;
  shape[3] = h.bits;
  return LGQ_OK;
}

int32_t lgq_unpack(const void *packed, int64_t packed_bytes, uint8_t *codes, uint16_t *scales, int32_t *zeros,
                   int32_t *g_idx) {
  if (codes == nullptr || scales == nullptr || zeros == nullptr || g_idx == nullptr) return LGQ_NULL_POINTER;
  PackedView view;
  const int32_t status = view_packed(packed, packed_bytes, &view);
  if (status != LGQ_OK) return status;
  const PackedHeader &h = *view.header;
  for (int64_t s = 0; s < h.segments; ++s)
    for (int k = 0; k < view.segments[s].inputs; ++k)
      g_idx[view.input(view.segments[s].position + k)] = view.segments[s].group;
  parallel_for(h.out_features, kVector, [&](int64_t begin, int64_t end) {
    for (int64_t out = begin; out < end; ++out) {
      for (int64_t g = 0; g < h.groups; ++g) {
        scales[g * h.out_features + out] = view.scales[view.grid_at(out, g)];
        zeros[g * h.out_features + out] = view.zeros[view.grid_at(out, g)];
      }
      for_each_code(view, out, [&](const Segment &, int64_t input, int code) {
        codes[out * h.in_features + input] = static_cast<uint8_t>(code);
      });
    }
  });
  return LGQ_OK;
}

int32_t lgq_dequantize(const void *packed, int64_t packed_bytes, void *weight, int32_t dtype) {
  if (weight == nullptr) return LGQ_NULL_POINTER;
  if (dtype != LGQ_F32 && dtype != LGQ_BF16 && dtype != LGQ_F16) return LGQ_BAD_DTYPE;
  PackedView view;
  const int32_t status = view_packed(packed, packed_bytes, &view);
  if (status != LGQ_OK) return status;
  const PackedHeader &h = *view.header;
  parallel_for(h.out_features, kVector, [&](int64_t begin, int64_t end) {
    for (int64_t out = begin; out < end; ++out)
      for_each_code(view, out, [&](const Segment &segment, int64_t input, int code) {
        const int64_t at = view.grid_at(out, segment.group);
        const float step = half_to_float(view.scales[at]);
        store_float(weight, dtype, out * h.in_features + input, step * static_cast<float>(code - view.zeros[at]));
      });
  });
  return LGQ_OK;
}
