"""Slow, obviously right float64 versions, written from the papers, that the tests compare with."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight


def paper_scheme(**fields: Any) -> QuantScheme:
    """The scheme of the papers: grids from minimum and maximum, no refinement, unless the fields say otherwise."""
    return QuantScheme(**{"scale_search": "minmax", **fields})


def nearest_code(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """``clamp(round(w / scale) + zero, 0, max_code)`` in float64."""
    return (torch.round(w / scale) + zero).clamp(0, max_code)


def damped(H: Tensor, damp: float) -> Tensor:
    """H in float64 with ``damp`` times its mean live diagonal added; dead inputs get the mean diagonal
    first."""
    H = H.double().clone()
    diag = H.diagonal()
    dead = diag == 0
    mean = diag[~dead].mean()
    H[dead] = 0
    H[:, dead] = 0
    H.diagonal()[dead] = mean
    return H + damp * mean * torch.eye(len(H), dtype=torch.float64)


def gptq_columns(
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    max_code: int,
    damp: float,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """GPTQ column by column, no blocks, no Cholesky: the inverse of what is left of H is computed anew each
    time.

    After column j is fixed, the best continuation for the free columns F is (OBQ, arXiv 2208.11580, eq. 3)
    ``w_F -= (w_j - q_j) / [H_R^-1]_jj * [H_R^-1]_jF``, R = {j} and F. Returns codes and, for every column,
    how far (in steps) the value that was rounded lay from the nearest rounding boundary.
    """
    w = W.double().clone()
    Hd = damped(H, damp)
    codes = torch.zeros_like(w)
    margin = torch.zeros_like(w)
    order_list = order.tolist()
    for t, j in enumerate(order_list):
        rest = order_list[t:]
        inverse = torch.linalg.inv(Hd[rest][:, rest])
        scale, zero = scales[g_idx[j].long()].double(), zeros[g_idx[j].long()].double()
        codes[:, j] = nearest_code(w[:, j], scale, zero, max_code)
        steps = w[:, j] / scale
        margin[:, j] = ((steps - torch.floor(steps)) - 0.5).abs()
        error = w[:, j] - (codes[:, j] - zero) * scale
        w[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes, margin


def layer_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """``sum over rows (w - q) H (w - q)^T`` in float64."""
    D = W.double() - Q.double()
    return float(((D @ H.double()) * D).sum())


def obq_row(
    w: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, max_code: int, damp: float, outliers: bool = True
) -> Tensor:
    """OBQ for one row by brute force: every candidate of every step is tried with a full least-squares solve.

    The cost of fixing weight p at its nearest code is the increase of the smallest reachable loss
    ``min over free weights of (w0 - v) H (w0 - v)^T``; the cheapest p is fixed, then the free weights are
    re-solved.
    """
    Hd, w0, v = damped(H, damp), w.double(), w.double().clone()
    fixed: dict[int, float] = {}
    codes = torch.zeros_like(v)
    n = len(v)

    def resolve(values: dict[int, float]) -> Tensor:
        kept = sorted(values)
        free = [i for i in range(n) if i not in values]
        best = torch.zeros(n, dtype=torch.float64)
        for i in kept:
            best[i] = values[i]
        if free:
            d = torch.tensor([w0[i] - values[i] for i in kept], dtype=torch.float64)
            shift = (
                torch.linalg.solve(Hd[free][:, free], Hd[free][:, kept] @ d)
                if kept
                else torch.zeros(len(free))
            )
            best[free] = w0[free] + shift.double()
        return best

    for _ in range(n):
        code = nearest_code(v, scales.double(), zeros.double(), max_code)
        value = (code - zeros) * scales.double()
        free = [i for i in range(n) if i not in fixed]
        steps = {i: float((v[i] - value[i]).abs() / scales[i].abs()) for i in free}
        far = max(free, key=lambda i: steps[i])
        if outliers and steps[far] > 0.5 + 1e-6:
            p = far
        else:
            costs = {}
            for i in free:
                d = w0 - resolve({**fixed, i: float(value[i])})
                costs[i] = float(d @ Hd @ d)
            p = min(free, key=lambda i: costs[i])
        fixed[p] = float(value[p])
        codes[p] = code[p]
        v = resolve(fixed)
    return codes


def best_codes_row(
    w: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, max_code: int
) -> tuple[Tensor, float]:
    """The best codes of one tiny row and their loss, by trying all (max_code + 1)^in of them."""
    tried = torch.tensor(list(itertools.product(range(max_code + 1), repeat=len(w))), dtype=torch.float64)
    D = w.double() - (tried - zeros.double()) * scales.double()
    losses = ((D @ H.double()) * D).sum(dim=1)
    return tried[losses.argmin()], float(losses.min())


def correlated_problem(
    out_features: int, in_features: int, seed: int, tokens: int | None = None, dead: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and an H (in, in), both float32, from activations with a decaying, mixed
    spectrum."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens if tokens is not None else 4 * in_features
    spectrum = torch.logspace(0, -1.5, in_features, dtype=torch.float64)
    mix = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5
    X = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64) * spectrum @ mix
    X += 0.3 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    if dead:
        X[:, torch.randperm(in_features, generator=generator)[:dead]] = 0
    W = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5
    return W.float(), (X.t() @ X).float()


def random_quantized(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    *,
    sym: bool,
    act_order: bool,
    seed: int = 0,
) -> QuantizedWeight:
    """Random codes on a random grid; with act_order the groups are a shuffled assignment of the inputs."""
    rng = torch.Generator().manual_seed(seed)
    width = in_features if group_size == -1 else min(group_size, in_features)
    groups = -(-in_features // width)
    g_idx = (torch.arange(in_features) // width).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=rng)]
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=rng, dtype=torch.uint8)
    scales = (torch.rand((groups, out_features), generator=rng) * 0.02 + 0.002).half()
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.int32)
    if not sym:
        zeros = torch.randint(1, 1 << bits, (groups, out_features), generator=rng, dtype=torch.int32)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits)


def dequantized(q: QuantizedWeight) -> Tensor:
    """W[o, i] = scales[g_idx[i], o] * (codes[o, i] - zeros[g_idx[i], o]) in float64, element by element's
    definition."""
    group = q.g_idx.long()
    return q.scales.double().t()[:, group] * (q.codes.double() - q.zeros.double().t()[:, group])


def sweep_columns(
    W: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, max_code: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The GPTQ sweep for a given factor, one column at a time in float64 (arXiv 2210.17323, Algorithm 1).

    Returns codes, the errors ``e_j = (w_j - q_j) / U_jj`` and, for every value that was rounded, how far (in
    steps) it lay from the nearest rounding boundary; all (out, in) float64.
    """
    w, Ud = W.double().clone(), U.double()
    codes, errors, margin = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.shape[1]):
        scale, zero = scales[g_idx[j].long()].double(), zeros[g_idx[j].long()].double()
        codes[:, j] = nearest_code(w[:, j], scale, zero, max_code)
        steps = w[:, j] / scale
        margin[:, j] = ((steps - torch.floor(steps)) - 0.5).abs()
        errors[:, j] = (w[:, j] - (codes[:, j] - zero) * scale) / Ud[j, j]
        w[:, j + 1 :] -= torch.outer(errors[:, j], Ud[j, j + 1 :])
    return codes, errors, margin


