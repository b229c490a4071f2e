"""What a run means to allocate on a GPU for a Llama of some shape: the run's own planning, with a batch on ``meta``.

    python -m bench.planned [--presets fast,balanced] [--samples 128] [--seq-len 2048] [--no-append]

Attention counts as fused kernels do it, and no kernel's own scratch memory is seen but what the run reserves for it.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.record import append
from lightgptq.core.presets import preset_fields
from lightgptq.core.scheme import QuantScheme
from lightgptq.quantization.block_memory import BlockLinears, BlockMemory, BlockNeeds
from lightgptq.quantization.blocks import BlockInput, find_blocks
from lightgptq.quantization.groups import probe_block
from lightgptq.quantization.job import BATCH_TOKENS
from lightgptq.quantization.live_bytes import FusedAttention

A100 = 80 * 10**9  # the limit where there is no goal


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder block, and the bytes that a run on a GPU should stay below with 128 x 2048 tokens."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    goal: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """As `random_llama` takes them."""
        return {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
        }


SHAPES = {
    "8b": LlamaShape(4096, 14336, 32, 8, 8 * 10**9),
    "13b": LlamaShape(5120, 13824, 40, 40),
    "70b": LlamaShape(8192, 28672, 64, 8, 24 * 10**9),
    "175b": LlamaShape(12288, 32768, 96, 96),
    "tiny": LlamaShape(128, 256, 4, 2),
}


def planned(
    shape: LlamaShape, samples: int, seq_len: int, max_memory: int, scheme: QuantScheme
) -> tuple[BlockNeeds, BlockMemory]:
    """What a block takes, and how a run with that limit would hold its batches."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
    )
    windows = max(1, BATCH_TOKENS // seq_len)
    with torch.device("meta"), torch.no_grad(), FusedAttention():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        block = find_blocks(model)[0]
        linears = block.linears()

        def enter() -> BlockInput:
            sizes = (
                (windows, seq_len, width) for width in (shape.hidden, *[shape.hidden // shape.heads] * 2)
            )
            hidden, *angles = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
            return BlockInput((hidden,), {"position_embeddings": tuple(angles), "attention_mask": None})

        probe = probe_block(block.module, linears, enter)
    needs = BlockNeeds.of(
        block.module,
        BlockLinears(linears, dict.fromkeys(linears, scheme), alone=False, tokens=windows * seq_len),
        probe,
        batches=-(-samples // windows),
        every=scheme.mismatch_every if scheme.mismatch > 0 else 0,
        together={},
        on_gpu=True,
        sparing=False,
    )
    held = sum(parameter.nbytes for parameter in block.module.parameters())
    return needs, needs.share(max_memory - held, held=held)


def main() -> None:
    """Print it for every shape, append it to bench/results/planned.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="fast,balanced")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    for preset, (name, shape) in itertools.product(options.presets.split(","), SHAPES.items()):
        if name == "tiny":
            continue
        limit = shape.goal or A100
        scheme = QuantScheme().with_overrides(preset_fields(preset, 4))
        needs, memory = planned(shape, options.samples, options.seq_len, limit, scheme)
        print(
            f"{name:>5}, {preset}: {memory.peak / 1e9:5.2f} GB of {limit / 1e9:.0f}, "
            f"{memory.waiting} of {needs.batches} batches wait; at least {memory.least / 1e9:.2f} ("
            f"{needs.fixed / 1e9:.2f} besides the block, one batch {needs.one_batch / 1e9:.2f}), "
            f"all waiting {needs.waiting_bytes(needs.batches) / 1e9:.2f}, "
            f"kept between blocks {memory.between / 1e9:.2f}"
        )
        if not options.no_append:
            line = {"benchmark": "planned", "shape": name, "preset": preset, "limit": limit}
            line |= {"calibration_tokens": options.samples * options.seq_len}
            append("planned", line | {"needs": asdict(needs), "memory": asdict(memory)})


if __name__ == "__main__":
    main()
