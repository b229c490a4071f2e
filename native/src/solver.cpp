// Entry points of the solver: arguments are checked here, the kernels of the active instruction set do the work.
#include "solver.h"

#include <memory>
#include <new>

#include "isa.h"
#include "lightgptq.h"
#include "parallel.h"

namespace lgq {
namespace {

const SolverKernels &kernels() { return LGQ_ACTIVE(kSolver); }

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

bool is_permutation(const int32_t *order, int64_t n) {
  std::unique_ptr<bool[]> seen(new (std::nothrow) bool[static_cast<size_t>(n)]());
  if (!seen) return false;
  for (int64_t i = 0; i < n; ++i) {
    if (order[i] < 0 || order[i] >= n || seen[order[i]]) return false;
    seen[order[i]] = true;
  }
  return true;
}

// Whether order[begin] to order[end] are the columns of one group, all of them.
bool is_whole_group(const int32_t *order, const int32_t *group, int64_t cols, int64_t begin, int64_t end) {
  const int32_t g = group[order[begin]];
  for (int64_t k = 0; k < cols; ++k)
    if ((group[order[k]] == g) != (k >= begin && k < end)) return false;
  return true;
}

lgq_status finished(bool ok) { return ok ? LGQ_OK : LGQ_OUT_OF_MEMORY; }

}  // namespace
}  // namespace lgq

int32_t lgq_gptq_sweep(const float *w, int64_t ldw, const float *u, int64_t ldu, int64_t rows, int64_t cols,
                       const float *scales, const int32_t *zeros, int64_t groups, const int32_t *group,
                       int32_t max_code, int32_t cycles, const float *curvature, uint8_t *codes, int64_t ldcodes, float *err,
                       int64_t lderr, double *loss) {
  using namespace lgq;
  if (!w || !u || !scales || !zeros || !group || !codes || !loss || (cycles > 0 && !curvature))
    return LGQ_NULL_POINTER;
  if (!size_ok(rows) || !size_ok(cols) || !size_ok(groups) || !stride_ok(ldw, cols) || !stride_ok(ldu, cols) ||
      !stride_ok(ldcodes, cols) || (err && !stride_ok(lderr, cols)))
    return LGQ_BAD_SIZE;
  if (max_code < 1 || max_code > 255 || cycles < 0) return LGQ_BAD_VALUE;
  if (check_groups(group, cols, groups) != LGQ_OK) return LGQ_BAD_GROUP;
  return finished(kernels().sweep({w, ldw, u, ldu, rows, cols, scales, zeros, group, groups, max_code, cycles, curvature,
                                   codes, ldcodes, err, lderr, loss, max_threads()}));
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

int32_t lgq_refine(const float *w, int64_t ldw, const float *h, int64_t ldh, int64_t rows, int64_t cols,
                   const int32_t *order, const int64_t *first, int64_t blocks, const float *u, const int32_t *group,
                   int64_t groups, int32_t scales_move, int32_t max_code, int32_t cycles, float *scales, int32_t *zeros,
                   uint8_t *codes, int64_t ldcodes, double *gained) {
  using namespace lgq;
  if (!w || !h || !order || !first || !u || !group || !scales || !zeros || !codes || !gained) return LGQ_NULL_POINTER;
  if (!size_ok(rows) || !size_ok(cols) || !size_ok(groups) || !size_ok(blocks) || !stride_ok(ldw, cols) ||
      !stride_ok(ldh, cols) || !stride_ok(ldcodes, cols) || blocks > cols || first[0] < 0 || first[blocks] > cols)
    return LGQ_BAD_SIZE;
  if (max_code < 1 || max_code > 255 || scales_move < 0 || scales_move > 2 || cycles < 0)
    return LGQ_BAD_VALUE;
  if (check_groups(group, cols, groups) != LGQ_OK) return LGQ_BAD_GROUP;
  if (!is_permutation(order, cols)) return LGQ_BAD_VALUE;
  for (int64_t i = 0; i < blocks; ++i) {
    if (first[i + 1] <= first[i] || first[i + 1] > cols || first[i + 1] - first[i] > LGQ_WIDEST_BLOCK) return LGQ_BAD_SIZE;
    if (scales_move && !is_whole_group(order, group, cols, first[i], first[i + 1])) return LGQ_BAD_GROUP;
  }
  return finished(kernels().refine({w, ldw, h, ldh, rows, cols, order, first, blocks, u, group, groups, scales_move > 0,
                                    scales_move > 1, max_code, cycles, scales, zeros, codes, ldcodes, gained, max_threads()}));
}
