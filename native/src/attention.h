// What the entry point of attention hands to the kernels of one instruction set. Pointers are checked by then.
#pragma once

#include <cstdint>

namespace lgq {

// Query heads that go through a key head's memory together.
constexpr int64_t kHeadsAtOnce = 8;

struct AttendArgs {
  const void *q;  // (batch, heads, head_dim)
  // (batch, kv_heads, tokens, head_dim), the last dimension contiguous, strides in elements
  const void *k;
  int64_t k_batch, k_head, k_token;
  const void *v;
  int64_t v_batch, v_head, v_token;
  int64_t heads, kv_heads, tokens, head_dim;
  int64_t runs;  // of kHeadsAtOnce query heads that share a key head, the last one may be shorter
  float scale;
  void *y;  // (batch, heads, head_dim)
  int32_t dtype;
};

// One run of query heads: item = (sequence * kv_heads + key head) * runs + run.
using AttendKernel = void (*)(const AttendArgs &, int64_t item);

extern const AttendKernel kAttendPortable;
extern const AttendKernel kAttendAvx2;
extern const AttendKernel kAttendAvx512;
extern const AttendKernel kAttendAvx512Bf16;
extern const AttendKernel kAttendNeon;

}  // namespace lgq
