// A gated MLP of three quantized weights in one call: in a decoding step, what lies between the products takes longer than it
// should because their weights have driven whoever calls out of the caches.
#include "gate.h"
#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"
#include "scratch.h"

namespace lgq {
namespace {

constexpr int64_t kParallel = 1 << 15;  // numbers that are worth a trip through the threads

thread_local Scratch t_between;

int64_t bytes_of(int32_t dtype) { return dtype == LGQ_F32 ? 4 : 2; }

void gate(uint8_t *gate, const uint8_t *up, int64_t count, int32_t dtype, int32_t activation) {
  const GateKernel apply = LGQ_ACTIVE(kGate);
  if (count < kParallel) return apply(gate, up, count, dtype, activation);
  parallel_for(count, 64, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * bytes_of(dtype);
    apply(gate + at, up + at, end - begin, dtype, activation);
  });
}

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_gated_mlp(const lgq_factor *factors, int32_t activation, int64_t rows, const void *x, int64_t x_stride, void *y,
                      int32_t dtype, int32_t mode) {
  if (factors == nullptr || x == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (activation != LGQ_SILU && activation != LGQ_GELU_TANH) return LGQ_BAD_VALUE;
  if (dtype != LGQ_F32 && dtype != LGQ_BF16 && dtype != LGQ_F16) return LGQ_BAD_DTYPE;
  if (rows < 0 || rows > LGQ_MOST_GATED_ROWS) return LGQ_BAD_SIZE;
  int64_t shapes[3][4];
  for (int i = 0; i < 3; ++i) {
    const int32_t status = lgq_packed_shape(factors[i].packed, factors[i].packed_bytes, shapes[i]);
    if (status != LGQ_OK) return status;
  }
  const int64_t width = shapes[0][1], outputs = shapes[2][1];
  if (shapes[1][1] != width || shapes[2][0] != width) return LGQ_BAD_SIZE;
  if (rows == 0) return LGQ_OK;
  const int64_t part = (rows * width * bytes_of(dtype) + 63) / 64 * 64;
  if (!t_between.reserve(2 * part)) return LGQ_OUT_OF_MEMORY;
  uint8_t *const between = t_between.data;
  void *const inner[2] = {between, between + part};
  const int32_t status = lgq_matmul_shared(2, factors, rows, x, x_stride, inner, dtype, mode);
  if (status != LGQ_OK) return status;
  gate(between, between + part, rows * width, dtype, activation);
  const lgq_factor &down = factors[2];
  return lgq_matmul(down.packed, down.packed_bytes, rows, between, width, down.bias, down.bias_dtype, y, outputs, dtype, mode);
}
