"""Rotating a model before it is quantized: a plain model in, a plain model out that computes the same.

R1 rotates the residual stream, R2 each value head; both are folded into the weights (QuaRot, arXiv 2404.00456;
SpinQuant, arXiv 2405.16406). Nothing is taken on trust: each block, the embeddings and the head are compared with the
original before they are written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lightgptq.checkpoint.output import OutputFolder
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import named_dtype
from lightgptq.errors import UnsupportedModelError, UsageError
from lightgptq.quantization.blocks import find_blocks
from lightgptq.quantization.heap import large_tensors_mapped, quick_collections
from lightgptq.quantization.progress import Listener, silent
from lightgptq.rotation.run import RotationReport, RotationRun
from lightgptq.skeleton import ModelSkeleton


@torch.no_grad()
def rotate(
    src: str | Path,
    out: str | Path,
    *,
    r1: bool = True,
    r2: bool = True,
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = 5 << 30,
    listener: Listener = silent,
) -> RotationReport:
    """Write a model that computes the same with rotated weights, for `quantize`.

    r1     rotate the residual stream: ``x' = x Q``. Q is a randomised Hadamard matrix, or, where a norm subtracts the
           mean, a random rotation that keeps it. A head that is tied to the embeddings gets a tensor of its own where
           the final norm scales.
    r2     rotate the value heads of each block by a Hadamard matrix of its own, where the block is attention of a kind
           that allows it
    seed   of the rotations
    dtype  of the written weights: "auto" (each as in the source), "float32", "bfloat16" or "float16". Rotated weights
           are rounded to it once more, which for a source in bfloat16 costs about as much as its first rounding did;
           float32 avoids that.

    Runs on the CPU with one block in memory, in float32. Raises UsageError, CheckpointError, or UnsupportedModelError
    where the architecture does not allow it; nothing is then published, and nothing kept.
    """
    started = time.perf_counter()
    if not (r1 or r2):
        raise UsageError("neither R1 nor R2 is left to rotate; ask for one of them")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is out of range; give 0 or more")
    stored = named_dtype(dtype)
    output = OutputFolder(out)
    skeleton = _open(src, revision, trust_remote_code)
    run = RotationRun(skeleton, find_blocks(skeleton.model), r1, r2, seed, listener)
    with output, large_tensors_mapped(), quick_collections(), _nothing_kept(output):
        report = run.execute(output, stored, max_shard_bytes)
    return replace(report, out=Path(out), seconds=time.perf_counter() - started)


def _open(src: str | Path, revision: str | None, trust_remote_code: bool) -> ModelSkeleton:
    """The source in float32; raises UsageError or UnsupportedModelError for what is never rotated."""
    reader = CheckpointReader.open(str(src), revision=revision)
    if reader.config.get("quantization_config") is not None or reader.quantization_config() is not None:
        raise UsageError(f"{src} is quantized already; rotate the original model, then quantize it")
    skeleton = ModelSkeleton.open(reader, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if skeleton.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__} has an encoder and a decoder; only decoders of one stack can be rotated"
        )
    for path in skeleton.experts:  # a few tokens choose a few experts; all of them are to be seen at work
        skeleton.model.get_submodule(path).all_tokens = True  # type: ignore[assignment]
    return skeleton


@contextmanager
def _nothing_kept(output: OutputFolder) -> Iterator[None]:
    """Start without what a killed run left, and leave nothing after an error: a rotation starts over."""
    output.discard()
    try:
        yield
    except BaseException:
        output.abandon()
        raise
