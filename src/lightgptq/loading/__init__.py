"""GPTQ checkpoints through Transformers' own ``from_pretrained``."""
