#include "solver_gptq.h"
#include "solver_grid.h"
#include "solver_obq.h"
#include "solver_refine.h"
#include "solver_syrk.h"

namespace lgq {
const SolverKernels kSolverAvx512Bf16{sweep, syrk, obq, search_grid, refine};
}  // namespace lgq
