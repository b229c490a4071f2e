"""CalibrationSet: the token windows that go through the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightgptq.errors import CalibrationError
from lightgptq.texts import Text, load_text


class Tokenizer(Protocol):
    """The one call that is needed of a Transformers tokenizer."""

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]: ...


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of equal length, without padding.

    input_ids  int64 (samples, seq_len)
    source     the text's name, for the report
    asked      samples that were asked for; fewer are here when the text is short
    extra      further arguments of the model's forward, (samples, ...) each: what Whisper's encoder hears, or images
    """

    input_ids: Tensor
    source: str
    asked: int
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.numel() == 0:
            raise CalibrationError(f"input_ids must be (samples, seq_len), got {tuple(self.input_ids.shape)}")
        for name, value in self.extra.items():
            if len(value) != self.samples:
                raise CalibrationError(f"{name} is for {len(value)} samples, input_ids for {self.samples}")

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in each window."""
        return self.input_ids.shape[1]

    def batches(self, tokens: int) -> list[Tensor]:
        """The windows in order, in batches of about ``tokens`` tokens, at least one window each."""
        return list(self.input_ids.split(max(1, tokens // self.seq_len)))

    def extra_batches(self, tokens: int) -> list[dict[str, Tensor]]:
        """``extra`` for each of `batches`."""
        sizes = [len(batch) for batch in self.batches(tokens)]
        split = {name: value.split(sizes) for name, value in self.extra.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))]

    def identity(self) -> dict[str, object]:
        """What decides the result, for the journal and the report."""
        everything = (self.input_ids, *(self.extra[name] for name in sorted(self.extra)))
        digest = hashlib.sha256()
        for value in everything:
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "source": self.source,
            "asked": self.asked,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "sha256": digest.hexdigest(),
        }

    @classmethod
    def build(
        cls,
        source: str | Text,
        tokenizer: Tokenizer,
        *,
        samples: int = 128,
        seq_len: int = 2048,
        seed: int = 0,
    ) -> CalibrationSet:
        """Cut ``samples`` windows of ``seq_len`` tokens out of a text, spread evenly over it.

        The token stream is divided into ``samples`` equal stretches; each gives one window. ``seed`` 0 takes the start
        of each stretch, any other seed a random place in it. Windows never overlap: a text that is too short gives
        fewer of them. Raises CalibrationError when it does not give even one.
        """
        if samples < 1 or seq_len < 2:
            raise CalibrationError(
                f"samples={samples}, seq_len={seq_len}: need at least 1 sample of 2 tokens"
            )
        text = load_text(source, "calibration") if isinstance(source, str) else source
        ids = torch.tensor(tokenizer(text.joined())["input_ids"], dtype=torch.int64)
        count = min(samples, ids.numel() // seq_len)
        if count == 0:
            raise CalibrationError(
                f"{text.name} has {ids.numel()} tokens, fewer than one window of {seq_len}; "
                "give a longer text or a smaller --seq-len"
            )
        stretch = ids.numel() // count
        starts = torch.arange(count) * stretch
        if seed != 0 and stretch > seq_len:
            generator = torch.Generator().manual_seed(seed)
            starts = starts + torch.randint(0, stretch - seq_len + 1, (count,), generator=generator)
        windows = torch.stack([ids[s : s + seq_len] for s in starts.tolist()])
        return cls(windows, text.name, samples)
