// Entry points of the solver: arguments are checked here, the kernels of the active instruction set do the work.
#include "solver.h"

#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"

namespace lgq {
namespace {

const SolverKernels &kernels() {
  switch (active_isa()) {
#if defined(LGQ_X86)
    case Isa::avx2:
      return kSolverAvx2;
    case Isa::avx512:
      return kSolverAvx512;
#elif defined(LGQ_ARM64)
    case Isa::neon:
      return kSolverNeon;
#endif
    default:
      return kSolverPortable;
  }
}

// 2^20 columns: H alone would be 4 TiB, and no product of sizes below overflows.
bool size_ok(int64_t n) { return n >= 1 && n <= int64_t{1} << 20; }

// A leading dimension: at least the columns, and such that no offset overflows.
bool stride_ok(int64_t ld, int64_t cols) { return ld >= cols && ld <= int64_t{1} << 40; }

// Activations of tokens rows.
bool rows_ok(int64_t ld, int64_t tokens, int64_t cols) { return ld >= cols && ld <= (int64_t{1} << 60) / tokens; }

lgq_status check_groups(const int32_t *group, int64_t cols, int64_t groups) {
  for (int64_t i = 0; i < cols; ++i)
    if (group[i] < 0 || group[i] >= groups) return LGQ_BAD_GROUP;
  return LGQ_OK;
}

lgq_status finished(bool ok) { return ok ? LGQ_OK : LGQ_OUT_OF_MEMORY; }

}  // namespace
}  // namespace lgq

int32_t lgq_gptq_sweep(const float *w, int64_t ldw, const float *u, int64_t ldu, int64_t rows, int64_t cols,
                       const float *scales, const int32_t *zeros, int64_t groups, const int32_t *group,
                       int32_t max_code, uint8_t *codes, int64_t ldcodes, float *err, int64_t lderr, double *loss) {
  using namespace lgq;
  if (!w || !u || !scales || !zeros || !group || !codes || !loss) return LGQ_NULL_POINTER;
  if (!size_ok(rows) || !size_ok(cols) || !size_ok(groups) || !stride_ok(ldw, cols) || !stride_ok(ldu, cols) ||
      !stride_ok(ldcodes, cols) || (err && !stride_ok(lderr, cols)))
    return LGQ_BAD_SIZE;
  if (max_code < 1 || max_code > 255) return LGQ_BAD_VALUE;
  if (check_groups(group, cols, groups) != LGQ_OK) return LGQ_BAD_GROUP;
  return finished(kernels().sweep({w, ldw, u, ldu, rows, cols, scales, zeros, group, groups, max_code, codes, ldcodes,
                                   err, lderr, loss, max_threads()}));
}

int32_t lgq_add_gram(float *h, int64_t ldh, const void *x, int64_t ldx, int64_t tokens, int64_t cols, int32_t dtype) {
  using namespace lgq;
  if (!h || !x) return LGQ_NULL_POINTER;
  if (dtype != LGQ_F32 && dtype != LGQ_BF16) return LGQ_BAD_DTYPE;
  if (tokens < 1 || tokens > int64_t{1} << 40 || !size_ok(cols) || !stride_ok(ldh, cols) || !rows_ok(ldx, tokens, cols))
    return LGQ_BAD_SIZE;
  return finished(kernels().syrk({x, ldx, x, ldx, true, tokens, cols, dtype == LGQ_BF16, h, ldh, max_threads()}));
}

int32_t lgq_add_product(float *m, int64_t ldm, const void *left, int64_t ldl, const void *x, int64_t ldx,
                        int64_t tokens, int64_t cols, int32_t dtype) {
  using namespace lgq;
  if (!m || !left || !x) return LGQ_NULL_POINTER;
  if (dtype != LGQ_F32 && dtype != LGQ_BF16) return LGQ_BAD_DTYPE;
  if (tokens < 1 || tokens > int64_t{1} << 40 || !size_ok(cols) || !stride_ok(ldm, cols) ||
      !rows_ok(ldl, tokens, cols) || !rows_ok(ldx, tokens, cols))
    return LGQ_BAD_SIZE;
  return finished(kernels().syrk({left, ldl, x, ldx, false, tokens, cols, dtype == LGQ_BF16, m, ldm, max_threads()}));
}

int32_t lgq_obq(const float *w, const double *hinv, int64_t rows, int64_t cols, const float *scales,
                const int32_t *zeros, int64_t groups, const int32_t *group, int32_t max_code, uint8_t *codes,
                double *loss) {
  using namespace lgq;
  if (!w || !hinv || !scales || !zeros || !group || !codes || !loss) return LGQ_NULL_POINTER;
  if (!size_ok(rows) || !size_ok(cols) || !size_ok(groups)) return LGQ_BAD_SIZE;
  if (max_code < 1 || max_code > 255) return LGQ_BAD_VALUE;
  if (check_groups(group, cols, groups) != LGQ_OK) return LGQ_BAD_GROUP;
  return finished(
      kernels().obq({w, hinv, rows, cols, scales, zeros, group, groups, max_code, codes, loss, max_threads()}));
}

int32_t lgq_search_grid(const float *w, int64_t ldw, int64_t rows, int64_t cols, int64_t groups, int64_t group_width,
                        const float *importance, int64_t candidates, const float *scales, const int32_t *zeros,
                        int32_t refits, int32_t max_code, float *best_scales, int32_t *best_zeros) {
  using namespace lgq;
  if (!w || !importance || !scales || !zeros || !best_scales || !best_zeros) return LGQ_NULL_POINTER;
  if (!size_ok(rows) || !size_ok(cols) || !size_ok(groups) || !size_ok(group_width) || !stride_ok(ldw, cols))
    return LGQ_BAD_SIZE;
  if ((groups - 1) * group_width >= cols || groups * group_width < cols) return LGQ_BAD_SIZE;
  if (candidates < 1 || candidates > 1 << 16 || refits < 0 || max_code < 1 || max_code > 255) return LGQ_BAD_VALUE;
  return finished(kernels().search_grid({w, ldw, rows, cols, groups, group_width, importance, candidates, scales, zeros,
                                         refits, max_code, best_scales, best_zeros, max_threads()}));
}
