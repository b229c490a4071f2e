"""The original model goes along: what it sees is the original's, and nothing else of the run changes for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.folders import contents
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lightgptq
from lightgptq import QuantScheme
from lightgptq.core.mismatch import MismatchAccumulator
from lightgptq.quantization import job
from lightgptq.quantization.block_memory import BlockNeeds
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.solve import GroupSolver

BATCHES = 4
PLAIN = QuantScheme(bits=3, group_size=32)
CORRECTED = QuantScheme(bits=3, group_size=32, mismatch=1.0, refine=2)
EVERY_THIRD = CORRECTED.with_overrides({"mismatch_every": 3})  # batches 0 and 3 of 4


@pytest.fixture(autouse=True)
def _small_batches(windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", windows.input_ids.numel() // BATCHES)


@pytest.mark.parametrize("scheme", [CORRECTED, EVERY_THIRD])
def test_replaying_both_models_gives_the_same_bytes_as_waiting(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path, scheme: QuantScheme
) -> None:
    lightgptq.quantize(model_folder("llama"), tmp_path / "waiting", scheme, calibration=windows)
    lightgptq.quantize(
        model_folder("llama"), tmp_path / "replayed", scheme, calibration=windows, max_memory=1
    )
    assert contents(tmp_path / "waiting") == contents(tmp_path / "replayed")


@pytest.mark.parametrize("waiting", [1, 3])
@pytest.mark.parametrize("scheme", [PLAIN, EVERY_THIRD])
def test_some_batches_may_wait_while_others_are_replayed(
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: QuantScheme,
    waiting: int,
) -> None:
    lightgptq.quantize(model_folder("llama"), tmp_path / "waiting", scheme, calibration=windows)
    share, forward = BlockNeeds.share, LlamaDecoderLayer.forward
    forwards: Counter[str] = Counter()

    def count(self: LlamaDecoderLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        forwards["blocks"] += x.device.type != "meta"  # not what runs without data
        return forward(self, x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", count)
    monkeypatch.setattr(
        BlockNeeds, "share", lambda self, free, **k: replace(share(self, free, **k), waiting=waiting)
    )
    lightgptq.quantize(model_folder("llama"), tmp_path / "mixed", scheme, calibration=windows)
    assert contents(tmp_path / "waiting") == contents(tmp_path / "mixed")
    lanes = [*range(BATCHES), *([0, 3] if scheme is EVERY_THIRD else [])]
    once, replayed = sum(i < waiting for i in lanes), sum(i >= waiting for i in lanes)
    # replayed for each of four groups and for the output, in two blocks that share a probe
    assert forwards["blocks"] == 1 + 2 * (once + (4 + 1) * replayed)


@pytest.mark.parametrize("scheme", [CORRECTED, EVERY_THIRD])
def test_a_run_that_stopped_goes_on_with_both_models(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path, scheme: QuantScheme
) -> None:
    def stop_in_second_block(step: Progress) -> None:
        if step.stage == "solve" and step.block == 1:
            raise KeyboardInterrupt

    lightgptq.quantize(model_folder("opt"), tmp_path / "whole", scheme, calibration=windows)
    with pytest.raises(KeyboardInterrupt):
        lightgptq.quantize(
            model_folder("opt"),
            tmp_path / "cut",
            scheme,
            calibration=windows,
            listener=stop_in_second_block,
        )
    assert {p.suffix for p in (tmp_path / "cut.partial").iterdir()} >= {".activations", ".pattern"}
    lightgptq.quantize(model_folder("opt"), tmp_path / "cut", scheme, calibration=windows)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_first_linears_see_no_mismatch(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    unrefined = QuantScheme(bits=3, group_size=32, mismatch=1.0)
    lightgptq.quantize(model_folder("llama"), tmp_path / "plain", PLAIN, calibration=windows)
    lightgptq.quantize(model_folder("llama"), tmp_path / "corrected", unrefined, calibration=windows)
    with (
        safe_open(tmp_path / "plain" / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "corrected" / "model.safetensors", "pt") as b,
    ):
        first, later = "model.layers.0.self_attn.q_proj.qweight", "model.layers.1.mlp.down_proj.qweight"
        assert torch.equal(a.get_tensor(first), b.get_tensor(first))
        assert not torch.equal(a.get_tensor(later), b.get_tensor(later))


@pytest.mark.parametrize(("scheme", "followed"), [(CORRECTED, [0, 1, 2, 3]), (EVERY_THIRD, [0, 3])])
def test_the_mismatch_is_that_of_the_two_whole_models(
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: QuantScheme,
    followed: list[int],
) -> None:
    """M, and H of its tokens, at the first group of the last block, against hooks on the original and the finished
    checkpoint in memory."""
    name = "model.layers.1.self_attn.q_proj"
    seen: dict[str, torch.Tensor] = {}
    solve = GroupSolver.solve

    def watch(self: GroupSolver, linears: dict, inputs: object) -> None:
        if name in linears:
            seen["M"] = inputs.mismatch.finish().clone()  # type: ignore[attr-defined]
            seen["H"] = (inputs.followed or inputs.hessian).H.clone()  # type: ignore[attr-defined]
            seen["tokens"] = torch.tensor(inputs.hessian.tokens)  # type: ignore[attr-defined]
        solve(self, linears, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupSolver, "solve", watch)
    lightgptq.quantize(model_folder("llama"), tmp_path / "out", scheme, calibration=windows, dtype="float32")
    entered = []
    for model in (
        AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32),
        lightgptq.load(tmp_path / "out", dtype="float32"),
    ):
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.cat([windows.input_ids.chunk(BATCHES)[i] for i in followed]))
        hook.remove()
    expected = MismatchAccumulator(entered[0].shape[-1])
    expected.add(*entered)
    scale = float(expected.M.abs().max())
    # Float32 sums over a few hundred tokens, and quantized products that round in another order: 1e-3 of the largest.
    assert float((seen["M"] - expected.M).abs().max()) < 1e-3 * scale
    H = entered[1].flatten(0, 1).t() @ entered[1].flatten(0, 1)
    assert float((seen["H"].triu() - H.triu()).abs().max()) < 1e-3 * float(H.abs().max())
    assert int(seen["tokens"]) == windows.input_ids.numel()
