// Which instruction set the kernels use. A kernel exists once per set, in a file whose name ends in the set's name and
// whose symbols live in the namespace of that name; the caller switches on active_isa().
#pragma once

namespace lgq {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, neon = 3 };

Isa active_isa();

}  // namespace lgq
