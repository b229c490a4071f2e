/* The C interface of the native library: plain pointers and sizes, no state that a caller has to manage.
 *
 * Every function that can fail returns an lgq_status and leaves its outputs untouched unless it is LGQ_OK. Turning a
 * status into a sentence is the caller's job, who knows what the numbers mean. Thread-safe after lgq_init.
 */
#ifndef LIGHTGPTQ_H
#define LIGHTGPTQ_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LGQ_API __declspec(dllexport)
#else
#define LGQ_API __attribute__((visibility("default")))
#endif

#define LGQ_ABI_VERSION 7

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lgq_status {
  LGQ_OK = 0,
  LGQ_NULL_POINTER = 1,      /* a required pointer is null */
  LGQ_BAD_SIZE = 2,          /* a size is negative, zero where it may not be, or contradicts another */
  LGQ_BAD_BITS = 3,          /* bits is not 2, 3, 4 or 8 */
  LGQ_BAD_DTYPE = 4,         /* an lgq_dtype that this function does not take */
  LGQ_BAD_MODE = 5,          /* an lgq_mode that does not exist */
  LGQ_BAD_GROUP = 6,         /* a g_idx entry is outside [0, groups) */
  LGQ_BUFFER_TOO_SMALL = 7,  /* an output or work buffer is smaller than asked for */
  LGQ_UNALIGNED = 8,         /* a packed weight does not start at a multiple of 64 bytes */
  LGQ_NOT_PACKED = 9,        /* a buffer is no packed weight of this ABI version */
  LGQ_OUT_OF_MEMORY = 10,    /* scratch memory could not be had */
  LGQ_UNKNOWN_ISA = 11,      /* the instruction set asked for has no such name */
  LGQ_UNSUPPORTED_ISA = 12,  /* the instruction set asked for is not in this CPU or this build */
  LGQ_BAD_VALUE = 13         /* another argument is outside its range */
} lgq_status;

typedef enum lgq_dtype { LGQ_F32 = 0, LGQ_BF16 = 1, LGQ_F16 = 2 } lgq_dtype;

/* Arithmetic of a product: activations as they are with float accumulation, or rounded to 8 bits per group. */
typedef enum lgq_mode { LGQ_EXACT = 0, LGQ_INT8 = 1 } lgq_mode;

LGQ_API int32_t lgq_abi_version(void);

/* Chooses the instruction set: the best that this CPU has when name is null or empty, else the one named ("portable",
 * "avx2", "avx512", "neon"). Call once before anything else. */
LGQ_API int32_t lgq_init(const char *name);

/* Name of the instruction set in use, a static string. */
LGQ_API const char *lgq_isa(void);

/* Comma-separated names of what this CPU and this build have, best last, a static string. */
LGQ_API const char *lgq_isa_list(void);

/* Threads that a parallel loop called from this thread would use. */
LGQ_API int32_t lgq_num_threads(void);

/* ---- Quantized product ---------------------------------------------------------------------------------------------
 * A linear layer (in -> out features) from the four tensors of a GPTQ checkpoint:
 *   qweight int32 [ceil(in*bits/32), out], qzeros int32 [groups, ceil(out*bits/32)], scales float16 [groups, out],
 *   g_idx int32 [in];  W[o,i] = scales[g_idx[i],o] * (code[i,o] - zero[g_idx[i],o]),
 * zero = stored + zero_offset modulo 2^bits (1 for format "gptq", 0 for "gptq_v2").
 */

/* Bytes that the packed form of such a layer takes. */
LGQ_API int32_t lgq_packed_bytes(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits,
                                 const int32_t *g_idx, int64_t *bytes);

/* Asks the system to back this memory, not touched yet, with huge pages where it can. Only ever a hint. */
LGQ_API void lgq_advise_huge_pages(void *memory, int64_t bytes);

/* Repacks it into `packed`, which starts at a multiple of 64 bytes. */
LGQ_API int32_t lgq_pack(int64_t in_features, int64_t out_features, int64_t groups, int32_t bits, int32_t zero_offset,
                         const int32_t *qweight, const int32_t *qzeros, const uint16_t *scales, const int32_t *g_idx,
                         void *packed, int64_t packed_bytes);

/* What a packed weight holds: in_features, out_features, groups, bits. */
LGQ_API int32_t lgq_packed_shape(const void *packed, int64_t packed_bytes, int64_t shape[4]);

/* The inverse of lgq_pack, in plain arrays: codes uint8 (out, in), scales float16 and zeros int32 (groups, out),
 * g_idx int32 (in). */
LGQ_API int32_t lgq_unpack(const void *packed, int64_t packed_bytes, uint8_t *codes, uint16_t *scales, int32_t *zeros,
                           int32_t *g_idx);

/* y[r,:] = x[r,:] @ W^T + bias. x and y have one dtype; strides count elements from row to row; bias may be null. */
LGQ_API int32_t lgq_matmul(const void *packed, int64_t packed_bytes, int64_t rows, const void *x, int64_t x_stride,
                           const void *bias, int32_t bias_dtype, void *y, int64_t y_stride, int32_t dtype, int32_t mode);

