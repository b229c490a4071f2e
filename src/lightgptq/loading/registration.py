"""register(): Transformers loads GPTQ checkpoints with our layers, until unregister()."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lightgptq.loading.config import GPTQConfig
from lightgptq.loading.quantizer import LightGPTQQuantizer

_OURS: tuple[tuple[Any, Any], ...] = (
    (AUTO_QUANTIZER_MAPPING, LightGPTQQuantizer),
    (AUTO_QUANTIZATION_CONFIG_MAPPING, GPTQConfig),
)
_METHOD = "gptq"
_replaced: list[Any] = []


def register() -> None:
    """Let ``from_pretrained`` of every Transformers class load GPTQ checkpoints with lightgptq's layers.

    Replaces the "gptq" entries of Transformers' two tables of quantization methods, which need the packages optimum
    and gptqmodel; nothing else is changed, and importing lightgptq alone changes nothing. A second call does nothing.
    """
    if _replaced:
        return
    _replaced.extend(table[_METHOD] for table, _ in _OURS)
    for table, ours in _OURS:
        table[_METHOD] = ours


def unregister() -> None:
    """Put back what `register` replaced; models that are loaded stay as they are."""
    for (table, ours), theirs in zip(_OURS, _replaced, strict=False):
        if table[_METHOD] is ours:  # another package may have taken the entry in the meantime
            table[_METHOD] = theirs
    _replaced.clear()
