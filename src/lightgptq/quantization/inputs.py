"""What a run needs to know before it starts: device, arithmetic and calibration windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import arithmetic_on, load_tokenizer, local_folder, named_dtype, window_length
from lightgptq.errors import CalibrationError, UsageError
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.skeleton import ModelSkeleton
from lightgptq.texts import Text


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
    """What the blocks compute in: "auto" is the checkpoint's dtype where the device has arithmetic for it."""
    asked = named_dtype(name)
    if asked is not None:
        return asked
    floating = [reader.dtype(n) for n in reader.names() if reader.dtype(n).is_floating_point]
    common = max(set(floating), key=floating.count, default=torch.float32)
    return arithmetic_on(common, device)


def forward_arguments(
    model: PreTrainedModel, input_ids: Tensor, extra: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the model's forward is called with for one batch of windows.

    A model with an encoder and a decoder gets the same tokens in both. One whose encoder takes something else than
    tokens (sound, say) needs it in ``extra``; raises CalibrationError when it is not there.
    """
    call = dict(extra)
    if model.main_input_name == "input_ids":
        call["input_ids"] = input_ids
    elif model.main_input_name not in extra:
        raise CalibrationError(
            f"{type(model).__name__} takes {model.main_input_name}, which a text does not give; calibrate with a "
            "CalibrationSet that has them in extra, or use --method rtn"
        )
    if model.config.is_encoder_decoder:
        call.setdefault("decoder_input_ids", input_ids)
    return call


def send_all_tokens_to_experts(skeleton: ModelSkeleton) -> None:
    """Calibrate every expert with every token; raises UsageError when the model has no experts."""
    if not skeleton.experts:
        raise UsageError(
            f"--moe-all-experts: {type(skeleton.model).__name__} has no experts in a layout that is known"
        )
    for path in skeleton.experts:
        skeleton.model.get_submodule(path).all_tokens = True  # type: ignore[assignment]


def calibration_windows(
    calibration: str | Text | CalibrationSet,
    skeleton: ModelSkeleton,
    samples: int,
    seq_len: int | None,
    seed: int,
    trust_remote_code: bool,
) -> CalibrationSet:
    """The windows that go through the model; raises CalibrationError when they do not fit it."""
    if isinstance(calibration, CalibrationSet):
        seq_len = calibration.seq_len
    seq_len = window_length(skeleton.model.config, seq_len)
    if isinstance(calibration, CalibrationSet):
        windows = calibration
    else:
        tokenizer = load_tokenizer(local_folder(skeleton.reader), trust_remote_code=trust_remote_code)
        windows = CalibrationSet.build(calibration, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    forward_arguments(skeleton.model, windows.input_ids, windows.extra)
    vocabulary = getattr(skeleton.model.get_input_embeddings(), "num_embeddings", windows.input_ids.max() + 1)
    low, high = int(windows.input_ids.min()), int(windows.input_ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"calibration holds token {low if low < 0 else high}, the model's vocabulary has {vocabulary}; "
            "give the model's own tokenizer"
        )
    return windows
