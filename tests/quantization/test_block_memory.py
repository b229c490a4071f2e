"""A run knows beforehand what it will hold: what solving takes, what waits in a block, and what that makes together."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from bench.planned import SHAPES, planned
from tests.models import llama
from tests.oracles import correlated_problem

from lightgptq import QuantScheme, native
from lightgptq.core import grid as grids
from lightgptq.core import refine_torch
from lightgptq.core.grid import fit_grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.mismatch import Correction
from lightgptq.core.rtn import rtn
from lightgptq.core.solver import gptq_stacked
from lightgptq.core.tune import TuneOptions, tune_block
from lightgptq.quantization.block_memory import BlockLinears, BlockNeeds, tuning_bytes, workspace_bytes
from lightgptq.quantization.blocks import BlockInput, find_blocks
from lightgptq.quantization.groups import LinearGroup, probe_block
from lightgptq.quantization.live_bytes import LiveBytes
from lightgptq.quantization.passes import BlockPass, Lane
from lightgptq.quantization.together import Stacked, solve_together

FAST = QuantScheme()
BALANCED = QuantScheme(mismatch=1.0, refine=2)
PARTLY = BALANCED.with_overrides({"mismatch_every": 4})


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is done by operations that can be watched, in the pieces of a GPU."""
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(grids, "SEARCH_VALUES", grids.GPU_SEARCH_VALUES)
    monkeypatch.setattr(grids, "PANEL_VALUES", 1 << 12)
    monkeypatch.setattr(refine_torch, "STRIP_ROWS", 1 << 30)


@pytest.mark.parametrize("scheme", [FAST, BALANCED, PARTLY], ids=["fast", "balanced", "partly"])
@pytest.mark.parametrize(
    ("width", "outputs"), [(512, (96,)), (384, (1600,)), (384, (800, 800)), (256, (2400, 300, 300))], ids=str
)
@pytest.mark.usefixtures("in_torch")
def test_solving_takes_no_more_than_its_workspace(
    width: int, outputs: tuple[int, ...], scheme: QuantScheme
) -> None:
    """And more than 2/3 of it. What is small beside a large weight is left out: errors of 128 columns, and 64 KiB."""
    W, H = correlated_problem(sum(outputs), width, seed=0)
    linears, M = W.bfloat16().split(outputs), 0.01 * H
    with torch.no_grad(), LiveBytes([W, M, *linears]) as live:
        given = H.clone()  # counted: the Hessian is part of the workspace
        mismatch = M.clone() if scheme.mismatch else None
        followed = H.clone() if scheme.mismatch_every > 1 else None
        factor = HessianFactor.build(given, scheme)
        weights = [linear.float() for linear in linears]
        if mismatch is not None:
            correction = Correction(mismatch, factor, len(W), followed)
            weights = [correction.target(w) for w in weights]
        grid = fit_grid(torch.cat(weights) if len(weights) > 1 else weights[0], scheme, factor.importance())
        solved = gptq_stacked(weights, factor, scheme, H=given if scheme.refine else None, grid=grid)
        for linear, q in zip(linears, solved, strict=True):
            linear.copy_(q.dequantize(linear.dtype))
    room = workspace_bytes(width, W.numel(), [scheme])
    assert live.peak <= room + 4 * 128 * len(W) + (1 << 16), f"{live.peak / room:.3f} of the workspace"
    assert live.peak >= 0.66 * room, f"{live.peak / room:.3f} of the workspace"