/* One of several weights that are multiplied by the same x. */
typedef struct lgq_factor {
  const void *packed;
  int64_t packed_bytes;
  const void *bias; /* may be null */
  int32_t bias_dtype;
} lgq_factor;

/* y[i][r,:] = x[r,:] @ W_i^T + bias_i for up to LGQ_MOST_FACTORS weights of the same in_features: the same results as
 * lgq_matmul for each. Each y[i] is contiguous, (rows, out_features of W_i). Activations are prepared once if the weights
 * agree in bits, groups, g_idx and zeros, else once for each. */
#define LGQ_MOST_FACTORS 16
LGQ_API int32_t lgq_matmul_shared(int32_t count, const lgq_factor *factors, int64_t rows, const void *x,
                                  int64_t x_stride, void *const *y, int32_t dtype, int32_t mode);

/* The weight, (out, in) row-major, computed in float32 and rounded once. */
LGQ_API int32_t lgq_dequantize(const void *packed, int64_t packed_bytes, void *weight, int32_t dtype);

/* --- Around the product ----------------------------------------------------------------------------------------- */

/* y[r,:] = weight * x[r,:] / sqrt(mean(x[r,:]^2) + eps), the quotient rounded to the type first (arXiv 1910.07467,
 * equation 4). x, weight and y have one dtype; x and y are contiguous (rows, cols), and not the same memory. */
LGQ_API int32_t lgq_rms_norm(const void *x, int64_t rows, int64_t cols, const void *weight, float eps, void *y,
                             int32_t dtype);

/* y = softmax(scale * q k^T) v for one query token a sequence, in float, rounded once (arXiv 1706.03762, equation 1).
 * q and y      contiguous (batch, heads, head_dim); y is none of the inputs' memory
 * k and v      (batch, kv_heads, tokens, head_dim), the last dimension contiguous; strides count elements from one to the
 *              next, and are not negative. Head h reads key head h / (heads / kv_heads), which divides without rest
 * tokens       at least 1; head_dim at most LGQ_WIDEST_HEAD
 * dtype        of q, k, v and y. NaN and infinity go through the formula as it stands. */
#define LGQ_WIDEST_HEAD 512
LGQ_API int32_t lgq_attend(const void *q, const void *k, int64_t k_batch, int64_t k_head, int64_t k_token,
                           const void *v, int64_t v_batch, int64_t v_head, int64_t v_token, int64_t batch,
                           int64_t heads, int64_t kv_heads, int64_t tokens, int64_t head_dim, float scale, void *y,
                           int32_t dtype);

/* y = x * cos + rotate_half(x) * sin for the heads of one token a sequence, where rotate_half gives the negated second half
 * of a head and then its first (arXiv 2104.09864, equation 34, with the halves for neighbours); both products and the sum are
 * rounded.
 * x and y    contiguous (batch, heads, head_dim), head_dim even, not the same memory
 * cos, sin   (head_dim,) for every sequence; stride counts elements from one to the next: head_dim, or 0 if they share one
 * dtype      of all four */
LGQ_API int32_t lgq_rotate(const void *x, int64_t batch, int64_t heads, int64_t head_dim, const void *cos, const void *sin,
                           int64_t stride, void *y, int32_t dtype);

typedef enum lgq_activation { LGQ_SILU = 0, LGQ_GELU_TANH = 1 } lgq_activation;

/* y = (activation(x W_0^T + b_0) * (x W_1^T + b_1)) W_2^T + b_2 (arXiv 2002.05202, equation 6), the products as
 * lgq_matmul makes them, activation and gating in float, rounded once to dtype.
 * factors  gate, up and down; the first two have the same inputs and outputs, which are the inputs of the third
 * rows     at most LGQ_MOST_GATED_ROWS
 * x        (rows, in), elements from row to row in x_stride; y contiguous (rows, outputs of down), none of x's memory */
#define LGQ_MOST_GATED_ROWS 64
LGQ_API int32_t lgq_gated_mlp(const lgq_factor *factors, int32_t activation, int64_t rows, const void *x,
                              int64_t x_stride, void *y, int32_t dtype, int32_t mode);

/* --- The solver ------------------------------------------------------------------------------------------------ */

