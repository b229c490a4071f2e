"""What quantization cost: perplexity, KL divergence, agreement of the top token."""
