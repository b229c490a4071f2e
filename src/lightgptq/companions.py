"""What stands beside a checkpoint's weights: its config, its tokenizer, and what the two say about windows of text."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import CalibrationError, CheckpointError, UnsupportedModelError, UsageError

DEFAULT_SEQ_LEN = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def local_folder(reader: CheckpointReader) -> Path:
    """A folder with the checkpoint's config, tokenizer and code, downloaded first if the checkpoint is on the hub."""
    reader.companion_files()
    path = reader.source.path("config.json")
    if path is None:
        raise CheckpointError(f"{reader.label}: config.json has disappeared")
    return path.parent


def load_config(reader: CheckpointReader, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The Transformers config beside the checkpoint; raises UnsupportedModelError for a model type nobody knows."""
    try:
        config = AutoConfig.from_pretrained(str(local_folder(reader)), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"Transformers {transformers.__version__} cannot read the config of {reader.label}: {first}"
        ) from error
    return config


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; raises CalibrationError when Transformers cannot load one."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0].rstrip(" :")
        raise CalibrationError(
            f"{str(folder) or 'the model'} has no tokenizer that Transformers can load: {first}"
        ) from error


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype that "float32", "bfloat16" or "float16" names, None for "auto"; raises UsageError for anything else."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not supported; choose auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def arithmetic_on(dtype: torch.dtype, device: torch.device, *, quantized: bool = False) -> torch.dtype:
    """What a model stored in ``dtype`` computes in on a device: float32 on a CPU without arithmetic for it.

    PyTorch's bfloat16 products are done value by value on a CPU without AVX-512 or SVE, at a sixth of float32's rate
    and less (AMD Zen 3; 2048 x 2048: a two hundredth), at a fifth to a ninth with AVX-512 but without its bfloat16
    instructions (Intel before Cooper Lake, and guests that do not see them), and its float16 products on every CPU.
    With its linears ``quantized`` a model makes hardly any of them, and our exact ones take half as long in bfloat16
    as in float32 with any AVX-512.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        fast = quantized or torch.cpu._is_avx512_bf16_supported()
    else:
        fast = capability.startswith("SVE")
    return dtype if dtype == torch.bfloat16 and fast else torch.float32


def window_length(config: PretrainedConfig, seq_len: int | None) -> int:
    """Tokens of a window: ``seq_len``, or 2048, or the model's context if that is shorter.

    Raises CalibrationError when ``seq_len`` is beyond the context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None or context <= 0:  # XLNet says -1 for no limit
        return seq_len or DEFAULT_SEQ_LEN
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, context)
    if seq_len > context:
        raise CalibrationError(
            f"windows of {seq_len} tokens are beyond the model's context of {context} tokens; "
            "give a smaller --seq-len"
        )
    return seq_len
