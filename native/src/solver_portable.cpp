#include "solver_obq.h"
#include "solver_sweep.h"
#include "solver_syrk.h"

namespace lgq {
const SolverKernels kSolverPortable{sweep, syrk, obq};
}  // namespace lgq
