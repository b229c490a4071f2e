"""A run that is killed at any moment goes on when started again, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from tests.folders import contents
from tests.models import VOCABULARY, llama, randomise, save
from tests.quantization.kills import Job, Outcome, kill_after, run_job, start_job, start_server, wait_for

from lightgptq import QuantScheme

LAYERS = 4
IDS = torch.randint(2, VOCABULARY, (9, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return start_server()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(randomise(llama(LAYERS)), tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module")
def uninterrupted(
    server: ForkServerContext, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """OUT of a run that nobody killed, with a quantized head and several shards."""
    out = tmp_path_factory.mktemp("whole") / "out"
    outcome = run_job(server, job_for(source, out))
    assert (outcome.exit_code, outcome.error) == (0, None)
    assert outcome.blocks == tuple(range(LAYERS + 1))
    assert not out.with_name("out.partial").exists()
    return out, outcome


@pytest.fixture(scope="module")
def whole(uninterrupted: tuple[Path, Outcome]) -> tuple[dict[str, str], int]:
    """Its files, and how many operations on files it took."""
    return contents(uninterrupted[0]), len(uninterrupted[1].operations)


@pytest.fixture(scope="module")
def half_done(
    server: ForkServerContext,
    source: Path,
    whole: tuple[dict[str, str], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The work folder of a run that was killed half-way."""
    out = tmp_path_factory.mktemp("half") / "out"
    assert run_job(server, job_for(source, out), kill_at=whole[1] // 2).exit_code == -9
    return out.with_name("out.partial")


def job_for(source: Path, out: Path, **changes: object) -> Job:
    options = {"lm_head": True, "max_shard_bytes": 60_000, **changes}
    return Job(source, out, IDS, options=options)


def assert_nothing_or_all(out: Path, expected: dict[str, str]) -> None:
    """OUT never exists half-written."""
    if out.exists():
        assert contents(out) == expected


def finish(server: ForkServerContext, job: Job, expected: dict[str, str]) -> Outcome:
    """Run to the end and compare every byte; nothing else may be left beside OUT."""
    outcome = run_job(server, job)
    assert (outcome.exit_code, outcome.error) == (0, None)
    assert contents(job.out) == expected
    assert not job.out.with_name("out.partial").exists()
    return outcome


def check_kill_at(
    server: ForkServerContext, source: Path, out: Path, whole: tuple[dict[str, str], int], point: int
) -> None:
    expected, _ = whole
    killed = run_job(server, job_for(source, out), kill_at=point)
    assert killed.exit_code == -9, f"operation {point} was never reached"
    assert_nothing_or_all(out, expected)
    finish(server, job_for(source, out), expected)


PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_before_some_operation_on_files_ends_with_the_same_bytes(
    part: int, server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """One random operation of each eighth of the run; ``test_every_operation`` tries all of them."""
    point = random.Random(part).randint(1 + part * whole[1] // PARTS, (part + 1) * whole[1] // PARTS)
    check_kill_at(server, source, tmp_path / "out", whole, point)


@pytest.mark.parametrize("before_the_end", [0, 1, 3, 7, 12])
def test_a_run_killed_while_publishing_ends_with_the_same_bytes(
    before_the_end: int,
    server: ForkServerContext,
    source: Path,
    whole: tuple[dict[str, str], int],
    tmp_path: Path,
) -> None:
    check_kill_at(server, source, tmp_path / "out", whole, whole[1] - before_the_end)


@pytest.mark.parametrize("which", range(3))
def test_a_run_killed_while_it_forgets_a_block_ends_with_the_same_bytes(
    which: int,
    server: ForkServerContext,
    source: Path,
    uninterrupted: tuple[Path, Outcome],
    whole: tuple[dict[str, str], int],
    tmp_path: Path,
) -> None:
    """Two files are removed for each block but the first; what they held must be in the journal by then."""
    operations = uninterrupted[1].operations
    second_block = [i for i, name in enumerate(operations) if name == "rename"][1]
    removals = [i for i, name in enumerate(operations, 1) if name == "unlink" and i > second_block]
    check_kill_at(server, source, tmp_path / "out", whole, removals[which])


@pytest.mark.slow
def test_every_operation(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    for point in range(1, whole[1] + 1):
        check_kill_at(server, source, tmp_path / str(point) / "out", whole, point)


def test_a_run_killed_again_and_again_goes_on_from_the_last_finished_block(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """Half-way and then once more: the second start must build on the first, the third on the second."""
    job = job_for(source, tmp_path / "out")
    for share in (2, 4):
        assert run_job(server, job, kill_at=whole[1] // share).exit_code == -9
    done = len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) - 1
    assert 2 <= done <= LAYERS
    last = finish(server, job, whole[0])
    assert last.blocks == tuple(range(done, LAYERS + 1))
    assert last.notes == (f"going on after block {done} of {LAYERS}",)


def test_kills_at_random_moments_lose_nothing(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """SIGKILL from outside, wherever the process happens to be, until it gets through."""
    job, random_delay = job_for(source, tmp_path / "out"), random.Random(0)
    interrupted = 0
    for attempt in range(40):
        if not kill_after(start_job(server, job), random_delay.uniform(0.02, 0.25) * (1 + attempt / 4)):
            break
        interrupted += 1
        assert_nothing_or_all(tmp_path / "out", whole[0])
    assert interrupted >= 1
    finish(server, job, whole[0])


def test_a_journal_line_cut_in_half_is_ignored(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    job = job_for(source, tmp_path / "out")
    run_job(server, job, kill_at=whole[1] // 2)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + b'{"block": 9, "modu')
    assert finish(server, job, whole[0]).blocks[0] == len(lines) - 1


class TestAnotherCommand:
    """A half-finished run is only ever gone on with by the same command on the same source."""

    @pytest.fixture
    def half(self, source: Path, half_done: Path, tmp_path: Path) -> Iterator[Job]:
        mine = Path(shutil.copytree(source, tmp_path / "source"))
        shutil.copytree(half_done, tmp_path / "out.partial")
        before = contents(tmp_path / "out.partial")
        yield job_for(mine, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert contents(tmp_path / "out.partial") == before, "a refused run changed the half-finished one"

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"scheme": QuantScheme(bits=3, group_size=32)}, "--bits was 4 and is now 3"),
            ({"scheme": QuantScheme(bits=4, group_size=64)}, "--group-size was 32 and is now 64"),
            ({"scheme": QuantScheme(group_size=32, sym=False)}, "--sym was True and is now False"),
            (
                {"scheme": QuantScheme(group_size=32, act_order=False)},
                "--act-order was True and is now False",
            ),
            (
                {"scheme": QuantScheme(group_size=32, static_groups=False)},
                "--static-groups was True and is now False",
            ),
            ({"scheme": QuantScheme(group_size=32, damp=0.05)}, "--damp was 0.01 and is now 0.05"),
            ({"input_ids": IDS.flip(0)}, "other tokens"),
            ({"input_ids": IDS[:6]}, "--samples was 9 and is now 6"),
            (
                {"options": {"lm_head": False, "max_shard_bytes": 60_000}},
                "--lm-head was True and is now False",
            ),
            ({"options": {"lm_head": True}}, "max_shard_bytes was 60000"),
            (
                {"options": {"lm_head": True, "max_shard_bytes": 60_000, "rules": ("lm_head=bits:8",)}},
                "--rule was [] and is now ['lm_head=bits:8']",
            ),
            (
                {"options": {"lm_head": True, "max_shard_bytes": 60_000, "checkpoint_format": "gptq_v2"}},
                '--format was "gptq" and is now "gptq_v2"',
            ),
            (
                {"options": {"lm_head": True, "max_shard_bytes": 60_000, "dtype": "bfloat16"}},
                '--dtype was "float32" and is now "bfloat16"',
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_refused_with_what_differs(
        self, changes: dict[str, object], says: str, server: ForkServerContext, half: Job
    ) -> None:
        outcome = run_job(server, replace(half, **changes))
        assert outcome.error is not None
        assert outcome.error.startswith("ResumeError: ")
        assert says in outcome.error
        assert "--restart" in outcome.error

    def test_a_touched_weight_file_is_refused(self, server: ForkServerContext, half: Job) -> None:
        os.utime(half.src / "model.safetensors", ns=(1, 1))
        outcome = run_job(server, half)
        assert "modification time of model.safetensors in the source was" in (outcome.error or "")

    def test_a_changed_config_is_refused(self, server: ForkServerContext, half: Job) -> None:
        path = half.src / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
        outcome = run_job(server, half)
        assert "config.json of the source has changed" in (outcome.error or "")


def test_another_command_with_restart_starts_over(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    other = replace(job_for(source, tmp_path / "out"), scheme=QuantScheme(bits=3, group_size=32))
    assert run_job(server, other, kill_at=whole[1] // 2).exit_code == -9
    job = job_for(source, tmp_path / "out", restart=True)
    assert finish(server, job, whole[0]).blocks == tuple(range(LAYERS + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


class TestFinished:
    """A finished OUT."""

    @pytest.fixture
    def out(self, uninterrupted: tuple[Path, Outcome], tmp_path: Path) -> Path:
        return Path(shutil.copytree(uninterrupted[0], tmp_path / "mine" / "out"))

    def test_is_left_alone_by_the_same_command(
        self, server: ForkServerContext, source: Path, out: Path
    ) -> None:
        before = {path: path.stat() for path in [out, *out.iterdir()]}
        outcome = run_job(server, job_for(source, out))
        assert outcome.error is None
        assert outcome.blocks == ()
        assert "already finished" in outcome.notes[0]
        assert {path: path.stat().st_mtime_ns for path in before} == {
            p: s.st_mtime_ns for p, s in before.items()
        }
        assert not out.with_name("out.partial").exists()

    def test_is_refused_by_another_command(self, server: ForkServerContext, source: Path, out: Path) -> None:
        before = contents(out)
        other = replace(job_for(source, out), scheme=QuantScheme(bits=8, group_size=32))
        outcome = run_job(server, other)
        assert "finished checkpoint of another command: --bits was 4 and is now 8" in (outcome.error or "")
        assert contents(out) == before
        assert not out.with_name("out.partial").exists()

    def test_is_replaced_with_restart_only_when_the_new_one_is_complete(
        self,
        server: ForkServerContext,
        source: Path,
        whole: tuple[dict[str, str], int],
        out: Path,
    ) -> None:
        before = contents(out)
        other = replace(job_for(source, out, restart=True), scheme=QuantScheme(bits=8, group_size=32))
        assert run_job(server, other, kill_at=whole[1] // 2).exit_code == -9
        assert contents(out) == before
        assert run_job(server, other).error is None
        assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 8
        assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_two_processes_at_once_are_refused(
    server: ForkServerContext, source: Path, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    job = job_for(source, tmp_path / "out")
    first = start_job(server, job)
    try:
        wait_for(tmp_path / "out.partial" / "journal.jsonl")
        os.kill(first.pid, signal.SIGSTOP)  # it holds the lock as long as we like
        outcome = run_job(server, job)
        assert outcome.error is not None
        assert "another process" in outcome.error
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == whole[0]
