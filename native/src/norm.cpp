// Root mean square normalisation of rows. In a decoding step it is one row of a few thousand numbers, so small that one
// call instead of the seven operations of a framework is what counts.
#include <cmath>

#include "lightgptq.h"
#include "numbers.h"
#include "parallel.h"

namespace lgq {
namespace {

constexpr int64_t kParallel = 1 << 15;  // elements that are worth a trip through the threads

// x / rms(x) is rounded to the rows' type before the weight multiplies it.
template <class Number>
void normalise(const Number *__restrict x, const Number *__restrict weight, int64_t cols, float eps, Number *__restrict y) {
  using F = Format<Number>;
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float f = F::load(x[k + l]);
      sums[l] += f * f;
    }
  float sum = 0.0f;
  for (; k < cols; ++k) sum += F::load(x[k]) * F::load(x[k]);
  for (const float s : sums) sum += s;
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(cols) + eps);
  for (k = 0; k < cols; ++k) {
    const float unit = F::load(F::store(F::load(x[k]) * inverse));
    y[k] = F::store(F::load(weight[k]) * unit);
  }
}

template <class Number>
void normalise_rows(const void *x, int64_t rows, int64_t cols, const void *weight, float eps, void *y) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      normalise(static_cast<const Number *>(x) + row * cols, static_cast<const Number *>(weight), cols, eps,
                static_cast<Number *>(y) + row * cols);
  };
  if (rows > 1 && rows * cols >= kParallel)
    parallel_for(rows, 1, run);
  else
    run(0, rows);
}

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_rms_norm(const void *x, int64_t rows, int64_t cols, const void *weight, float eps, void *y, int32_t dtype) {
  if (x == nullptr || weight == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (rows < 0 || cols < 1 || cols > int64_t{1} << 30 || rows > int64_t{1} << 28) return LGQ_BAD_SIZE;
  if (!(eps >= 0.0f)) return LGQ_BAD_VALUE;
  switch (dtype) {
    case LGQ_F32:
      normalise_rows<float>(x, rows, cols, weight, eps, y);
      return LGQ_OK;
    case LGQ_BF16:
      normalise_rows<Bf16>(x, rows, cols, weight, eps, y);
      return LGQ_OK;
    case LGQ_F16:
      normalise_rows<Half>(x, rows, cols, weight, eps, y);
      return LGQ_OK;
    default:
      return LGQ_BAD_DTYPE;
  }
}
