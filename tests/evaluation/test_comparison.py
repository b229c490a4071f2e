"""compare(): figures as evaluate() gives them, differences told from noise, damage located."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightgptq
from lightgptq import QuantScheme
from lightgptq.errors import UsageError
from lightgptq.evaluation.comparison import Comparison, compare
from lightgptq.evaluation.comparison_page import comparison_page
from lightgptq.evaluation.damage import block_errors, worst_modules
from lightgptq.quantization.history import remember, seconds_spent
from lightgptq.texts import Text

WORDS = "the value of an attribute is the object that the class is called with, "
TEXT = Text("words", (WORDS * 40, WORDS[::-1] * 30, WORDS.upper() * 30))
SEQ_LEN = 40


@pytest.fixture(scope="module")
def original(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def checkpoints(original: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """2 and 8 bits, rounded to nearest, and 8 bits again elsewhere."""
    folder = tmp_path_factory.mktemp("compare")
    made = []
    for name, bits in (("two", 2), ("eight", 8), ("again", 8)):
        scheme = QuantScheme(bits=bits, group_size=32, method="rtn")
        lightgptq.quantize(original, folder / name, scheme)
        made.append(folder / name)
    return made


@pytest.fixture(scope="module")
def found(original: Path, checkpoints: list[Path]) -> Comparison:
    return compare(original, list(checkpoints), TEXT, seq_len=SEQ_LEN)


def test_figures_are_those_of_evaluate(found: Comparison, original: Path, checkpoints: list[Path]) -> None:
    expected = lightgptq.evaluate(checkpoints[0], TEXT, reference=original, seq_len=SEQ_LEN)
    first = found.checkpoints[0]
    assert first.label == "two"
    assert first.perplexity.value == pytest.approx(expected.perplexity, rel=1e-6)
    assert first.kl.value == pytest.approx(expected.kl, rel=1e-6)
    assert first.top1_agreement.value == pytest.approx(expected.top1_agreement)
    assert first.size_bytes == expected.size_bytes
    assert found.tokens == expected.tokens
    assert found.perplexity.value == pytest.approx(
        lightgptq.evaluate(original, TEXT, seq_len=SEQ_LEN).perplexity, rel=1e-6
    )
    assert first.kl.low < first.kl.value < first.kl.high
    assert first.kl.value < first.kl_p95 < first.kl_max


def test_real_differences_are_told_from_noise(found: Comparison) -> None:
    verdicts = {(d.first, d.second): d for d in found.differences}
    assert verdicts[("two", "eight")].kl.excludes_zero
    assert verdicts[("two", "eight")].verdict == "eight is closer to the original than two"
    assert "no difference" in verdicts[("eight", "again")].verdict


def test_block_errors_are_those_of_the_hidden_states(original: Path, checkpoints: list[Path]) -> None:
    """Transformers' own ``output_hidden_states`` is the oracle; the last has the final norm."""
    windows = torch.arange(2, 2 + 3 * SEQ_LEN).view(3, SEQ_LEN)
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    model = lightgptq.load(checkpoints[0], dtype="float32")
    errors = block_errors(model, reference, windows)
    assert [e.name for e in errors] == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        want, have = (m(windows, output_hidden_states=True).hidden_states[1] for m in (reference, model))
    expected = float((have - want)[:, 1:].square().sum() / want[:, 1:].square().sum())
    assert errors[0].error == pytest.approx(expected, rel=1e-4)
    assert errors[0].error > 0.001


def test_the_time_of_a_run_is_remembered_by_its_job(found: Comparison) -> None:
    assert all(c.seconds is not None and c.seconds > 0 for c in found.checkpoints)
    remember({"a": 1}, 12.5)
    remember({"a": 1}, 3.25)
    assert seconds_spent({"a": 1}) == 3.25
    assert seconds_spent({"a": 2}) is None


def test_worst_modules_come_first(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    report = lightgptq.quantize(
        model_folder("llama"),
        tmp_path / "out",
        QuantScheme(bits=3, group_size=32),
        samples=4,
        seq_len=64,
        rules=(r".*layers\.1\.mlp\.down_proj=bits:2",),
    )
    assert worst_modules(report.modules, 1)[0].name == "model.layers.1.mlp.down_proj"


def test_equal_folder_names_are_told_apart(original: Path, checkpoints: list[Path]) -> None:
    twin = checkpoints[1].parent / "other" / "eight"
    lightgptq.quantize(original, twin, QuantScheme(bits=8, group_size=-1, method="rtn"))
    labels = [c.label for c in compare(original, [checkpoints[1], twin], TEXT, seq_len=SEQ_LEN).checkpoints]
    assert labels == [str(checkpoints[1]), str(twin)]


def test_a_checkpoint_given_twice_is_refused(original: Path, checkpoints: list[Path]) -> None:
    with pytest.raises(UsageError, match="given twice"):
        compare(original, [checkpoints[0], checkpoints[0]], TEXT)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.circles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.circles += tag == "circle"


def test_the_page_needs_no_network_and_shows_every_checkpoint_and_block(found: Comparison) -> None:
    page = comparison_page(found)
    tags = _Tags()
    tags.feed(page)
    assert tags.links == []
    assert "url(" not in page
    assert "@import" not in page
    assert tags.circles == 3 + 3 * 2  # one dot a checkpoint, one a checkpoint and block
    for label in ("two", "eight", "again"):
        assert page.count(label) >= 3
