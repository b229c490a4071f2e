"""The quantization config that Transformers keeps on a model whose GPTQ checkpoint we loaded."""

from __future__ import annotations

from typing import Any

import transformers

from lightgptq.checkpoint.config import GPTQCheckpointConfig


class GPTQConfig(transformers.GPTQConfig):
    """A checkpoint's ``quantization_config``, complete: Transformers' own class drops ``dynamic`` and ``lm_head``.

    The name is Transformers', because it compares class names when a user passes a ``GPTQConfig`` of his own while
    loading a quantized checkpoint.

    checkpoint  what the checkpoint says about itself

    Raises CheckpointError when the object cannot be understood.
    """

    def __init__(self, **fields: Any) -> None:
        self.checkpoint = GPTQCheckpointConfig.from_dict(fields)
        known = self.checkpoint.to_dict()
        super().__init__(
            bits=known["bits"],
            group_size=known["group_size"],
            damp_percent=known["damp_percent"],
            desc_act=known["desc_act"],
            sym=known["sym"],
            true_sequential=known["true_sequential"],
            format=known["format"],
            meta=known["meta"],
            backend=fields.get("backend"),
            modules_in_block_to_quantize=known.get("modules_in_block_to_quantize"),
        )

    def post_init(self) -> None:
        """Nothing: the values were checked while reading them, and no other package is needed."""
        self.backend = self.backend or "auto"

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json, with every rule that was read."""
        return self.checkpoint.to_dict()
