"""RTN returns the nearest code of every weight."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import correlated_problem, layer_loss

from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 7])
def test_no_other_code_is_nearer(bits, sym, group_size):
    scheme = QuantScheme(bits=bits, sym=sym, group_size=group_size)
    W, H = correlated_problem(6, 20, seed=1)
    q = rtn(W, scheme, H)
    group = q.g_idx.long()
    levels = torch.arange(scheme.levels).view(-1, 1, 1)
    values = (levels - q.zeros[group].t()) * q.scales.double()[group].t()
    nearest = (values - W.double()).abs().amin(dim=0)
    error = (q.dequantize(torch.float64) - W.double()).abs()
    # dequantize multiplies in float32: 2^-24 relative.
    assert ((error - nearest) <= 1e-6 * W.abs().max()).all()
    assert q.loss == pytest.approx(layer_loss(W, q.dequantize(), H), rel=1e-4)
