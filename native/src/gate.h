// What the entry point of a gated MLP hands to the kernel of one instruction set. Everything is checked by then.
#pragma once

#include <cstdint>

namespace lgq {

// gate = activation(gate) * up for `count` numbers of one dtype, in float, rounded once.
using GateKernel = void (*)(void *gate, const void *up, int64_t count, int32_t dtype, int32_t activation);

extern const GateKernel kGatePortable;
extern const GateKernel kGateAvx2;
extern const GateKernel kGateAvx512;
extern const GateKernel kGateAvx512Bf16;
extern const GateKernel kGateNeon;

}  // namespace lgq
