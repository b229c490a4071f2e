#include "gate_kernel.h"

namespace lgq {
const GateKernel kGateAvx512Bf16 = apply_gate;
}  // namespace lgq
