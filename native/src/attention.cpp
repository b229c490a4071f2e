// Entry point of attention with one query token a sequence: arguments are checked here, the kernel of the active
// instruction set does the work.
#include "attention.h"

#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"

namespace lgq {
namespace {

// Multiplications that are worth a trip through the threads. Two are as fast as one from 130 tokens of Llama 3.2 1B on,
// 25 microseconds, with the first level of the cache full of something else (AMD Zen 4).
constexpr int64_t kParallel = 1 << 19;
constexpr int64_t kMost = int64_t{1} << 28;      // of what is counted, so that no product of sizes overflows
constexpr int64_t kFurthest = int64_t{1} << 58;  // elements that strides may lead away, nor any offset

bool size_ok(int64_t n) { return n >= 1 && n <= kMost; }

bool stride_ok(int64_t stride, int64_t count) { return stride >= 0 && stride <= kFurthest / count; }

}  // namespace
}  // namespace lgq

using namespace lgq;

int32_t lgq_attend(const void *q, const void *k, int64_t k_batch, int64_t k_head, int64_t k_token, const void *v,
                   int64_t v_batch, int64_t v_head, int64_t v_token, int64_t batch, int64_t heads, int64_t kv_heads,
                   int64_t tokens, int64_t head_dim, float scale, void *y, int32_t dtype) {
  if (q == nullptr || k == nullptr || v == nullptr || y == nullptr) return LGQ_NULL_POINTER;
  if (batch == 0) return LGQ_OK;
  if (!size_ok(batch) || !size_ok(heads) || !size_ok(kv_heads) || !size_ok(tokens)) return LGQ_BAD_SIZE;
  if (heads % kv_heads != 0 || batch * heads > kMost) return LGQ_BAD_SIZE;
  if (head_dim < 1 || head_dim > LGQ_WIDEST_HEAD) return LGQ_BAD_SIZE;
  if (!stride_ok(k_batch, batch) || !stride_ok(k_head, kv_heads) || !stride_ok(k_token, tokens)) return LGQ_BAD_SIZE;
  if (!stride_ok(v_batch, batch) || !stride_ok(v_head, kv_heads) || !stride_ok(v_token, tokens)) return LGQ_BAD_SIZE;
  if (dtype != LGQ_F32 && dtype != LGQ_BF16 && dtype != LGQ_F16) return LGQ_BAD_DTYPE;
  const int64_t runs = (heads / kv_heads + kHeadsAtOnce - 1) / kHeadsAtOnce, items = batch * kv_heads * runs;
  const AttendArgs args{q,     k,        k_batch, k_head,   k_token, v,     v_batch, v_head, v_token,
                        heads, kv_heads, tokens,  head_dim, runs,    scale, y,       dtype};
  const AttendKernel attend = LGQ_ACTIVE(kAttend);
  if (2 * batch * heads * head_dim >= kParallel / tokens)
    parallel_items(items, [&](int64_t item) { attend(args, item); });
  else
    for (int64_t item = 0; item < items; ++item) attend(args, item);
  return LGQ_OK;
}
