"""Our presets beside other tools' checkpoints: same calibration windows and format, judged on the same tokens.

    python -m bench.compare_checkpoints --bits 4 --group-size 128 --seed 0 [--preset fast --preset balanced]
        [--distill STEPS] [--model FOLDER] [LABEL=FOLDER ...] [--seconds LABEL=SECONDS] [--text pydoc --text FILE]
        [--max-tokens 20480]

FOLDER is a checkpoint (GPTQ, or compressed-tensors) of the model, by default the demonstration's, that another tool
made from the windows that `tests/interop/export_windows.py` writes with the same seed (128 windows of 256 tokens), in
SECONDS on this machine. Ours are made here. Every checkpoint is read by `lightgptq.load` and run in float32; a line for
each text goes to bench/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import transformers

import lightgptq
from bench.record import append
from lightgptq.checkpoint.conversion import import_compressed_tensors
from lightgptq.checkpoint.reader import CheckpointReader

MODEL = Path(__file__).parents[1] / "examples" / "pep-llama-6m"


def main() -> None:
    """Quantize, measure every checkpoint on every text, print and append the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="LABEL=FOLDER")
    parser.add_argument("--seconds", action="append", default=[], metavar="LABEL=SECONDS")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--distill", type=int, help="instead of the presets' own steps end to end")
    parser.add_argument("--text", action="append", help="pydoc (default) or a file that nobody calibrated on")
    parser.add_argument("--max-tokens", type=int, default=20_480)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        folders: dict[str, Path] = {}
        told = (pair.partition("=") for pair in options.seconds)
        seconds = {label: float(value) for label, _, value in told}
        for pair in options.checkpoints:
            label, _, folder = pair.partition("=")
            folders[label] = _as_gptq(Path(folder), Path(work) / f"imported-{len(folders)}")
        for preset in options.preset:
            label = f"lightgptq {preset}" + (
                f", distill {options.distill}" if options.distill is not None else ""
            )
            folders[label] = Path(work) / preset
            seconds[label] = _quantize(folders[label], preset, options)
        original = lightgptq.load(options.model, dtype="float32")
        for text in options.text or ["pydoc"]:
            results: dict[str, dict[str, Any]] = {}
            for label, folder in folders.items():
                result = lightgptq.evaluate(
                    folder, text, reference=original, seq_len=256, max_tokens=options.max_tokens
                )
                spent = {"seconds": round(seconds[label], 1)} if label in seconds else {}
                results[label] = result.to_dict() | spent
            figures = {
                "model": options.model.name,
                "text": Path(text).name,
                "bits": options.bits,
                "group_size": options.group_size,
                "sym": not options.asym,
                "seed": options.seed,
                "results": results,
            }
            print(figures["text"], options.bits, options.group_size, "seed", options.seed)
            print({label: round(result["kl"], 5) for label, result in results.items()}, flush=True)
            append("quality", {"benchmark": "quality", **figures})


def _quantize(out: Path, preset: str, options: argparse.Namespace) -> float:
    chosen = lightgptq.preset(preset, bits=options.bits, group_size=options.group_size, sym=not options.asym)
    if options.distill is not None:
        chosen["distill"] = options.distill
    report = lightgptq.quantize(
        options.model,
        out,
        samples=128,
        seq_len=256,
        seed=options.seed,
        **chosen,
    )
    return report.seconds


def _as_gptq(folder: Path, out: Path) -> Path:
    """The folder itself, or a GPTQ copy of it when it is compressed-tensors."""
    raw = CheckpointReader.open(folder).config.get("quantization_config") or {}
    if raw.get("quant_method") == "compressed-tensors":
        import_compressed_tensors(folder, out)
        return out
    return folder


if __name__ == "__main__":
    main()
