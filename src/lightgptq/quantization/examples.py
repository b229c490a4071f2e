"""Calibration windows out of examples that are tokenized already, as other tools take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightgptq.errors import CalibrationError
from lightgptq.quantization.calibration import CalibrationSet


def windows_of_examples(examples: Sequence[Any], *, longest: int, source: str = "examples") -> CalibrationSet:
    """Windows of equal length out of tokenized examples of any lengths.

    examples  each a mapping with ``input_ids`` and perhaps ``attention_mask``, or token ids alone; lists or tensors,
              of one sequence or a batch of them. Tokens that the mask hides are left out.
    longest   tokens that a window may have at most

    Examples of one length are the windows. Otherwise they are joined in order into one stream, which is cut into
    windows as long as the longest example, or ``longest``; what remains at the end is dropped. Raises
    CalibrationError for examples without tokens.
    """
    sequences = [sequence for example in examples for sequence in _sequences(example)]
    lengths = {sequence.numel() for sequence in sequences}
    if not sequences or max(lengths) < 2:
        raise CalibrationError("the examples hold no tokens; give dictionaries with input_ids")
    if len(lengths) == 1 and max(lengths) <= longest:
        return CalibrationSet(torch.stack(sequences), source, len(sequences))
    stream, width = torch.cat(sequences), min(max(lengths), longest)
    count = stream.numel() // width
    return CalibrationSet(stream[: count * width].view(count, width), source, count)


def _sequences(example: Any) -> list[Tensor]:
    """The sequences of one example, without padding."""
    if isinstance(example, Mapping) or hasattr(example, "keys"):
        if "input_ids" not in example:
            raise CalibrationError(f"an example has {', '.join(map(str, example))}, but no input_ids")
        ids, mask = example["input_ids"], example.get("attention_mask")
    else:
        ids, mask = example, None
    try:
        rows = torch.atleast_2d(torch.as_tensor(ids, dtype=torch.int64))
        shown = torch.ones_like(rows) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"an example's input_ids are no rectangle of token ids: {error}") from error
    if rows.shape != shown.shape:
        raise CalibrationError(
            f"an example has input_ids of shape {tuple(rows.shape)}, but an attention_mask of {tuple(shown.shape)}"
        )
    return [row[keep.bool()] for row, keep in zip(rows, shown, strict=True) if bool(keep.any())]
