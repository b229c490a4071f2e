// Rotary position embedding of one token a sequence: a few thousand numbers, so that one call instead of fourteen operations of
// a framework is what counts.
#include "lightgptq.h"
#include "numbers.h"

namespace lgq {
namespace {

constexpr int64_t kMost = int64_t{1} << 28;  // of what is counted, so that no product of sizes overflows

// Both products and their sum are rounded to the heads' type.
template <class Number>
void rotate_head(const Number *__restrict x, const Number *__restrict cos, const Number *__restrict sin, int64_t half,
                 Number *__restrict y) {
  using F = Format<Number>;
  for (int64_t d = 0; d < half; ++d) {
    const float low = F::load(x[d]), high = F::load(x[d + half]);
    const float a = F::load(F::store(low * F::load(cos[d]))), b = F::load(F::store(-high * F::load(sin[d])));
    y[d] = F::store(a + b);
  }
  for (int64_t d = 0; d < half; ++d) {
    const float low = F::load(x[d]), high = F::load(x[d + half]);
    const float a = F::load(F::store(high * F::load(cos[d + half]))), b = F::load(F::store(low * F::load(sin[d + half])));
    y[d + half] = F::store(a + b);
  }
}

template <class Number>
void rotate(const void *x, int64_t batch, int64_t heads, int64_t head_dim, const void *cos, const void *sin, int64_t stride,
            void *y) {
  for (int64_t i = 0; i < batch * heads; ++i) {
    const int64_t turn = i / heads * stride, at = i * head_dim;
    rotate_head(static_cast<const Number *>(x) + at, static_cast<const Number *>(cos) + turn,
                static_cast<const Number *>(sin) + turn, head_dim / 2, static_cast<Number *>(y) + at);
  }
}

bool size_ok(int64_t n) { return n >= 1 && n <= kMost; }

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_rotate(const void *x, int64_t batch, int64_t heads, int64_t head_dim, const void *cos, const void *sin,
                   int64_t stride, void *y, int32_t dtype) {
  if (x == nullptr || cos == nullptr || sin == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (!size_ok(batch) || !size_ok(heads) || !size_ok(head_dim) || head_dim % 2 != 0) return LGQ_BAD_SIZE;
  if (batch * heads > kMost || (stride != 0 && stride != head_dim)) return LGQ_BAD_SIZE;
  switch (dtype) {
    case LGQ_F32:
      rotate<float>(x, batch, heads, head_dim, cos, sin, stride, y);
      return LGQ_OK;
    case LGQ_BF16:
      rotate<Bf16>(x, batch, heads, head_dim, cos, sin, stride, y);
      return LGQ_OK;
    case LGQ_F16:
      rotate<Half>(x, batch, heads, head_dim, cos, sin, stride, y);
      return LGQ_OK;
    default:
      return LGQ_BAD_DTYPE;
  }
}
