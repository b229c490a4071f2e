"""What lies between the quantized products of a decoding step, in native calls, and `use_native`, which finds it.

The weights of a token drive Python and torch out of the caches, after which every operation takes ten times as long as
it does when nothing else runs: a few long calls instead of many short ones.
"""

from __future__ import annotations

from torch import nn

from lightgptq.decoding.attention import use_native_attention
from lightgptq.decoding.mlp import gate_mlps
from lightgptq.decoding.norm import replace_norms
from lightgptq.decoding.rotary import rotate_natively


def use_native(model: nn.Module) -> None:
    """Let a loaded model on a CPU compute norms, rotary embeddings, attention and gated MLPs of few tokens natively.

    Each is found by what it computes, never by an architecture's name, and leaves to the model's own code whatever is
    not plain inference of a few tokens. Parameters, names and classes stay, but for norms, which become `RMSNorm`. Does
    nothing without the native library.
    """
    replace_norms(model)
    use_native_attention(model)
    rotate_natively(model)
    gate_mlps(model)
