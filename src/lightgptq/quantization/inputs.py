"""What a run needs to know before it starts: device, arithmetic and calibration windows."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import CalibrationError, UsageError
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.skeleton import ModelSkeleton, local_folder
from lightgptq.texts import Text

DEFAULT_SEQ_LEN = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda[:N]" names; raises UsageError when there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} does not exist; give auto, cpu or cuda[:N]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but this PyTorch sees no GPU; give --device cpu")
    return device


def choose_dtype(name: str, reader: CheckpointReader, device: torch.device) -> torch.dtype:
    """What the blocks compute in: "auto" is the checkpoint's dtype, but float32 for float16 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is not supported; choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    floating = [reader.dtype(n) for n in reader.names() if reader.dtype(n).is_floating_point]
    common = max(set(floating), key=floating.count, default=torch.float32)
    return torch.float32 if common == torch.float16 and device.type == "cpu" else common


def calibration_windows(
    calibration: str | Text | CalibrationSet,
    skeleton: ModelSkeleton,
    samples: int,
    seq_len: int | None,
    seed: int,
    trust_remote_code: bool,
) -> CalibrationSet:
    """The windows that go through the model; raises CalibrationError when they do not fit it."""
    context = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(calibration, CalibrationSet):
        seq_len = calibration.seq_len
    seq_len = seq_len or min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    if context is not None and seq_len > context:
        raise CalibrationError(
            f"calibration windows of {seq_len} tokens are beyond the model's context of {context} tokens; "
            "give a smaller --seq-len"
        )
    if isinstance(calibration, CalibrationSet):
        windows = calibration
    else:
        tokenizer = _tokenizer(skeleton.reader, trust_remote_code)
        windows = CalibrationSet.build(calibration, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    vocabulary = getattr(skeleton.model.get_input_embeddings(), "num_embeddings", windows.input_ids.max() + 1)
    low, high = int(windows.input_ids.min()), int(windows.input_ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"calibration holds token {low if low < 0 else high}, the model's vocabulary has {vocabulary}; "
            "give the model's own tokenizer"
        )
    return windows


def _tokenizer(reader: CheckpointReader, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(local_folder(reader)), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0].rstrip(" :")
        raise CalibrationError(
            f"{reader.label} has no tokenizer that Transformers can load: {first}"
        ) from error
