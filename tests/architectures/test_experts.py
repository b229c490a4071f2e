"""Mixture of experts: every expert from the tokens routed to it, under the names of per-expert checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.architectures.plain import dequantized_tensors, fuse_experts
from tests.architectures.zoo import MIXTURES, MORE
from tests.folders import contents
from torch import Tensor, nn

import lightgptq
from lightgptq import QuantLinear, QuantScheme
from lightgptq.errors import CheckpointError, QuantizationError, UsageError
from lightgptq.layouts import expand_experts
from lightgptq.loading.registration import register, unregister
from lightgptq.quantization import job, run
from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.passes import GroupInputs
from lightgptq.quantization.progress import Progress
from lightgptq.quantization.solve import GroupSolver

SCHEME = QuantScheme(bits=4, group_size=32)
WRITTEN = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3-moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek-v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "gpt-oss": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}

LONELY = {"deepseek-v3": (0, 1)}  # it chooses a pair of neighbours first


@pytest.fixture
def lonely(zoo_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model in which no token ever goes to some experts: the first feature is always large, and the routers
    hold it against them."""

    def folder(name: str) -> Path:
        model = transformers.AutoModelForCausalLM.from_pretrained(zoo_folder(name), dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 20
            for path, parameter in model.named_parameters():
                if path.endswith(("gate.weight", "router.weight")) and parameter.ndim == 2:
                    for expert in LONELY.get(name, (1,)):
                        parameter[expert] = torch.eye(parameter.shape[1])[0] * -20
        model.save_pretrained(tmp_path / "lonely")
        return tmp_path / "lonely"

    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_are_named_as_in_per_expert_checkpoints_and_the_router_stays(
    name: str, zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    lightgptq.quantize(zoo_folder(name), tmp_path / "out", SCHEME, calibration=windows)
    stored, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(_weights(zoo_folder(name))),
    )
    path, leaves = WRITTEN[name]
    for expert in range(4):
        for leaf in leaves:
            assert f"model.layers.1.{path}.{expert}.{leaf}.qweight" in stored
    assert not any("gate_up_proj" in tensor or tensor.endswith("experts.down_proj") for tensor in stored)
    routers = [n for n in original if n.endswith(("gate.weight", "router.weight"))]
    assert routers
    for router in routers:
        assert torch.equal(stored[router], original[router])


@pytest.mark.parametrize("name", MIXTURES)
def test_each_hessian_is_that_of_the_tokens_routed_to_the_expert(
    name: str,
    zoo_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The original's experts are watched: with everything else skipped, the first block with experts gets the same
    input. Hessians are float32 sums of at most 512 products, so a relative 1e-4 of the largest entry is ample."""
    hessians: dict[str, Tensor] = {}
    original = GroupSolver.solve

    def watch(self: GroupSolver, linears: dict[str, nn.Linear], inputs: GroupInputs) -> None:
        assert inputs.hessian is not None
        hessians.update(dict.fromkeys(linears, inputs.hessian.finish().clone()))
        original(self, linears, inputs)

    monkeypatch.setattr(GroupSolver, "solve", watch)
    rules = (r".*(self_attn|shared_experts|mlp\.(gate|up|down)_proj).*=skip",)
    report = lightgptq.quantize(zoo_folder(name), tmp_path / "out", SCHEME, calibration=windows, rules=rules)
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo_folder(name), dtype=torch.float32)
    path, experts = next((n, m) for n, m in model.named_modules() if n.endswith("mlp.experts"))
    seen: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in windows.batches(job.BATCH_TOKENS):
            model(input_ids=batch)
    leaf = WRITTEN[name][1][0] if name == "mixtral" else "gate_proj"
    tokens = {m.name: m.tokens for m in report.modules}
    for expert in range(4):
        rows = torch.cat([x.reshape(-1, x.shape[-1])[(index == expert).any(dim=-1)] for x, index in seen])
        H = rows.double().t() @ rows.double()
        got = hessians[f"{path}.{expert}.{leaf}"]
        assert tokens[f"{path}.{expert}.{leaf}"] == len(rows)
        assert float((got - H).abs().max()) <= 1e-4 * float(H.abs().max())


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_without_tokens_is_reported_and_all_experts_get_all_tokens_on_request(
    name: str, lonely: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    folder = lonely(name)
    report = lightgptq.quantize(folder, tmp_path / "out", SCHEME, calibration=windows)
    problems = {m.name: str(m.problem) for m in report.problems if m.tokens == 0}
    lonely_ones = {
        m.name for m in report.modules for e in LONELY.get(name, (1,)) if f".experts.{e}." in m.name
    }
    assert lonely_ones
    assert lonely_ones <= problems.keys()
    for record in report.problems:
        if record.tokens == 0:
            assert record.method == "rtn"
            assert "no calibration token reached it; give more samples or --moe-all-experts" in str(
                record.problem
            )
    lightgptq.load(tmp_path / "out", dtype="float32")(input_ids=windows.input_ids[:1])
    with pytest.raises(QuantizationError, match="calibration token"):
        lightgptq.quantize(folder, tmp_path / "strict", SCHEME, calibration=windows, strict=True)
    full = lightgptq.quantize(folder, tmp_path / "all", SCHEME, calibration=windows, moe_all_experts=True)
    assert not full.problems
    assert {m.tokens for m in full.modules} == {windows.input_ids.numel()}


@pytest.mark.parametrize("name", ["qwen2-moe", "llama4"])
def test_linears_that_choose_are_not_quantized(name: str) -> None:
    """A shared expert's gate is a linear of one output; Llama 4's router is one with a forward of its own."""
    model = MORE[name]()
    expand_experts(model, [])
    for block in find_blocks(model):
        linears = block.linears()
        assert any(".shared_expert." in leaf for leaf in linears)
        assert not [leaf for leaf in linears if leaf.endswith(("_gate", ".router"))]


def test_all_experts_is_refused_where_there_are_none(
    zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--moe-all-experts: LlamaForCausalLM has no experts"):
        lightgptq.quantize(
            zoo_folder("llama"), tmp_path / "out", SCHEME, calibration=windows, moe_all_experts=True
        )


@pytest.mark.parametrize(
    ("name", "mismatch", "everywhere"),
    [("qwen3-moe", 0.0, False), ("gpt-oss", 1.0, False), ("mixtral", 1.0, True), ("deepseek-v3", 1.0, False)],
)
def test_replaying_and_waiting_give_the_same_bytes(
    name: str,
    mismatch: float,
    everywhere: bool,
    lonely: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of two windows: not every batch reaches every expert, and one expert is reached by none."""
    monkeypatch.setattr(job, "BATCH_TOKENS", 64)
    folder, scheme = lonely(name), SCHEME.with_overrides({"mismatch": mismatch})
    for out, memory in (("waiting", None), ("replayed", 1)):
        lightgptq.quantize(
            folder,
            tmp_path / out,
            scheme,
            calibration=windows,
            max_memory=memory,
            moe_all_experts=everywhere,
        )
    assert contents(tmp_path / "waiting") == contents(tmp_path / "replayed")


def test_replaying_gathers_all_experts_in_one_pass(
    zoo_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The router lies behind attention. Batches come by once to discover the groups, and in each of 2 blocks for all
    gates and ups, for all downs and for the block's output."""
    router = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter
    calls, forward, always = [], router.forward, run.BlockPass.run

    def counted(self: nn.Module, *args: Tensor) -> object:
        if args[0].device.type != "meta":  # not what is found without data before the run
            calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(router, "forward", counted)
    monkeypatch.setattr(run.BlockPass, "run", lambda self, *, waiting: always(self, waiting=0))
    lightgptq.quantize(zoo_folder("qwen3-moe"), tmp_path / "out", SCHEME, calibration=windows)
    assert len(calls) == 1 + 2 * 3


def test_a_killed_run_goes_on_to_the_same_bytes(
    zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(step: Progress) -> None:
        if step.block == 1 and step.record is not None and ".experts.2." in step.record.name:
            raise Killed

    with pytest.raises(Killed):
        lightgptq.quantize(
            zoo_folder("mixtral"), tmp_path / "out", SCHEME, calibration=windows, listener=kill
        )
    for out in ("out", "whole"):
        lightgptq.quantize(zoo_folder("mixtral"), tmp_path / out, SCHEME, calibration=windows)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_some_experts_of_a_fused_tensor_may_stay_unquantized(
    zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    rules = (r".*experts\.[02]\..*=skip", r".*layers\.1\..*down_proj=skip")
    report = lightgptq.quantize(
        zoo_folder("gpt-oss"), tmp_path / "out", SCHEME, calibration=windows, rules=rules
    )
    assert not any(".experts.2." in m.name for m in report.modules)
    loaded = lightgptq.load(tmp_path / "out", dtype="float32")
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts.1.up_proj"), QuantLinear)
    assert type(loaded.get_submodule("model.layers.0.mlp.experts.2.up_proj")) is nn.Linear
    plain = dequantized_tensors(load_file(tmp_path / "out" / "model.safetensors"), SCHEME)
    fuse_experts(plain, load_file(_weights(zoo_folder("gpt-oss"))))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_bytes((zoo_folder("gpt-oss") / "config.json").read_bytes())
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        want, have = (m(input_ids=windows.input_ids[:2]).logits for m in (model, loaded))
    assert float((want - have).abs().max()) <= 8e-5 * float(want.abs().max())


@pytest.fixture
def registered() -> Iterator[None]:
    """Transformers loads GPTQ checkpoints with our layers while a test runs."""
    register()
    yield
    unregister()


def test_unquantized_experts_that_transformers_would_lose_are_an_error(
    zoo_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path, registered: None
) -> None:
    rules = (r".*experts\.2\..*=skip",)
    lightgptq.quantize(zoo_folder("mixtral"), tmp_path / "out", SCHEME, calibration=windows, rules=rules)
    assert not lightgptq.load(tmp_path / "out").training
    with pytest.raises(CheckpointError, match=r"w1.weight is an unquantized expert .* lightgptq.load"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"
