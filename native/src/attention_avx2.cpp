#include "attention_kernel.h"

namespace lgq {
const AttendKernel kAttendAvx2 = attend;
}  // namespace lgq
