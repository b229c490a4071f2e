"""The quantized product: one op schema, a torch reference and the fast kernels."""

from lightgptq.ops.matmul import DTYPES, MODES, dequantize, prepare, quant_matmul, restore, runs_directly
from lightgptq.ops.weight import PreparedWeight

__all__ = [
    "DTYPES",
    "MODES",
    "PreparedWeight",
    "dequantize",
    "prepare",
    "quant_matmul",
    "restore",
    "runs_directly",
]
