// What the solver's entry points hand to the kernels of one instruction set. Pointers are checked by then.
#pragma once

#include <cstdint>

namespace lgq {

struct SweepArgs {
  const float *w;         // (rows, cols), leading dimension ldw
  int64_t ldw;
  const float *u;         // (cols, cols) upper, leading dimension ldu
  int64_t ldu;
  int64_t rows, cols;
  const float *scales;    // (groups, rows)
  const int32_t *zeros;   // (groups, rows)
  const int32_t *group;   // (cols,)
  int64_t groups;
  int32_t max_code;
  int32_t cycles;         // of coordinate descent in every window; 0 for the plain sweep
  const float *curvature; // of each window (n, n), one after the other
  uint8_t *codes;         // (rows, cols), leading dimension ldcodes
  int64_t ldcodes;
  float *err;             // (rows, cols), leading dimension lderr, or null
  int64_t lderr;
  double *loss;           // (rows,)
  int64_t threads;        // at least 1
};

struct SyrkArgs {
  const void *left;       // (tokens, cols), leading dimension ldl, float32 or bfloat16; x itself for X^T X
  int64_t ldl;
  const void *x;          // (tokens, cols), leading dimension ldx, the same type
  int64_t ldx;
  bool triangle;          // only what is on and above the diagonal is wanted
  int64_t tokens, cols;
  bool bf16;
  float *h;              // (cols, cols), leading dimension ldh
  int64_t ldh;
  int64_t threads;        // at least 1
};

struct ObqArgs {
  const float *w;         // (rows, cols), contiguous
  const double *hinv;     // (cols, cols), contiguous, symmetric
  int64_t rows, cols;
  const float *scales;    // (groups, rows)
  const int32_t *zeros;   // (groups, rows)
  const int32_t *group;   // (cols,)
  int64_t groups;
  int32_t max_code;
  uint8_t *codes;         // (rows, cols)
  double *loss;           // (rows,)
  int64_t threads;        // at least 1
};

struct GridArgs {
  const float *w;             // (rows, cols), leading dimension ldw
  int64_t ldw;
  int64_t rows, cols;
  int64_t groups, group_width;  // groups * group_width covers cols, the last group may be shorter
  const float *importance;    // (cols,)
  int64_t candidates;
  const float *scales;        // (candidates, rows, groups)
  const int32_t *zeros;       // (candidates, rows, groups)
  int32_t refits;
  int32_t max_code;
  float *best_scales;         // (rows, groups)
  int32_t *best_zeros;        // (rows, groups)
  int64_t threads;            // at least 1
};

struct RefineArgs {
  const float *w;           // (rows, cols), leading dimension ldw
  int64_t ldw;
  const float *h;           // (cols, cols) symmetric, leading dimension ldh
  int64_t ldh;
  int64_t rows, cols;
  const int32_t *order;     // (cols,) every column once, block after block
  const int64_t *first;     // (blocks + 1,) where a block begins in it
  int64_t blocks;
  const float *u;           // of each block (n, n) upper, H_BB^-1 = U^T U, one after the other
  const int32_t *group;     // (cols,)
  int64_t groups;
  bool single_groups;       // every block is a whole group: its scale moves
  bool move_zeros;          // its zero as well
  int32_t max_code;
  int32_t cycles;           // of coordinate descent after a block's sweep
  float *scales;            // (groups, rows), modified
  int32_t *zeros;           // (groups, rows), modified
  uint8_t *codes;           // (rows, cols), leading dimension ldcodes, modified
  int64_t ldcodes;
  double *gained;           // (rows,): what each row's loss lost is added
  int64_t threads;          // at least 1
};

// Each returns false when memory ran out.
struct SolverKernels {
  bool (*sweep)(const SweepArgs &);
  bool (*syrk)(const SyrkArgs &);
  bool (*obq)(const ObqArgs &);
  bool (*search_grid)(const GridArgs &);
  bool (*refine)(const RefineArgs &);
};

extern const SolverKernels kSolverPortable;
extern const SolverKernels kSolverAvx2;
extern const SolverKernels kSolverAvx512;
extern const SolverKernels kSolverAvx512Bf16;
extern const SolverKernels kSolverNeon;

}  // namespace lgq
