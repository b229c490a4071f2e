"""Models of many architectures are quantized, saved, loaded and run alike; nothing in the package knows their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.architectures.plain import write_plain
from tests.architectures.zoo import (
    BUILDERS,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    MORE,
    STACKS,
    TOWERS,
    VOCABULARY,
    windows_for,
)
from tests.folders import contents
from torch import Tensor, nn

import lightgptq
from lightgptq import QuantLinear, QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.rtn import rtn
from lightgptq.errors import CalibrationError
from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.flow import CalibrationFlow
from lightgptq.quantization.inputs import forward_arguments
from lightgptq.quantization.passes import GroupInputs
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.solve import GroupSolver
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.skeleton import ModelSkeleton, build_empty_model

EIGHT = QuantScheme(bits=8, group_size=32)
FOUR = QuantScheme(bits=4, group_size=32)
ALL = [*BUILDERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("name", ALL)
def test_at_8_bits_the_logits_stay_close(
    name: str, zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A group of 32 normal weights reaches 2.1 standard deviations s, so a step is 4.2 s / 255 and rounding adds noise
    of 4.2 / 255 / sqrt(12) = 0.5 % to what each linear puts out. At most 12 linears lie behind one another: 1.7 % when
    they add up like noise. Attention and norms may double that; 4 bits would give 16 times as much. The median token
    counts: where two experts are worth nearly the same, another one may be chosen.
    """
    windows = windows_for(name)
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", EIGHT, calibration=windows)
    assert not report.problems
    original = lightgptq.load(zoo_folder(name), dtype="float32")
    assert type(original) is type(_by_transformers(zoo_folder(name)))
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    assert {m.name for m in report.modules} == {
        n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)
    }
    want, have = (_logits(model, windows) for model in (original, loaded))
    error = ((want - have).norm(dim=-1) / want.norm(dim=-1)).median()
    assert error < 0.035, f"the median token's logits differ by {error:.3f} of their size"


