"""A model whose last blocks use keys and values that earlier ones leave for them in a mapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.architectures.zoo import windows_for
from tests.folders import contents

import lightgptq
from lightgptq import QuantScheme
from lightgptq.errors import UnsupportedModelError
from lightgptq.quantization import job
from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.left_states import LeftStates
from lightgptq.quantization.progress import Progress

NAME = "gemma3n-shared"
PLAIN = QuantScheme(group_size=32)
CORRECTED = QuantScheme(group_size=32, mismatch=1.0, mismatch_every=2, refine=2)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", windows_for(NAME).input_ids.numel() // 3)


@pytest.mark.parametrize("scheme", [PLAIN, CORRECTED], ids=["plain", "corrected"])
def test_replayed_and_killed_runs_give_the_same_bytes(
    scheme: QuantScheme, zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def quantize(out: str, **options: object) -> None:
        lightgptq.quantize(zoo_folder(NAME), tmp_path / out, scheme, calibration=windows_for(NAME), **options)  # type: ignore[arg-type]

    def kill_at(block: int) -> Callable[[Progress], None]:
        def listen(step: Progress) -> None:
            if step.block == block and step.record is not None:
                raise Killed

        return listen

    quantize("whole")
    quantize("replayed", max_memory=1)
    for block in range(1, 5):
        with pytest.raises(Killed):
            quantize("killed", listener=kill_at(block))
    quantize("killed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "replayed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_training_end_to_end_is_refused_before_anything_is_done(
    zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks share.*give --distill 0"):
        lightgptq.quantize(
            zoo_folder(NAME), tmp_path / "out", PLAIN, calibration=windows_for(NAME), distill=5
        )
    assert not list(tmp_path.iterdir())


def call(block: int) -> BlockInput:
    return BlockInput((torch.zeros(1, 2, 4),), {"shared": {}, "other": 1}).guarded(f"blocks.{block}")


def test_states_go_from_block_to_block_and_are_written_only_when_they_change(tmp_path: Path) -> None:
    left = LeftStates(tmp_path, "quantized", torch.device("cpu"))
    values = (torch.arange(3.0), torch.ones(2, 2).t())
    first = call(0)
    left.give(0, first)
    first.kwargs["shared"]["full"] = values
    left.take(0, 0)
    left.end(0)
    for block in (1, 2):
        entered = call(block)
        left.give(0, entered)
        for got, value in zip(entered.kwargs["shared"]["full"], values, strict=True):
            assert torch.equal(got, value)
        left.take(0, block)
        left.end(block)
    assert (tmp_path / "quantized.0-0.left").samefile(tmp_path / "quantized.0-2.left")
    entered = call(3)
    left.give(0, entered)
    entered.kwargs["shared"]["full"] = (torch.zeros(3), values[1])
    left.take(0, 3)
    assert not (tmp_path / "quantized.0-0.left").samefile(tmp_path / "quantized.0-3.left")


def test_what_nobody_left_is_an_error_that_says_who_wants_it() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.3 wants 'full' of shared"):
        call(3).kwargs["shared"]["full"]
