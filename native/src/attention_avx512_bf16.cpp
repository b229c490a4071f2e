#include "attention_kernel.h"

namespace lgq {
const AttendKernel kAttendAvx512Bf16 = attend;
}  // namespace lgq
