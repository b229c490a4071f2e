"""Folding a rotation Q of the residual stream into the modules around it: ``f'(x Q) = f(x) Q`` (SpinQuant's R1).

Readers W of a norm ``g * n(x) + b`` with ``n(x Q) = n(x) Q``: ``W' = W diag(g / s) Q``, and the norm keeps the scale s
and gets ``b' = (b s / g) Q``. Writers: ``W' = Q^T W`` and ``bias' = bias Q``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightgptq.core.rotation import Rotation
from lightgptq.rotation.norm_scale import NormScale
from lightgptq.rotation.roles import StreamRoles, not_foldable, reader_weight


@torch.no_grad()
def fold_norm(module: nn.Module, name: str, rotation: Rotation, keep: float = 1.0) -> Tensor:
    """Leave a norm with the scale ``keep`` and a rotated bias; returns g / keep (width,) for its readers.

    Raises UnsupportedModelError, saying ``name``, where a bias remains that no scale takes.
    """
    scale = NormScale.of(module, name)
    if scale.b is not None:
        if bool(((scale.g == 0) & (scale.b != 0)).any()):
            raise not_foldable(f"{name} has a bias where its scale is 0")
        shift = torch.where(scale.g == 0, 0.0, scale.b * keep / scale.g)
        _parameter(module, "bias").copy_(rotation.apply(shift))
    _parameter(module, "weight").fill_(keep - scale.offset)
    return scale.g / keep


@torch.no_grad()
def fold_reader(weight: Tensor, ratio: Tensor, rotation: Rotation) -> Tensor:
    """``W diag(ratio) Q``: weight (out, width), ratio (width,); returns float32."""
    return rotation.apply(weight.float() * ratio)


@torch.no_grad()
def fold_writer(module: nn.Linear, rotation: Rotation) -> None:
    """Rotate what a linear puts out, in place."""
    module.weight.copy_(rotation.apply(module.weight.t()).t())
    if module.bias is not None:
        module.bias.copy_(rotation.apply(module.bias))


def fold_block(block: nn.Module, prefix: str, roles: StreamRoles, rotation: Rotation) -> set[str]:
    """Fold Q into a block's modules in place; returns the names of the parameters that changed, inside the block.

    prefix  of the block's names in the model, for errors
    """
    changed = set()
    ratios = {}
    for norm in sorted(set(roles.readers.values())):
        module = block.get_submodule(norm)
        ratios[norm] = fold_norm(module, f"{prefix}.{norm}", rotation)
        changed |= {f"{norm}.{name}" for name, p in module._parameters.items() if p is not None}
    for name, norm in roles.readers.items():
        module = block.get_submodule(name)
        weight = reader_weight(module, rotation.width)
        assert weight is not None, "find_roles() has seen it"
        weight.data.copy_(fold_reader(weight, ratios[norm], rotation))
        changed |= {f"{name}.{leaf}" for leaf, p in module._parameters.items() if p is weight}
    for name in roles.writers:
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear)
        fold_writer(module, rotation)
        changed |= {f"{name}.{leaf}" for leaf, p in module._parameters.items() if p is not None}
    return changed


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter
