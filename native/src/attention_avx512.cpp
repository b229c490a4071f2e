#include "attention_kernel.h"

namespace lgq {
const AttendKernel kAttendAvx512 = attend;
}  // namespace lgq
