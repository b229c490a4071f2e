#include "attention_kernel.h"

namespace lgq {
const AttendKernel kAttendNeon = attend;
}  // namespace lgq
