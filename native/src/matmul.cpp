// The product's entry point: checks, activations prepared once, blocks of outputs in parallel.
#include "matmul.h"

#include <cstring>

#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"
#include "scratch.h"

namespace lgq {

int32_t view_packed(const void *packed, int64_t packed_bytes, PackedView *view);

namespace {

// Below this many activations a second trip through the threads costs more (2 microseconds) than it saves.
constexpr int64_t kSerialPreparation = 1 << 14;

constexpr int64_t kFewRows = 64;

thread_local Scratch t_scratch;

bool is_dtype(int32_t dtype) { return dtype == LGQ_F32 || dtype == LGQ_BF16 || dtype == LGQ_F16; }

// Whether activations prepared for one weight serve the other: the start values of accumulators depend on the zeros.
bool same_preparation(const PackedView &a, const PackedView &b) {
  const PackedHeader &h = *a.header, &g = *b.header;
  if (h.bits != g.bits || h.symmetric != g.symmetric || (h.symmetric && h.zero != g.zero)) return false;
  if (h.in_features != g.in_features || h.segments != g.segments || h.units != g.units) return false;
  if ((a.permutation == nullptr) != (b.permutation == nullptr)) return false;
  const auto equal = [](const auto *p, const auto *q, int64_t count) {
    return std::memcmp(p, q, static_cast<size_t>(count) * sizeof *p) == 0;
  };
  return equal(a.segments, b.segments, h.segments) &&
         (a.permutation == nullptr || equal(a.permutation, b.permutation, h.in_features));
}

// No offset overflows, nor does the size of the scratch space with 2^30 inputs, 4 bytes and a scale for each.
bool is_addressable(int64_t rows, int64_t stride) {
  return rows <= int64_t{1} << 28 && stride <= (int64_t{1} << 60) / (rows + 1);
}

// Everything about the product of one weight but the scratch space.
int32_t set_up(const lgq_factor &f, int64_t rows, const void *x, int64_t x_stride, void *y, int32_t dtype, int32_t mode,
               Product *p) {
  if (x == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (!is_dtype(dtype) || (f.bias != nullptr && !is_dtype(f.bias_dtype))) return LGQ_BAD_DTYPE;
  if (mode != LGQ_EXACT && mode != LGQ_INT8) return LGQ_BAD_MODE;
  const int32_t status = view_packed(f.packed, f.packed_bytes, &p->w);
  if (status != LGQ_OK) return status;
  if (rows < 0 || x_stride < p->w.header->in_features || !is_addressable(rows, x_stride)) return LGQ_BAD_SIZE;
  p->x = x;
  p->rows = rows;
  p->x_stride = x_stride;
  p->bias = f.bias;
  p->bias_dtype = f.bias_dtype;
  p->y = y;
  p->y_stride = p->w.header->out_features;
  p->dtype = dtype;
  p->mode = mode;
  return LGQ_OK;
}

// Blocks of outputs that a thread takes at once: more than one share what they read of the activations and read their codes again
// for every 64 rows, which pays where an activation is wider than a code (exact at 512 rows and 14336 inputs: 0.63 of the time).
int64_t blocks_at_once(int64_t rows, int32_t mode, int64_t blocks) {
  if (rows <= kFewRows || mode == LGQ_INT8) return 1;
  const int64_t fair = blocks / (4 * max_threads());
  return fair < 1 ? 1 : fair < kStrip ? fair : kStrip;
}

// Products of weights with the same preparation.
int32_t multiply(Product *products, int count) {
  Product &first = products[0];
  if (first.rows == 0) return LGQ_OK;
  const MatmulKernels &k = LGQ_ACTIVE(kMatmul);
  if (!t_scratch.reserve(k.scratch_bytes(first))) return LGQ_OUT_OF_MEMORY;
  for (int i = 0; i < count; ++i) products[i].scratch = t_scratch.data;
  if (first.rows * first.w.header->in_features <= kSerialPreparation)
    k.prepare_rows(first, 0, first.rows);
  else
    parallel_for(first.rows, 1, [&](int64_t begin, int64_t end) { k.prepare_rows(first, begin, end); });
  int64_t blocks = 0, strips = 0;
  for (int i = 0; i < count; ++i) blocks += products[i].w.header->blocks;
  const int64_t strip = blocks_at_once(first.rows, first.mode, blocks);
  const auto strips_of = [&](const Product &p) { return (p.w.header->blocks + strip - 1) / strip; };
  for (int i = 0; i < count; ++i) strips += strips_of(products[i]);
  parallel_items(strips, [&](int64_t item) {
    const Product *p = products;
    while (item >= strips_of(*p)) item -= strips_of(*p++);
    const int64_t begin = item * strip, left = p->w.header->blocks - begin;
    k.multiply_blocks(*p, begin, begin + (left < strip ? left : strip));
  });
  return LGQ_OK;
}

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_matmul(const void *packed, int64_t packed_bytes, int64_t rows, const void *x, int64_t x_stride,
                   const void *bias, int32_t bias_dtype, void *y, int64_t y_stride, int32_t dtype, int32_t mode) {
  Product p{};
  const int32_t status = set_up({packed, packed_bytes, bias, bias_dtype}, rows, x, x_stride, y, dtype, mode, &p);
  if (status != LGQ_OK) return status;
  if (y_stride < p.y_stride || !is_addressable(rows, y_stride)) return LGQ_BAD_SIZE;
  p.y_stride = y_stride;
  return multiply(&p, 1);
}

int32_t lgq_matmul_shared(int32_t count, const lgq_factor *factors, int64_t rows, const void *x, int64_t x_stride,
                          void *const *y, int32_t dtype, int32_t mode) {
  if (factors == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (count < 1 || count > LGQ_MOST_FACTORS) return LGQ_BAD_SIZE;
  Product products[LGQ_MOST_FACTORS]{};
  for (int32_t i = 0; i < count; ++i) {
    const int32_t status = set_up(factors[i], rows, x, x_stride, y[i], dtype, mode, &products[i]);
    if (status != LGQ_OK) return status;
    if (products[i].w.header->in_features != products[0].w.header->in_features) return LGQ_BAD_SIZE;
  }
  for (int32_t i = 0; i < count;) {
    int32_t end = i + 1;
    while (end < count && same_preparation(products[i].w, products[end].w)) ++end;
    const int32_t status = multiply(products + i, end - i);
    if (status != LGQ_OK) return status;
    i = end;
  }
  return LGQ_OK;
}