def search_columns(
    W: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, max_code: int, cycles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sweep that searches windows of 128 columns and keeps the first 64, in float64, every code tried.

    Returns codes (out, in), the loss of each row ``|e|^2`` and how near (in steps) it ever came to a rounding boundary,
    all float64.
    """
    w, Ud = W.double().clone(), U.double()
    codes, loss = torch.zeros_like(w), torch.zeros(len(w), dtype=torch.float64)
    nearest = torch.full_like(loss, 0.5)
    start = 0
    while start < w.shape[1]:
        window = slice(start, min(start + 128, w.shape[1]))
        groups, own = g_idx[window].long(), Ud[window, window]
        found, _, margin = sweep_columns(w[:, window], own, scales, zeros, groups, max_code)
        nearest = torch.minimum(nearest, margin.amin(dim=1))
        zero, scale = zeros[groups].t().double(), scales[groups].t().double()
        G = torch.linalg.inv(own.t() @ own)
        for column in list(range(found.shape[1])) * cycles:
            r = (w[:, window] - (found - zero) * scale) @ G[:, column]
            steps = r / G[column, column] / scale[:, column]
            nearest = torch.minimum(nearest, ((steps - torch.floor(steps)) - 0.5).abs())
            tried = torch.arange(max_code + 1, dtype=torch.float64)
            move = (tried - found[:, column].unsqueeze(1)) * scale[:, column].unsqueeze(1)
            found[:, column] = (
                (G[column, column] * move.square() - 2 * r.unsqueeze(1) * move).argmin(dim=1).double()
            )
        end = window.stop if window.stop == w.shape[1] else start + 64
        for j in range(start, end):
            at = j - start
            error = (w[:, j] - (found[:, at] - zero[:, at]) * scale[:, at]) / Ud[j, j]
            w[:, j + 1 :] -= torch.outer(error, Ud[j, j + 1 :])
            loss += error.square()
        codes[:, start:end] = found[:, : end - start]
        start = end
    return codes, loss, nearest


def row_losses(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """``(w - q) H (w - q)^T`` of every row in float64."""
    D = W.double() - Q.double()
    return ((D @ H.double()) * D).sum(dim=1)


def least_squares_scales(W: Tensor, H: Tensor, steps: Tensor, g_idx: Tensor) -> Tensor:
    """Scales (groups, out) of least ``(w - q) H (w - q)^T`` for integer steps (out, in), by lstsq on H's root."""
    L = torch.linalg.cholesky(H.double())
    groups = int(g_idx.max()) + 1
    scales = torch.zeros(groups, len(W), dtype=torch.float64)
    for row in range(len(W)):
        columns = torch.stack([steps[row].double() * (g_idx == g) for g in range(groups)])
        scales[:, row] = torch.linalg.lstsq((columns @ L).t(), W[row].double() @ L).solution
    return scales


def corrected_weight(W: Tensor, X_orig: Tensor, X_quant: Tensor, ridge: float) -> Tensor:
    """argmin over V of ``|X_orig W^T - X_quant V^T|^2 + ridge |V - W|^2``, by lstsq on the stacked system."""
    n = W.shape[1]
    A = torch.cat([X_quant.double(), ridge**0.5 * torch.eye(n, dtype=torch.float64)])
    B = torch.cat([X_orig.double() @ W.double().t(), ridge**0.5 * W.double().t()])
    return torch.linalg.lstsq(A, B).solution.t()
