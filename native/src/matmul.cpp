// The product's entry point: checks, activations prepared once, blocks of outputs in parallel.
#include "matmul.h"

#include <cstdlib>

#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"

namespace lgq {

int32_t view_packed(const void *packed, int64_t packed_bytes, PackedView *view);

namespace {

// Below this many activations a second trip through the threads costs more (2 microseconds) than it saves.
constexpr int64_t kSerialPreparation = 1 << 14;

const MatmulKernels &kernels() {
  switch (active_isa()) {
#if defined(LGQ_X86)
    case Isa::avx512:
      return kMatmulAvx512;
    case Isa::avx2:
      return kMatmulAvx2;
#endif
#if defined(LGQ_ARM64)
    case Isa::neon:
      return kMatmulNeon;
#endif
    default:
      return kMatmulPortable;
  }
}

// One buffer per calling thread, kept between calls and grown as needed.
struct Scratch {
  uint8_t *data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(data); }
  bool reserve(int64_t wanted) {
    if (wanted <= bytes) return true;
    std::free(data);
    wanted = (wanted + 4095) / 4096 * 4096;
    data = static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(wanted)));
    bytes = data == nullptr ? 0 : wanted;
    return data != nullptr;
  }
};

thread_local Scratch t_scratch;

bool is_dtype(int32_t dtype) { return dtype == LGQ_F32 || dtype == LGQ_BF16 || dtype == LGQ_F16; }

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_matmul(const void *packed, int64_t packed_bytes, int64_t rows, const void *x, int64_t x_stride,
                   const void *bias, int32_t bias_dtype, void *y, int64_t y_stride, int32_t dtype, int32_t mode) {
  if (x == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (!is_dtype(dtype) || (bias != nullptr && !is_dtype(bias_dtype))) return LGQ_BAD_DTYPE;
  if (mode != LGQ_EXACT && mode != LGQ_INT8) return LGQ_BAD_MODE;
  Product p{};
  const int32_t status = view_packed(packed, packed_bytes, &p.w);
  if (status != LGQ_OK) return status;
  if (rows < 0 || x_stride < p.w.header->in_features || y_stride < p.w.header->out_features) return LGQ_BAD_SIZE;
  if (rows == 0) return LGQ_OK;
  p.x = x;
  p.rows = rows;
  p.x_stride = x_stride;
  p.bias = bias;
  p.bias_dtype = bias_dtype;
  p.y = y;
  p.y_stride = y_stride;
  p.dtype = dtype;
  p.mode = mode;
  const MatmulKernels &k = kernels();
  if (!t_scratch.reserve(k.scratch_bytes(p))) return LGQ_OUT_OF_MEMORY;
  p.scratch = t_scratch.data;
  if (rows * p.w.header->in_features <= kSerialPreparation)
    k.prepare_rows(p, 0, rows);
  else
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) { k.prepare_rows(p, begin, end); });
  parallel_for(p.w.header->blocks, 1, [&](int64_t begin, int64_t end) { k.multiply_blocks(p, begin, end); });
  return LGQ_OK;
}
