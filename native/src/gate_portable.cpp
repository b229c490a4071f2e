#include "gate_kernel.h"

namespace lgq {
const GateKernel kGatePortable = apply_gate;
}  // namespace lgq
