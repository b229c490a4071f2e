"""The quantized product: one op schema, a torch reference and the fast kernels."""

from lightgptq.ops.matmul import MODES, dequantize, prepare, quant_matmul, restore
from lightgptq.ops.weight import PreparedWeight

__all__ = ["MODES", "PreparedWeight", "dequantize", "prepare", "quant_matmul", "restore"]
