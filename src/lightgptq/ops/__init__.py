"""The quantized product: one op schema, a torch reference and the fast kernels."""
