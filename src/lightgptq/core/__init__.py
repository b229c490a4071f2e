"""The mathematics of quantization, on plain tensors."""
