// The quantized product with AVX-512 and VNNI. int8 and exact are both integer dot products of codes with bytes: activations
// rounded to 8 bits, or the digits of a fixed-point number: three of a bfloat16 or float16, of which the third is rare
// (matmul_rare_third.h), four of a float32 (matmul_quads.h). A dot product takes four codes, a float32 one a single code.
#include "matmul_avx512_kernel.h"

const lgq::MatmulKernels lgq::kMatmulAvx512 = kernels_of<Avx512<true>, kInt8, kRareThird, kFourDigits>();