/* GPTQ's sweep (arXiv 2210.17323, algorithm 1) over columns in the order given, on a fixed grid.
 *
 * For j = 0 .. cols - 1: q = clamp(round(w_j / scale) + zero, 0, max_code), e = (w_j - scale (q - zero)) / U_jj,
 * w_k -= e U_jk for k > j.
 * With cycles > 0 codes are searched for in windows of LGQ_WINDOW columns: a sweep over the window, then as many cycles of
 * coordinate descent, in which q_j becomes the grid point nearest to q_j + ((t - q) G)_j / G_jj; the first LGQ_KEPT columns
 * are fixed with these codes, all of the last window's, and the next window begins after them.
 * w       float (rows, ldw); not modified
 * u       float (cols, ldu), upper factor with H^-1 = U^T U; what is below the diagonal is not read into the result
 * scales  float (groups, rows), not 0; zeros int32 (groups, rows) in [0, max_code]; group int32 (cols,)
 * curvature  float, for each window (n, n): G = (U_BB^T U_BB)^-1, both triangles, one after the other; null without cycles
 * codes   uint8 (rows, ldcodes); err float (rows, lderr) or null: e; loss double (rows,): sum of e^2 */
#define LGQ_WINDOW 128
#define LGQ_KEPT 64
LGQ_API int32_t lgq_gptq_sweep(const float *w, int64_t ldw, const float *u, int64_t ldu, int64_t rows, int64_t cols,
                               const float *scales, const int32_t *zeros, int64_t groups, const int32_t *group,
                               int32_t max_code, int32_t cycles, const float *curvature, uint8_t *codes,
                               int64_t ldcodes, float *err, int64_t lderr, double *loss);

/* Upper triangle of H += X^T X, accumulated in float: h float (cols, ldh), x (tokens, ldx) LGQ_F32 or LGQ_BF16.
 * Elements below the diagonal are left in an unspecified state. */
LGQ_API int32_t lgq_add_gram(float *h, int64_t ldh, const void *x, int64_t ldx, int64_t tokens, int64_t cols,
                             int32_t dtype);

/* M += left^T X, accumulated in float: m float (cols, ldm), left (tokens, ldl) and x (tokens, ldx) both LGQ_F32 or both
 * LGQ_BF16. */
LGQ_API int32_t lgq_add_product(float *m, int64_t ldm, const void *left, int64_t ldl, const void *x, int64_t ldx,
                                int64_t tokens, int64_t cols, int32_t dtype);

/* OBQ (arXiv 2208.11580, section 5): every row greedily, the cheapest weight first, outliers before all others.
 * w float (rows, cols), hinv double (cols, cols) symmetric, grid as above, codes uint8 (rows, cols),
 * loss double (rows,): sum of e^2 / [H^-1]_pp over the steps. */
LGQ_API int32_t lgq_obq(const float *w, const double *hinv, int64_t rows, int64_t cols, const float *scales,
                        const int32_t *zeros, int64_t groups, const int32_t *group, int32_t max_code, uint8_t *codes,
                        double *loss);

/* The grid of least weighted error sum_i h_i (w_i - q(w_i))^2 for every row and run of group_width columns: the best of
 * the candidates, the first of equal ones; then up to `refits` times the least-squares scale for its codes, rounded to
 * float16, as long as the error falls.
 * w float (rows, ldw); importance float (cols,), not negative; scales float, not 0, zeros int32
 * (candidates, rows, groups); best_scales float, best_zeros int32 (rows, groups). */
LGQ_API int32_t lgq_search_grid(const float *w, int64_t ldw, int64_t rows, int64_t cols, int64_t groups,
                                int64_t group_width, const float *importance, int64_t candidates, const float *scales,
                                const int32_t *zeros, int32_t refits, int32_t max_code, float *best_scales,
                                int32_t *best_zeros);

/* One pass of refinement: codes are found anew for a block of columns at a time, given all others, and a row takes them
 * where its loss (w - q) H (w - q)^T falls.
 *
 * The best real values are q_B + ((w - q) H)_B H_BB^-1; a sweep over the block rounds them, then `cycles` of coordinate
 * descent under H_BB.
 * w            float (rows, ldw); h float (cols, ldh), both triangles
 * order        int32 (cols,): every column once. Block i is order[first[i]] to order[first[i + 1]], in solving order, of
 *              at most LGQ_WIDEST_BLOCK columns; those in no block keep their codes. first int64 (blocks + 1,)
 * u            float: for each block (n, n), upper, H_BB^-1 = U^T U, one after the other
 * scales_move  0: blocks of any columns. 1: each lies in one group and is the whole of it, whose scale becomes the one
 *              that suits the codes, rounded to float16. 2: zeros one lower and higher are tried as well, in 1 to max_code
 * scales       float, not 0, zeros int32 in [0, max_code], both (groups, rows), and codes uint8 (rows, ldcodes): changed
 * gained       double (rows,): by how much each row's loss fell is added */
#define LGQ_WIDEST_BLOCK 512
LGQ_API int32_t lgq_refine(const float *w, int64_t ldw, const float *h, int64_t ldh, int64_t rows, int64_t cols,
                           const int32_t *order, const int64_t *first, int64_t blocks, const float *u,
                           const int32_t *group, int64_t groups, int32_t scales_move, int32_t max_code, int32_t cycles,
                           float *scales, int32_t *zeros, uint8_t *codes, int64_t ldcodes, double *gained);

#ifdef __cplusplus
}
#endif
#endif