@pytest.mark.usefixtures("in_torch")
def test_a_batch_takes_no_more_than_as_many_workspaces() -> None:
    experts = [correlated_problem(400, 256, seed=s) for s in range(5)]
    with torch.no_grad(), LiveBytes([t for pair in experts for t in pair]) as live:
        solve_together([Stacked(W.clone(), (300, 100), H.clone(), None, FAST) for W, H in experts])
    room = 5 * workspace_bytes(256, 400 * 256, [FAST])
    assert 0.66 * room <= live.peak <= room + 5 * 4 * 128 * 400 + (1 << 16), (
        f"{live.peak / room:.3f} of the workspaces"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("windows", [1, 16])
def test_training_a_block_takes_no_more_than_is_planned(dtype: torch.dtype, windows: int) -> None:
    """And more than 2/3 of it, with few tokens and with many."""
    hidden, length = 128, 64
    model = llama(1, hidden_size=hidden, intermediate_size=3 * hidden).to(dtype)
    block = find_blocks(model)[0]
    linears, states = block.linears(), torch.randn(windows, length, hidden, dtype=dtype)
    angles = model.model.rotary_emb(states, torch.arange(length)[None])
    batch = ((states,), {"position_embeddings": angles, "attention_mask": None}, states.clone())
    with LiveBytes([*model.parameters(), states, *angles, batch[2]]) as live:
        originals = {name: linear.weight.detach().float() for name, linear in linears.items()}
        solved = {name: rtn(W, QuantScheme(bits=2, group_size=32)) for name, W in originals.items()}
        tune_block(block.module, [batch], solved, TuneOptions(steps=2), originals=originals)
    room = tuning_bytes(linears.values(), windows * length)
    assert 0.66 * room <= live.peak <= room, f"{live.peak / room:.3f} of the room"


def test_a_block_that_is_trained_plans_for_it() -> None:
    shape = replace(SHAPES["tiny"], hidden=128, intermediate=256)
    plain, tuned = (
        planned(shape, 16, 2048, 1 << 40, replace(BALANCED, tune=tune))[0].fixed for tune in (0, 40)
    )
    assert tuned > plain


def test_what_waits_in_a_block_are_its_activations_without_its_weights() -> None:
    """At a Llama's last linear: what entered, what is added to the output, the norm's output and the linear's input,
    and the angles, which were there before."""
    hidden, inner, windows, length = 64, 96, 2, 24
    model = llama(1, hidden_size=hidden, intermediate_size=inner)
    block = find_blocks(model)[0]
    angles = torch.randn(1, length, hidden // 4), torch.randn(1, length, hidden // 4)

    def enter() -> BlockInput:
        states = torch.randn(windows, length, hidden)
        return BlockInput((states,), {"position_embeddings": angles, "attention_mask": None})

    probe = probe_block(block.module, block.linears(), enter)
    last = next(g for g in probe.groups if g.names == ("mlp.down_proj",))
    assert last.live_bytes == 4 * windows * length * (3 * hidden + inner) + 2 * angles[0].nbytes
    assert last.live_bytes < probe.peak_bytes < 2 * last.live_bytes
    assert probe.entering_bytes == 4 * windows * length * hidden


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_batches_that_wait_hold_what_is_planned(every: int, sparing: bool) -> None:
    """And little less. What goes ahead through the original is through before all batches are at the last linear."""
    hidden, inner, windows, length, batches = 64, 256, 4, 128, 8
    block = find_blocks(llama(1, hidden_size=hidden, intermediate_size=inner))[0]
    twin = copy.deepcopy(block.module)
    angles = torch.randn(1, length, hidden // 4), torch.randn(1, length, hidden // 4)

    def enter(index: int = 0) -> BlockInput:
        states = torch.randn(windows, length, hidden, generator=torch.Generator().manual_seed(index))
        return BlockInput((states,), {"position_embeddings": angles, "attention_mask": None})

    linears = block.linears()
    lanes = [
        Lane(module, {n: module.get_submodule(n) for n in linears}, enter, lambda index, output: None)  # type: ignore[misc]
        for module in (block.module, twin)
    ]
    probe = probe_block(block.module, linears, enter)
    chosen = BlockLinears(linears, dict.fromkeys(linears, PARTLY), alone=True)
    needs = BlockNeeds.of(
        block.module, chosen, probe, batches=batches, every=every, together={}, on_gpu=False, sparing=sparing
    )
    run = BlockPass(
        lanes[0],
        probe.groups,
        batches=batches,
        solve=lambda groups: None,
        original=lanes[1],
        every=every,
        ahead=sparing,
    )
    parameters = [*block.module.parameters(), *twin.parameters(), *angles]
    with torch.no_grad(), LiveBytes(parameters) as live:
        run.run(waiting=batches)
    sums = 3 * 4 * inner**2  # H of the tokens in M and of the others, and M
    waiting = needs.waiting_bytes(batches)
    assert 0.95 * waiting <= live.peak <= waiting + needs.one_batch + sums, f"{live.peak / waiting:.3f}"


# At two groups; the original goes along with 3 of 10 batches.
NEEDS = BlockNeeds(fixed=100, waiting=(30, 80), one_batch=50, outputs=80, batches=10, every=4)


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("free", [0, 150, 160, 310, 330, 500, 960, 1200, 10_000])
@pytest.mark.parametrize("kept", [0, 60])
def test_activations_take_what_is_left_and_no_more(free: int, kept: int, sparing: bool) -> None:
    memory = replace(NEEDS, sparing=sparing).share(free, held=kept, kept=kept)
    room = free - free // 50
    twins = [-(-n // 4) for n in range(11)]
    # at the second group the twins have gone; while the first is gathered they arrive at it
    waiting = [max(30 * n + 80 * t, 80 * n) if sparing else 80 * (n + t) for n, t in enumerate(twins)]
    assert (memory.waiting == 10) == (100 + waiting[10] - kept + 50 <= room)
    if memory.waiting < 10:
        fitting = [n for n in range(1, 10) if 100 + waiting[n] + 50 <= room]
        assert memory.waiting == (max(fitting, default=0) if sparing else 0)
    assert memory.least == kept + 150
    assert memory.peak <= max(kept + room, memory.least)
    assert 0 <= memory.between <= 80
    inside = 50 + waiting[memory.waiting] - (kept if memory.waiting == 10 else 0)
    assert memory.hessians + inside + 100 <= max(room, 150)


def test_a_run_that_has_room_for_everything_plans_for_all_of_it() -> None:
    assert NEEDS.share(10_000, held=7).peak == 7 + 100 + 1040 + 50 + 80


def test_a_limit_that_cannot_be_kept_is_said() -> None:
    memory = BlockNeeds(fixed=3 << 30, waiting=(0,), one_batch=1 << 30, outputs=0, batches=1).share(
        2 << 30, held=1 << 30
    )
    assert memory.shortage(None) is None
    assert memory.shortage(5 << 30) is None
    assert "takes 5.0 GiB at least, --max-memory allows 4.9" in str(memory.shortage((5 << 30) - (100 << 20)))


@pytest.mark.parametrize("name", ["8b", "70b"])
def test_large_models_stay_below_their_goals(name: str) -> None:
    """128 x 2048 tokens through a block like Llama-3.1-8B's in less than 8 GB, through one of the 70B in 24."""
    shape = SHAPES[name]
    assert shape.goal == {"8b": 8e9, "70b": 24e9}[name]
    _, memory = planned(shape, 128, 2048, shape.goal, QuantScheme())
    assert memory.waiting == 0
    assert memory.least < memory.peak < shape.goal
    needs, roomy = planned(shape, 128, 2048, 2 * 10**11, QuantScheme())
    assert roomy.waiting == needs.batches
    assert roomy.peak > shape.goal, "the limit changes nothing"


def test_batches_that_the_original_does_not_follow_wait_once() -> None:
    plain, quarter, all_of_them = (
        planned(SHAPES["tiny"], 64, 2048, 1 << 40, QuantScheme(mismatch=mismatch, mismatch_every=every))[0]
        for mismatch, every in ((0.0, 1), (1.0, 4), (1.0, 1))
    )
    waiting = [needs.waiting_bytes(64) for needs in (plain, quarter, all_of_them)]
    assert waiting == [n * max(plain.waiting) for n in (64, 80, 128)]
    assert quarter.outputs == plain.outputs * 5 // 4
    assert quarter.one_batch == all_of_them.one_batch == 2 * plain.one_batch


def test_only_small_experts_are_solved_together() -> None:
    linears = {
        f"moe.experts.{e}.{leaf}": torch.nn.Linear(*sizes, device="meta")
        for e in range(4)
        for leaf, sizes in {"up": (64, 32), "down": (32, 64)}.items()
    } | {"o": torch.nn.Linear(64, 64, device="meta")}
    chosen = BlockLinears(linears, dict.fromkeys(linears, FAST), alone=False)
    up, down = (workspace_bytes(n, 64 * 32, [FAST]) for n in (64, 32))
    groups = [LinearGroup((name,)) for name in linears]
    lists = {"moe.experts."}
    assert chosen.small_experts(lists, 2 * down - 1) == set()
    assert chosen.small_experts(lists, 2 * down) == lists
    assert chosen.small_experts(lists, 0) == set()
    together = chosen.together(groups, lists, 3 * up)
    assert {g.names[0]: n for g, n in together.items()} == {
        name: 3 * up // (up if name.endswith("up") else down) for name in linears if name != "o"
    }
    assert chosen.together(groups, set(), 3 * up) == {}
    alone = replace(chosen, alone=True)
    assert alone.workspace(["moe.experts.0.up", "o"]) == workspace_bytes(64, 64 * 64, [FAST])
