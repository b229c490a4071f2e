"""GPTQ for any Hugging Face Transformers language model."""

__version__ = "0.1.0"
