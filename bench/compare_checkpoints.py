"""Our checkpoints beside another tool's, same calibration windows, bits and group size, judged on the same tokens.

    python -m bench.compare_checkpoints LABEL=FOLDER ... [--text pydoc --text FILE] [--max-tokens 20480]

FOLDER is a GPTQ checkpoint of the demonstration model that the other tool made from the windows that
`tests/interop/export_windows.py` writes (128 windows of 256 tokens). Ours are made here with the bits and group
size of each. Every checkpoint is run by `lightgptq.load` in float32; lines go to bench/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import transformers

import lightgptq
from bench.record import append
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.core.presets import preset_fields

MODEL = Path(__file__).parents[1] / "examples" / "pep-llama-6m"


def main() -> None:
    """Measure every pair, print and append the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--text", action="append", help="pydoc (default) or a file that nobody calibrated on")
    parser.add_argument("--max-tokens", type=int, default=20_480)
    parser.add_argument("--preset", default="fast")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    original = lightgptq.load(MODEL, dtype="float32")
    for pair in options.checkpoints:
        label, _, folder = pair.partition("=")
        config = CheckpointReader.open(folder).quantization_config()
        assert config is not None
        scheme = lightgptq.QuantScheme(bits=config.bits, group_size=config.group_size, sym=config.sym)
        scheme = scheme.with_overrides(preset_fields(options.preset, config.bits))
        with tempfile.TemporaryDirectory() as work:
            ours = Path(work) / "ours"
            lightgptq.quantize(MODEL, ours, scheme, samples=128, seq_len=256)
            compared = ((label, folder), (f"lightgptq {options.preset}", ours))
            for text in options.text or ["pydoc"]:
                results = {
                    name: lightgptq.evaluate(
                        path, text, reference=original, seq_len=256, max_tokens=options.max_tokens
                    ).to_dict()
                    for name, path in compared
                }
                figures = {
                    "text": Path(text).name,
                    "bits": config.bits,
                    "group_size": config.group_size,
                    "sym": config.sym,
                    "results": results,
                }
                print(figures["text"], label, config.bits, config.group_size)
                print({name: round(result["kl"], 5) for name, result in results.items()}, flush=True)
                append("quality", {"benchmark": "quality", **figures})


if __name__ == "__main__":
    main()
