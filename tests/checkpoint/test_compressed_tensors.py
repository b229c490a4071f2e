"""compressed-tensors: golden tensors from its description, and round trips of every scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightgptq.checkpoint.compressed_tensors import CompressedConfig, from_compressed, to_compressed
from lightgptq.checkpoint.packing import trivial_g_idx
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import CheckpointError


def weight(scheme: QuantScheme, in_features: int = 172, out_features: int = 41) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    g_idx = trivial_g_idx(in_features, scheme.group_size)
    groups = int(g_idx[-1]) + 1
    zeros = torch.randint(0, scheme.levels, (groups, out_features), dtype=torch.int32, generator=generator)
    codes = torch.randint(
        0, scheme.levels, (out_features, in_features), dtype=torch.uint8, generator=generator
    )
    scales = torch.rand((groups, out_features), generator=generator).half()
    return QuantizedWeight(
        codes, scales, torch.full_like(zeros, scheme.mid_code) if scheme.sym else zeros, g_idx, scheme.bits
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("permuted", [False, True])
def test_codes_zeros_and_scales_survive(bits: int, sym: bool, group_size: int, permuted: bool) -> None:
    scheme = QuantScheme(bits=bits, sym=sym, group_size=group_size)
    q = weight(scheme)
    if permuted:
        q.g_idx = q.g_idx[torch.randperm(172, generator=torch.Generator().manual_seed(1))]
    tensors = to_compressed(q, scheme)
    assert ("weight_g_idx" in tensors) == (permuted and group_size != -1)
    assert ("weight_zero_point" in tensors) == (not sym)
    back = from_compressed(tensors, scheme)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, name), getattr(q, name)), name


def test_golden_tensors_of_a_small_asymmetric_linear() -> None:
    """Signed values -8..7 are stored with offset 8: the codes themselves, along the inputs; zeros down the rows."""
    scheme = QuantScheme(bits=4, group_size=4, sym=False)
    q = QuantizedWeight(
        codes=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0], [0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half(),
        zeros=torch.tensor([[5, 6], [7, 1]], dtype=torch.int32),
        g_idx=trivial_g_idx(8, 4),
        bits=4,
    )
    tensors = to_compressed(q, scheme)
    assert tensors["weight_packed"].tolist() == [[0x07654321], [0x10000000]]
    assert tensors["weight_scale"].tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert tensors["weight_zero_point"].tolist() == [[0x65, 0x17]]
    assert tensors["weight_shape"].tolist() == [2, 8]


class TestConfig:
    @pytest.mark.parametrize(
        "scheme",
        [
            QuantScheme(act_order=False),
            QuantScheme(bits=8, group_size=-1, act_order=True, static_groups=True),
            QuantScheme(bits=3, sym=False, act_order=True),
        ],
    )
    def test_reads_back_what_it_writes(self, scheme: QuantScheme) -> None:
        config = CompressedConfig(((scheme, ("Linear",)),), ("lm_head",))
        assert CompressedConfig.from_dict(config.to_dict("0"), "config.json") == config

    @pytest.mark.parametrize("actorder", ["group", "dynamic", True])
    def test_the_permuted_groups_of_older_versions_are_understood(self, actorder: object) -> None:
        raw = CompressedConfig(((QuantScheme(), ("Linear",)),)).to_dict("0")
        raw["config_groups"]["group_0"]["weights"]["actorder"] = actorder
        scheme = CompressedConfig.from_dict(raw, "config.json").scheme_for("a")
        assert scheme is not None
        assert (scheme.act_order, scheme.static_groups) == (True, False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "nvfp4-pack-quantized"}, "only 'pack-quantized' can be read"),
            ({"config_groups": None}, "config_groups must be an object"),
        ],
    )
    def test_other_formats_are_refused(self, change: dict[str, Any], message: str) -> None:
        raw = CompressedConfig(((QuantScheme(), ("Linear",)),)).to_dict("0")
        with pytest.raises(CheckpointError, match=message):
            CompressedConfig.from_dict({**raw, **change}, "config.json")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_bits": 5}, "of 5 bits"),
            ({"type": "float"}, "'float' of 4 bits"),
            ({"strategy": "block"}, "strategy 'block'"),
        ],
    )
    def test_other_weights_are_refused(self, change: dict[str, Any], message: str) -> None:
        raw = CompressedConfig(((QuantScheme(), ("Linear",)),)).to_dict("0")
        raw["config_groups"]["group_0"]["weights"].update(change)
        with pytest.raises(CheckpointError, match=message):
            CompressedConfig.from_dict(raw, "config.json")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_packed", None, "weight_packed is missing"),
        ("weight_packed", torch.zeros((41, 21), dtype=torch.int32), r"expected torch\.int32 \(41, 22\)"),
        ("weight_scale", torch.zeros((41, 2)), r"expected floats \(41, 6\)"),
        ("weight_zero_point", None, "weight_zero_point is missing"),
        ("weight_shape", torch.zeros(3), "3 entries"),
        ("weight_g_idx", torch.full((172,), 6), "a group below 6"),
    ],
)
def test_malformed_tensors_are_refused_by_name(name: str, value: torch.Tensor | None, message: str) -> None:
    scheme = QuantScheme(bits=4, group_size=32, sym=False)
    tensors = to_compressed(weight(scheme), scheme)
    tensors = {key: tensor for key, tensor in {**tensors, name: value}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        from_compressed(tensors, scheme)


def test_a_symmetric_scheme_needs_symmetric_zeros() -> None:
    scheme = QuantScheme(bits=4, sym=True)
    q = weight(QuantScheme(bits=4, sym=False))
    with pytest.raises(CheckpointError, match="not every zero is 8"):
        to_compressed(q, scheme)
