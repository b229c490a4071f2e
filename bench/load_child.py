"""Loads one checkpoint with one tool and says how long it took; run by bench_load in the tool's own environment.

    python bench/load_child.py {lightgptq,transformers,gptqmodel} FOLDER RESULT.json [--backend auto]

Only the tool that is measured is imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import time
from pathlib import Path
from typing import Any

TOKENS = 8


def loader(tool: str, backend: str) -> Any:
    """A function from a folder to a model that takes input_ids, on the CPU in bfloat16; imports happen here."""
    torch = importlib.import_module("torch")
    if tool == "gptqmodel":
        gptqmodel = importlib.import_module("gptqmodel")
        chosen = gptqmodel.BACKEND(backend)
        return lambda folder: (
            gptqmodel.GPTQModel.load(folder, device="cpu", dtype=torch.bfloat16, backend=chosen).model
        )
    lightgptq = importlib.import_module("lightgptq")
    if tool == "lightgptq":
        return lambda folder: lightgptq.load(folder, dtype="bfloat16", device="cpu")
    lightgptq.register()
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    return lambda folder: auto.from_pretrained(folder, dtype=torch.bfloat16)


def main() -> None:
    """Load, run one short prompt, write times, peak memory and the last token's logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=("lightgptq", "transformers", "gptqmodel"))
    parser.add_argument("folder")
    parser.add_argument("result", type=Path)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    started = time.perf_counter()
    load = loader(options.tool, options.backend)
    imported = time.perf_counter()
    model = load(options.folder)
    loaded = time.perf_counter()
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        ids = torch.arange(1, TOKENS + 1).view(1, -1)
        logits = model(input_ids=ids).logits[0, -1].float()
    answered = time.perf_counter()
    packed = [
        type(m).__name__
        for m in model.modules()
        if "Linear" in type(m).__name__ and type(m).__name__ != "Linear"
    ]
    result = {
        "import_seconds": imported - started,
        "load_seconds": loaded - imported,
        "first_forward_seconds": answered - loaded,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "layers": sorted(set(packed)),
        "version": getattr(importlib.import_module(options.tool), "__version__", None),
        "logits": logits.tolist(),
    }
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
