"""The model card of a checkpoint: what it is, what it lost, how to run it; from files beside its weights only."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightgptq.checkpoint.fused_rules import fused_conflicts, served_by_vllm
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import UsageError
from lightgptq.evaluation.saved import SavedFigures, load_figures
from lightgptq.evaluation.size import CheckpointSize, size_of
from lightgptq.quantization.report import REPORT_FILE, QuantReport

REPO_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
WORST_MODULES = 5


@dataclass(frozen=True)
class CardFacts:
    """All that a card says.

    repo        name on the hub
    revision    branch that it lies on, None for main
    base_model  hub name of the original, None when nobody said
    commit      of the original
    license     of the original, as the hub names licences
    schemes     of each quantized linear
    report      None when another tool made the checkpoint
    """

    repo: str
    revision: str | None
    base_model: str | None
    commit: str | None
    license: str | None
    architecture: str
    checkpoint: QuantizedCheckpoint
    schemes: dict[str, QuantScheme]
    size: CheckpointSize
    report: QuantReport | None
    figures: Sequence[SavedFigures]

    @classmethod
    def read(
        cls,
        checkpoint: str | Path,
        repo: str,
        *,
        revision: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        figures: Sequence[SavedFigures] | None = None,
    ) -> CardFacts:
        """Read a checkpoint's headers and JSON files; see `model_card`."""
        for name in (repo, base_model):
            if name is not None and REPO_NAME.fullmatch(name) is None:
                raise UsageError(f"{name!r} is no name on the hub; give ORGANISATION/NAME")
        if revision is not None and re.fullmatch(r"[\w./-]+", revision) is None:
            raise UsageError(f"revision {revision!r} is no name of a branch")
        if license is not None and re.fullmatch(r"[\w.-]+", license) is None:
            raise UsageError(
                f"license {license!r} is no identifier of the hub, such as apache-2.0 or llama3.2"
            )
        folder = Path(checkpoint)
        if not folder.is_dir():
            raise UsageError(f"{checkpoint}: no such folder; give the checkpoint's folder")
        reader = CheckpointReader.open(folder)
        quantized = QuantizedCheckpoint.of(reader)
        report = QuantReport.load(folder) if (folder / REPORT_FILE).is_file() else None
        source: dict[str, Any] = report.job.get("source", {}) if report is not None else {}
        return cls(
            repo=repo,
            revision=None if revision == "main" else revision,
            base_model=base_model or source.get("repo_id"),
            commit=source.get("commit") if base_model in (None, source.get("repo_id")) else None,
            license=license,
            architecture=str((reader.config.get("architectures") or [reader.config.get("model_type")])[0]),
            checkpoint=quantized,
            schemes={module: quantized.scheme(module) for module in quantized.modules},
            size=size_of(reader),
            report=report,
            figures=load_figures(folder) if figures is None else figures,
        )


def model_card(
    checkpoint: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figures: Sequence[SavedFigures] | None = None,
) -> str:
    """The README.md of a GPTQ checkpoint on the hub.

    checkpoint  its folder
    repo        its name on the hub
    revision    branch that it will lie on, for the commands that load it
    base_model  hub name of the original; by default what quant_report.json says
    license     of the original, as the hub names licences; by default left out
    figures     evaluation results; by default those that ``lightgptq eval --save`` left in the folder

    Raises UsageError for a name that the hub would refuse, CheckpointError for a folder without a checkpoint.
    """
    facts = CardFacts.read(
        checkpoint, repo, revision=revision, base_model=base_model, license=license, figures=figures
    )
    sections = (_front_matter, _title, _scheme, _calibration, _quality, _running)
    return "\n\n".join(filter(None, (section(facts) for section in sections))) + "\n"


def _front_matter(facts: CardFacts) -> str:
    bits = facts.checkpoint.config.bits
    lines = [f"license: {facts.license}"] if facts.license else []
    if facts.base_model is not None:
        lines += [f"base_model: {facts.base_model}", "base_model_relation: quantized"]
    lines.append("library_name: transformers")
    if facts.architecture.endswith("ForCausalLM"):
        lines.append("pipeline_tag: text-generation")
    lines += ["tags:", "- gptq", "- lightgptq", f"- {bits}-bit"]
    return "\n".join(["---", *lines, "---"])


def _title(facts: CardFacts) -> str:
    original = (
        "a model"
        if facts.base_model is None
        else f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    )
    commit = f" (commit `{facts.commit[:12]}`)" if facts.commit else ""
    by = ", ".join(str(one) for one in facts.checkpoint.config.meta.get("quantizer") or ["an unknown tool"])
    return (
        f"# {facts.repo.rpartition('/')[2]}\n\n"
        f"{original[0].upper()}{original[1:]}{commit}, quantized with GPTQ "
        f"([arXiv 2210.17323](https://arxiv.org/abs/2210.17323)) by `{by}`: "
        f"{facts.size.size_bytes / 1e6:.1f} MB, {facts.size.bits_per_weight:.2f} bits for each quantized weight."
    )


