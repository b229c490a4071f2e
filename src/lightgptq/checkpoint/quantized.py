"""The quantized linears of a GPTQ checkpoint, read one at a time as integer codes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.packing import (
    PackedWeight,
    detect_checkpoint_format,
    num_words,
    trivial_g_idx,
    unpack,
)
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError

logger = logging.getLogger(__name__)

PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A reader together with what its GPTQ config says.

    reader  the checkpoint
    config  its quantization_config
    """

    reader: CheckpointReader
    config: GPTQCheckpointConfig

    @classmethod
    def of(cls, reader: CheckpointReader) -> QuantizedCheckpoint:
        """Raises CheckpointError when the checkpoint has no GPTQ config or no quantized tensor."""
        config = reader.quantization_config()
        if config is None:
            raise CheckpointError(f"{reader.label}: no quantization_config; this is no GPTQ checkpoint")
        found = cls(reader, config)
        if not found.modules:
            raise CheckpointError(f"{reader.label}: has a GPTQ config, but no tensor ends in .qweight")
        return found

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the quantized linears, as the file has them."""
        return tuple(
            name.removesuffix(".qweight") for name in self.reader.names() if name.endswith(".qweight")
        )

    def plain_names(self) -> Iterator[str]:
        """Names of all tensors that are not packed: embeddings, norms, biases, unquantized linears."""
        packed = {f"{module}.{suffix}" for module in self.modules for suffix in PACKED_SUFFIXES}
        return (name for name in self.reader.names() if name not in packed)

    def scheme(self, module: str) -> QuantScheme:
        """The scheme of a quantized linear; CheckpointError when the config calls it unquantized."""
        scheme = self.config.scheme_for(module)
        if scheme is None:
            raise CheckpointError(
                f"{self.reader.label}: {module}.qweight exists, but the config says that it is not quantized"
            )
        return scheme

    def packed(self, module: str) -> tuple[PackedWeight, int]:
        """The four tensors of a linear and its in_features; a g_idx that old files lack is ``i // group_size``."""
        scheme = self.scheme(module)
        qweight = self.reader.tensor(f"{module}.qweight")
        if f"{module}.g_idx" in self.reader:
            g_idx = self.reader.tensor(f"{module}.g_idx")
        else:
            in_features = qweight.shape[0] * 32 // scheme.bits
            g_idx = trivial_g_idx(in_features, scheme.group_size)
        if num_words(g_idx.numel(), scheme.bits) != qweight.shape[0]:
            raise CheckpointError(
                f"{self.reader.label}: {module}.qweight has {qweight.shape[0]} rows, but {g_idx.numel()} inputs of "
                f"{scheme.bits} bits take {num_words(g_idx.numel(), scheme.bits)}"
            )
        tensors = {name: self.reader.tensor(f"{module}.{name}") for name in ("qzeros", "scales")}
        return PackedWeight(qweight=qweight, g_idx=g_idx, **tensors), g_idx.numel()

    def weight(self, module: str) -> QuantizedWeight:
        """The integer codes, zeros and scales of a linear, whatever the label says about its zeros.

        Raises CheckpointError, naming the module, when its tensors cannot be those of one linear.
        """
        scheme = self.scheme(module)
        packed, in_features = self.packed(module)
        out_features = packed.scales.shape[-1]
        try:
            finding = detect_checkpoint_format(
                packed.qzeros, scheme.bits, out_features, scheme.sym, self.config.checkpoint_format
            )
            if finding.message is not None:
                logger.warning("%s: %s: %s", self.reader.label, module, finding.message)
            return unpack(packed, scheme.bits, finding.checkpoint_format, in_features, out_features)
        except CheckpointError as error:
            raise CheckpointError(f"{self.reader.label}: {module}: {error}") from error
