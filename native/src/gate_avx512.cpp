#include "gate_kernel.h"

namespace lgq {
const GateKernel kGateAvx512 = apply_gate;
}  // namespace lgq
