#include "gate_kernel.h"

namespace lgq {
const GateKernel kGateNeon = apply_gate;
}  // namespace lgq
