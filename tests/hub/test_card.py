"""The card says what the files beside the weights say, and nothing about this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import lightgptq
from lightgptq import QuantScheme
from lightgptq.cli.app import run
from lightgptq.errors import UsageError
from lightgptq.evaluation.saved import FIGURES_FILE, SavedFigures
from lightgptq.quantization.report import REPORT_FILE, QuantReport

FIGURES = SavedFigures("pydoc", None, 20400, 23.61, 0.0089, 0.944, 23.41)


def front_matter(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_front_matter(checkpoint: Path) -> None:
    card = lightgptq.model_card(checkpoint, "org/name", base_model="meta-llama/Llama-3.2-1B", license="mit")
    assert front_matter(card) == {
        "license": "mit",
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "lightgptq", "4-bit"],
    }


def test_scheme_and_calibration(checkpoint: Path) -> None:
    card = lightgptq.model_card(checkpoint, "org/name")
    assert "| 4 | 32 | yes | yes | 11 |" in section(card, "Scheme")
    assert "| 8 | 32 | yes | yes | 2 |" in section(card, "Scheme")
    assert "-:.*layers\\.1\\.self_attn\\.o_proj {}" in section(card, "Scheme")
    report = QuantReport.load(checkpoint)
    calibration = report.job["calibration"]
    assert f"{calibration['samples']} windows of {calibration['seq_len']} tokens" in section(
        card, "Calibration"
    )
    assert calibration["sha256"][:16] in section(card, "Calibration")
    worst = max(report.modules, key=lambda m: m.relative_loss or 0)
    assert section(card, "What it lost").count("model.layers") == 5
    assert f"`{worst.name}` | {worst.bits} | {worst.relative_loss:.2e}" in section(card, "What it lost")


def test_no_path_of_this_machine(checkpoint: Path, model_folder: Callable[[str], Path]) -> None:
    card = lightgptq.model_card(checkpoint, "org/name")
    assert "base_model" not in front_matter(card)
    for path in (checkpoint, model_folder("llama"), Path.home()):
        assert str(path) not in card


def test_the_base_model_of_a_source_on_the_hub(checkpoint: Path) -> None:
    path = checkpoint / REPORT_FILE
    raw = json.loads(path.read_text())
    raw["job"]["source"] |= {"repo_id": "facebook/opt-125m", "commit": "0123456789abcdef"}
    path.write_text(json.dumps(raw))
    card = lightgptq.model_card(checkpoint, "org/name")
    assert front_matter(card)["base_model"] == "facebook/opt-125m"
    assert "commit `0123456789ab`" in card
    other = lightgptq.model_card(checkpoint, "org/name", base_model="org/other")
    assert "0123456789ab" not in other


def test_figures_that_were_saved_or_are_given(
    checkpoint: Path, model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert "perplexity" not in lightgptq.model_card(checkpoint, "org/name")
    given = lightgptq.model_card(checkpoint, "org/name", figures=[FIGURES])
    assert "| pydoc | 20400 | 23.410 | 23.610 | 0.0089 | 0.944 |" in given
    alone = replace(FIGURES, kl=None, top1_agreement=None, original_perplexity=None)
    assert "| pydoc | 20400 |  | 23.610 |  |  |" in lightgptq.model_card(checkpoint, "o/n", figures=[alone])

    arguments = ["eval", str(checkpoint), "--seq-len", "64", "--max-tokens", "320", "--save"]
    for _ in range(2):  # the second replaces the first
        assert run([*arguments, "--reference", str(model_folder("llama")), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    (saved,) = json.loads((checkpoint / FIGURES_FILE).read_text())
    assert saved["kl"] == facts["kl"]
    assert (
        saved["original_perplexity"]
        == lightgptq.evaluate(model_folder("llama"), seq_len=64, max_tokens=320).perplexity
    )
    assert f"| {facts['perplexity']:.3f} | {facts['kl']:.4f} |" in lightgptq.model_card(
        checkpoint, "org/name"
    )


def test_how_to_run_it(checkpoint: Path) -> None:
    text = section(lightgptq.model_card(checkpoint, "org/name"), "How to run it")
    for words in (
        "lightgptq.register()",
        'lightgptq.load("org/name")',
        "vllm serve org/name",
        "text-generation-launcher --model-id org/name --quantize gptq",
    ):
        assert words in text
    for code in text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


def test_how_to_run_a_branch(checkpoint: Path) -> None:
    text = section(lightgptq.model_card(checkpoint, "org/name", revision="four-bits"), "How to run it")
    assert text.count('"org/name", revision="four-bits"') == 3
    assert text.count("org/name --revision four-bits") == 3
    assert "revision" not in lightgptq.model_card(checkpoint, "org/name", revision="main")


@pytest.mark.parametrize(
    ("fields", "rules", "says"),
    [
        ({"bits": 3}, (), "may be refused"),
        ({"sym": False}, (), "may be refused"),
        ({}, (r".*v_proj=bits:8",), "served as one layer"),
        ({}, (), None),
    ],
)
def test_what_vllm_will_not_take_is_said(
    fields: dict[str, object],
    rules: tuple[str, ...],
    says: str | None,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    scheme = QuantScheme(**({"group_size": 32, "method": "rtn"} | fields))  # type: ignore[arg-type]
    lightgptq.quantize(model_folder("llama"), tmp_path / "out", scheme, rules=rules)
    card = lightgptq.model_card(tmp_path / "out", "org/name")
    assert "None: weights were rounded to nearest." in section(card, "Calibration")
    for words in ("may be refused", "served as one layer"):
        assert (words in card) is (words == says)


def test_a_checkpoint_of_another_tool(checkpoint: Path) -> None:
    """It has no report."""
    (checkpoint / REPORT_FILE).unlink()
    card = lightgptq.model_card(checkpoint, "org/name")
    assert "Calibration" not in card
    assert "What it lost" not in card
    assert "| 4 | 32 |" in card


@pytest.mark.parametrize(
    "fields",
    [
        {"repo": "a/b/c"},
        {"repo": "a b"},
        {"base_model": "x\ny: z"},
        {"license": "mit\nx: y"},
        {"revision": "a b"},
    ],
)
def test_names_that_the_hub_would_refuse(fields: dict[str, str], checkpoint: Path) -> None:
    options = {"repo": "org/name"} | fields
    with pytest.raises(UsageError):
        lightgptq.model_card(checkpoint, **options)  # type: ignore[arg-type]


def test_figures_are_saved_only_in_a_folder(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "org/name", "--save"]) == 2
    assert "--save" in capfd.readouterr().err
