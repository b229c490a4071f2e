#include "attention_kernel.h"

namespace lgq {
const AttendKernel kAttendPortable = attend;
}  // namespace lgq
