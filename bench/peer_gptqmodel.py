"""GPTQModel's solver for one layer on this CPU, run by bench_solver with the Python that has GPTQModel installed.

python bench/peer_gptqmodel.py OUT IN TOKENS THREADS prints the seconds of its Hessian, its inverse's factor
and what is left of its solver, the sweep.
"""

import json
import sys
import time

import torch
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ


def main() -> None:
    """Solve one random layer, 4 bits, group 128, with everything else as GPTQModel has it by default."""
    out_features, in_features, tokens, threads = (int(word) for word in sys.argv[1:5])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    config = QuantizeConfig(bits=4, group_size=128, desc_act=False, act_group_aware=False)
    solver = GPTQ(linear, config)
    solver.quantizer.configure(perchannel=True)
    x = torch.randn(1, tokens, in_features)
    started = time.perf_counter()
    solver.add_batch(x, None)
    middle = time.perf_counter()
    factoring = [0.0]
    invert = solver.hessian_inverse

    def timed(*arguments: object, **named: object) -> object:
        begun = time.perf_counter()
        result = invert(*arguments, **named)
        factoring[0] += time.perf_counter() - begun
        return result

    solver.hessian_inverse = timed
    solver.quantize(blocksize=128)
    solve = time.perf_counter() - middle
    seconds = {
        "hessian": middle - started,
        "factor": factoring[0],
        "sweep": solve - factoring[0],
        "solve": solve,
    }
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
