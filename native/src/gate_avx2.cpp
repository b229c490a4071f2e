#include "gate_kernel.h"

namespace lgq {
const GateKernel kGateAvx2 = apply_gate;
}  // namespace lgq
