"""Every record comes back as it was, from the device, the host or the file; what is in the file survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightgptq.errors import CheckpointError
from lightgptq.quantization import activations
from lightgptq.quantization.activations import ActivationStore
from lightgptq.quantization.workfolder import WorkFolder
from lightgptq.quantization.writeback import WriteBack

SHAPES = [(2, 3, 4)] * 5 + [(1, 3, 4)]
RECORD = 2 * 3 * 4 * 2


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from the fake device are ordinary ones."""
    monkeypatch.setattr(activations, "host_copy", lambda t: lambda: t.as_subclass(Tensor).clone())


def records(kind: type[Tensor] = Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).bfloat16().as_subclass(kind) for s in SHAPES]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(("device", "host"), [(0, 0), (2, 0), (0, 2), (2, 2), (9, 9)])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.usefixtures("fake_gpu")
def test_records_come_back_from_wherever_they_are(
    tmp_path: Path, threaded: bool, device: int, host: int, once: bool
) -> None:
    expected = records()
    with WriteBack(threaded=threaded) as writeback:
        store = ActivationStore(tmp_path / "a", SHAPES, torch.bfloat16, writeback)
        store.device_bytes, store.host_bytes = device * RECORD, host * RECORD
        for i, record in enumerate(records(Elsewhere)):
            store.write(i, record)
        assert store.kept_on_device == sum(r.nbytes for r in expected[: device if device < 6 else 6])
        for _ in range(2):  # also after a record was handed out for the last time
            for i in reversed(range(len(SHAPES))):
                assert torch.equal(store.read(i, once=once).as_subclass(Tensor), expected[i])
        freed = sum(store.drop(i) for i in range(len(SHAPES)))
        assert store.kept_on_device == 0
        assert freed == sum(r.nbytes for r in expected[: device if device < 6 else 6])
        writeback.drain()
        store.sync()
        store.close()
    again = ActivationStore(tmp_path / "a", SHAPES, torch.bfloat16)
    assert all(torch.equal(again.read(i), expected[i]) for i in range(len(SHAPES)))
    again.delete()
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("fake_gpu")
def test_a_reader_may_change_what_it_was_given(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "a", SHAPES, torch.bfloat16)
    store.device_bytes = 1 << 20
    store.write(0, records(Elsewhere)[0])
    store.read(0).zero_()
    assert torch.equal(store.read(0).as_subclass(Tensor), records()[0])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "a", SHAPES, torch.bfloat16)
    store.write(0, records()[0])
    with pytest.raises(CheckpointError, match="truncated"):
        store.read(1)


def test_forgetting_a_block_leaves_what_is_being_written_after_it(tmp_path: Path) -> None:
    """The writing thread forgot all blocks but its own, the next one's open file among them: a kill lost it."""
    folder = WorkFolder(tmp_path)
    for block in range(4):
        folder.store("quantized", block, SHAPES, torch.bfloat16).close()
        folder.store("original", block, SHAPES, torch.bfloat16).close()
    folder.forget_before(2, ended=[0])
    assert {path.stem for path in tmp_path.iterdir()} == {
        f"{flow}-{block}" for flow in ("quantized", "original") for block in (0, 2, 3)
    }