@pytest.mark.parametrize("name", BUILDERS)
def test_4_bits_beat_rounding_and_load_again_bit_for_bit(
    name: str,
    zoo_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every linear's loss is below that of rounding the same weight on the same Hessian. What the folder holds is what
    is loaded, and Transformers' own model with the stored values computes the same: float32 strays 2e-6 of the largest
    logit, the quantized product 3e-5 (see tests/quantization/test_loading.py); a wrong zero moves a tenth and more.
    """
    losses, windows = _compare_with_rounding(monkeypatch), windows_for(name)
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", FOUR, calibration=windows)
    assert losses.keys() == {m.name for m in report.modules}
    worse = {n: pair for n, pair in losses.items() if not pair[0] < pair[1]}
    assert not worse, worse
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    layers = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        mine = sorted(layer.packed().tensors()[leaf].numpy().tobytes() for layer in layers)
        assert mine == sorted(v.numpy().tobytes() for n, v in stored.items() if n.endswith(f".{leaf}"))
    plain = write_plain(zoo_folder(name), tmp_path / "out", tmp_path / "plain", FOUR, name)
    want, have = (_logits(model, windows) for model in (_by_transformers(plain), loaded))
    largest = float((want - have).abs().max())
    assert largest <= 8e-5 * float(want.abs().max()), f"logits differ by {largest}"


def _compare_with_rounding(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Fills a table with (loss, loss of rounding to nearest) of each linear that is solved."""
    losses: dict[str, tuple[float, float]] = {}
    original = GroupSolver.solve

    def both(self: GroupSolver, linears: dict[str, nn.Linear], inputs: GroupInputs) -> None:
        weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        original(self, linears, inputs)
        assert inputs.hessian is not None
        H, records = inputs.hessian.finish(), {record.name: record for record in self.records}
        for name, W in weights.items():
            loss = records[name].loss
            assert loss is not None
            losses[name] = (loss * records[name].tokens, rtn(W, FOUR, H).loss)

    monkeypatch.setattr(GroupSolver, "solve", both)
    return losses


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_walking_from_block_to_block_is_the_models_own_forward(
    name: str, zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three batches, the last one smaller, go through the unquantized blocks one block at a time: the same operations
    on the same values, so the outcome is the same to the bit. Nothing else of a model is known to the main job."""
    skeleton = ModelSkeleton.open(CheckpointReader.open(zoo_folder(name)), dtype=torch.float32)
    skeleton.materialise(skeleton.model, "")
    model, windows, blocks = skeleton.model, windows_for(name), find_blocks(skeleton.model)
    batches, extras = list(windows.input_ids.split(6)), [{} for _ in range(3)]
    if windows.extra:
        extras = [{n: value.split(6)[i] for n, value in windows.extra.items()} for i in range(3)]
    flow = CalibrationFlow(skeleton, blocks, batches, extras=extras)
    flow.begin(WorkFolder(tmp_path), -1)
    for block in blocks:
        with flow.through(block) as (inputs, output):
            for i in range(3):
                entered = inputs(i)
                output(i, block.module(*entered.args, **entered.kwargs))
    for i, (ids, extra) in enumerate(zip(batches, extras, strict=True)):
        hidden = flow._hidden(i, False)
        assert hidden is not None
        have = flow.walk.leave(flow.call(i), hidden, flow._ended(i))[0]
        assert torch.equal(have, model(**forward_arguments(model, ids, extra))[0])
    flow.close()


def test_both_stacks_are_quantized_the_encoder_first(
    zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in STACKS:
        report = lightgptq.quantize(zoo_folder(name), tmp_path / name, FOUR, calibration=windows_for(name))
        kinds = ["encoder." in m.name for m in report.modules]
        assert kinds == sorted(kinds, reverse=True)
        assert 0 < sum(kinds) < len(kinds)


def test_a_killed_run_goes_on_in_the_second_stack(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill_at(block: int) -> Callable[[Progress], None]:
        def listen(step: Progress) -> None:
            if step.block == block and step.record is not None:
                raise Killed

        return listen

    for block in (1, 2, 3):
        with pytest.raises(Killed):
            lightgptq.quantize(
                zoo_folder("t5"),
                tmp_path / "out",
                FOUR,
                calibration=windows_for("t5"),
                listener=kill_at(block),
            )
    for out in ("out", "whole"):
        lightgptq.quantize(zoo_folder("t5"), tmp_path / out, FOUR, calibration=windows_for("t5"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_a_text_cannot_give_is_asked_for(
    zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="takes input_features, which a text does not give"):
        lightgptq.quantize(zoo_folder("whisper"), tmp_path / "out", FOUR, calibration=windows)
    scheme = FOUR.with_overrides({"method": "rtn"})
    assert len(lightgptq.quantize(zoo_folder("whisper"), tmp_path / "out", scheme).modules) == 32


@pytest.mark.parametrize("name", TOWERS)
def test_the_vision_tower_stays_as_it_is(
    name: str, zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", FOUR, calibration=windows)
    assert all(".language_model.layers." in m.name for m in report.modules)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(zoo_folder(name) / "model.safetensors")
    vision = {n: tensor for n, tensor in original.items() if "visual." in n or "vision_tower." in n}
    assert len(vision) > 20
    assert all(torch.equal(stored[n], tensor) for n, tensor in vision.items())


def _by_transformers(folder: Path) -> transformers.PreTrainedModel:
    """By the class that the config names: a causal or masked language model, or a body without a head."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model: transformers.PreTrainedModel, windows: CalibrationSet) -> Tensor:
    """The first output for four windows: logits, or the last hidden states of a body without a head."""
    extra = {name: value[:4] for name, value in windows.extra.items()}
    return model(**forward_arguments(model, windows.input_ids[:4], extra))[0]


def test_what_a_model_allocates_itself_comes_from_the_checkpoint_too() -> None:
    """XLNet's attention holds ``torch.FloatTensor(...)``, which is memory as it was found, on no device but the CPU."""
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS, d_inner=INNER
    )
    model = build_empty_model(config, dtype=torch.float32)
    held = [name for name, value in model.named_parameters() if not value.is_meta]
    assert not held
    assert model.lm_loss.weight is model.transformer.word_embedding.weight
