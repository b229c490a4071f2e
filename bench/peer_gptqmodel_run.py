"""GPTQModel's whole run on this CPU, started by bench_quantize with the Python that has GPTQModel installed.

python bench/peer_gptqmodel_run.py MODEL OUT WINDOWS.json BITS THREADS prints the seconds of loading, quantizing and
saving. WINDOWS.json holds lists of token ids; everything but bits is as GPTQModel has it by default.
"""

import json
import sys
import time
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    """Load, quantize, save, print."""
    model, out, file, bits, threads = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    windows = json.loads(Path(file).read_text())
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]
    started = time.perf_counter()
    loaded = GPTQModel.load(model, QuantizeConfig(bits=int(bits), device="cpu", offload_to_disk=False))
    middle = time.perf_counter()
    loaded.quantize(calibration, batch_size=1)
    done = time.perf_counter()
    loaded.save(out)
    seconds = {"load": middle - started, "quantize": done - middle, "save": time.perf_counter() - done}
    print(json.dumps({"version": gptqmodel.__version__, "seconds": seconds}))


if __name__ == "__main__":
    main()
