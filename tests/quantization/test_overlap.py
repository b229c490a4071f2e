"""Writing behind and reading ahead change no byte, killed or not; here their threads run beside a CPU."""

from __future__ import annotations

import random
from contextlib import nullcontext
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from tests.folders import contents
from tests.models import VOCABULARY, llama, randomise, save
from tests.quantization.kills import Job, run_job, start_server

from lightgptq.errors import DeviceMemoryError
from lightgptq.quantization.device import exact_on

IDS = torch.randint(2, VOCABULARY, (9, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return start_server()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(randomise(llama(4)), tmp_path_factory.mktemp("overlap") / "source")


def job_for(source: Path, out: Path, overlap: bool) -> Job:
    return Job(source, out, IDS, options={"lm_head": True, "max_shard_bytes": 60_000}, overlap=overlap)


@pytest.fixture(scope="module")
def plain(
    server: ForkServerContext, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], int]:
    """The files of a run without threads, and how many operations on files it took."""
    out = tmp_path_factory.mktemp("plain") / "out"
    outcome = run_job(server, job_for(source, out, False))
    assert (outcome.exit_code, outcome.error) == (0, None)
    return contents(out), len(outcome.operations)


def test_overlapping_changes_no_byte(
    server: ForkServerContext, source: Path, plain: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    outcome = run_job(server, job_for(source, tmp_path / "out", True))
    assert (outcome.exit_code, outcome.error) == (0, None)
    assert contents(tmp_path / "out") == plain[0]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("part", range(4))
def test_an_overlapping_run_that_is_killed_ends_with_the_same_bytes(
    part: int, server: ForkServerContext, source: Path, plain: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """The threads' operations mix with the main one's, so a point means another moment each time."""
    point = random.Random(part).randint(1 + part * plain[1] // 4, (part + 1) * plain[1] // 4)
    job = job_for(source, tmp_path / "out", True)
    assert run_job(server, job, kill_at=point).exit_code == -9
    outcome = run_job(server, job)
    assert (outcome.exit_code, outcome.error) == (0, None)
    assert contents(tmp_path / "out") == plain[0]


def test_memory_that_runs_out_on_a_gpu_is_one_sentence_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 << 30)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with (
            pytest.raises(DeviceMemoryError, match=r"cuda:1 ran out .* 7\.0 GiB .* --max-memory"),
            exact_on(torch.device("cuda:1")),
        ):
            raise_out_of_memory()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def raise_out_of_memory() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
