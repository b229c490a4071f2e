// Which instruction set the kernels use. A kernel exists once per set, in a file whose name ends in the set's name and
// whose symbols end in it too; LGQ_ACTIVE picks the one to call.
#pragma once

namespace lgq {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, neon = 4 };

Isa active_isa();

}  // namespace lgq

// LGQ_ACTIVE(kSolver) is kSolverAvx512, kSolverAvx2, kSolverNeon or kSolverPortable, whichever is for the active set.
#if defined(LGQ_X86)
#define LGQ_ACTIVE(kernel)                                                \
  (::lgq::active_isa() == ::lgq::Isa::avx512_bf16 ? kernel##Avx512Bf16    \
   : ::lgq::active_isa() == ::lgq::Isa::avx512    ? kernel##Avx512        \
   : ::lgq::active_isa() == ::lgq::Isa::avx2      ? kernel##Avx2          \
                                                  : kernel##Portable)
#elif defined(LGQ_ARM64)
#define LGQ_ACTIVE(kernel) (::lgq::active_isa() == ::lgq::Isa::neon ? kernel##Neon : kernel##Portable)
#else
#define LGQ_ACTIVE(kernel) (kernel##Portable)
#endif