def _scheme(facts: CardFacts) -> str:
    config, kinds = facts.checkpoint.config, _count(facts.schemes)
    rows = [
        f"| {s.bits} | {'one' if s.group_size == -1 else s.group_size} | {'yes' if s.sym else 'no'} "
        f"| {'yes' if s.act_order else 'no'} | {n} |"
        for s, n in kinds
    ]
    notes = [
        f"Checkpoint format `{config.checkpoint_format}`, damping {config.damp_percent:g} of the mean diagonal."
    ]
    if config.lm_head:
        notes.append("The output head is quantized.")
    if config.dynamic:
        rules = "\n".join(f"    {rule} {json.dumps(dict(fields))}" for rule, fields in config.dynamic.items())
        notes.append(
            f"Rules, of which the first that matches decides (`-:` leaves linears as they were):\n\n{rules}"
        )
    table = "| bits | group size | symmetric | act-order | linears |\n|---|---|---|---|---|\n" + "\n".join(
        rows
    )
    return f"## Scheme\n\n{table}\n\n{' '.join(notes)}"


def _calibration(facts: CardFacts) -> str:
    if facts.report is None:
        return ""
    job = facts.report.job.get("calibration")
    if not job:
        return "## Calibration\n\nNone: weights were rounded to nearest."
    text = (
        f"## Calibration\n\n`{job['source']}`: {job['samples']} windows of {job['seq_len']} tokens "
        f"(SHA-256 of the token ids `{job['sha256'][:16]}`)."
    )
    if facts.report.problems:
        problems = "\n".join(f"* `{m.name}`: {m.problem}" for m in facts.report.problems[:20])
        more = len(facts.report.problems) - 20
        text += f"\n\nNot solved as asked:\n\n{problems}" + (f"\n* and {more} more" if more > 0 else "")
    return text


def _quality(facts: CardFacts) -> str:
    parts = []
    if facts.figures:
        rows = [
            f"| {f.text} | {f.tokens} | {_number(f.original_perplexity, '.3f')} | {f.perplexity:.3f} "
            f"| {_number(f.kl, '.4f')} | {_number(f.top1_agreement, '.3f')} |"
            for f in facts.figures
        ]
        parts.append(
            "| text | tokens | perplexity, original | perplexity | KL to it, nats a token | top-1 agreement |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    measured = (
        [m for m in facts.report.modules if m.relative_loss is not None] if facts.report is not None else []
    )
    if measured:
        worst = sorted(measured, key=lambda m: -(m.relative_loss or 0.0))[:WORST_MODULES]
        rows = [f"| `{m.name}` | {m.bits} | {m.relative_loss:.2e} |" for m in worst]
        parts.append(
            "Linears with the largest output error on the calibration text, relative to the output itself:\n\n"
            "| linear | bits | relative squared error |\n|---|---|---|\n" + "\n".join(rows)
        )
    return "## What it lost\n\n" + "\n\n".join(parts) if parts else ""


def _running(facts: CardFacts) -> str:
    repo, branch = facts.repo, facts.revision
    given, option = (f', revision="{branch}"', f" --revision {branch}") if branch is not None else ("", "")
    return f"""## How to run it

With Transformers:

```python
import lightgptq
from transformers import AutoModelForCausalLM, AutoTokenizer

lightgptq.register()  # Transformers then loads GPTQ checkpoints with lightgptq's kernels
model = AutoModelForCausalLM.from_pretrained("{repo}"{given}, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}"{given})
```

With lightgptq alone, from Python and from a shell:

```python
import lightgptq

model = lightgptq.load("{repo}"{given})
```

    lightgptq generate {repo}{option} --prompt "Once upon a time"

With vLLM:

    vllm serve {repo}{option}

{_vllm_notes(facts)}With TGI:

    text-generation-launcher --model-id {repo}{option} --quantize gptq

{_tgi_notes(facts)}""".rstrip()


def _vllm_notes(facts: CardFacts) -> str:
    notes = []
    odd = [s for s in set(facts.schemes.values()) if not served_by_vllm(s)]
    if odd:
        notes.append(
            "vLLM's GPTQ kernels take symmetric 4 and 8 bits in groups of 32, 64, 128 or one; others may be refused."
        )
    linears = [n.removesuffix(".weight") for n in facts.checkpoint.plain_names() if n.endswith(".weight")]
    notes += fused_conflicts([*linears, *facts.schemes], facts.schemes, facts.checkpoint.config)
    return "\n".join(f"* {note}" for note in notes) + "\n\n" if notes else ""


def _tgi_notes(facts: CardFacts) -> str:
    if all(s.bits == 4 for s in facts.schemes.values()):
        return ""
    return "* TGI's fast GPTQ kernels are made for 4 bits; this checkpoint has others.\n"


def _count(schemes: dict[str, QuantScheme]) -> list[tuple[QuantScheme, int]]:
    """Schemes by how many linears have them, the most frequent first."""
    values = list(schemes.values())
    return sorted(((s, values.count(s)) for s in set(values)), key=lambda pair: (-pair[1], pair[0].bits))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
