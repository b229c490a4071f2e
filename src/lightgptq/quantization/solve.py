"""GroupSolver: from a group's Hessian to quantized weights in the block and packed tensors in the checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from lightgptq.checkpoint.packing import pack
from lightgptq.core.grid import check_weight, fit_grid
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.mismatch import Correction
from lightgptq.core.obq import obq
from lightgptq.core.rtn import rtn
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import gptq_stacked
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError
from lightgptq.quantization.passes import GroupInputs
from lightgptq.quantization.plan import QuantPlan, packed_name
from lightgptq.quantization.report import ModuleRecord
from lightgptq.quantization.timing import stage
from lightgptq.quantization.together import Stacked, solve_together
from lightgptq.quantization.transfer import host_copy
from lightgptq.quantization.writeback import AT_ONCE, WriteBack
from lightgptq.skeleton import ModelSkeleton

ENERGY_ROWS = 256
# That linears may have together to be solved as one on a CPU: 16 MiB in float32, beside which calls from Python cost.
STACKED_WEIGHTS = 1 << 22
Group = tuple[dict[str, nn.Linear], GroupInputs]  # full name -> module, and what is known of their input


class TensorSink(Protocol):
    """Where packed tensors go."""

    def write(self, name: str, tensor: Tensor) -> None: ...


class GroupSolver:
    """Quantizes linears with the methods of their schemes and keeps a record of each.

    sink    takes the packed tensors
    strict  raise QuantizationError at the first module that is not solved as asked
    notify  called with each record as it is made
    writeback  where linears are packed and written
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        plan: QuantPlan,
        sink: TensorSink,
        *,
        strict: bool = False,
        notify: Callable[[ModuleRecord], None] = lambda record: None,
        writeback: WriteBack = AT_ONCE,
    ) -> None:
        self.skeleton, self.plan, self.sink, self.writeback = skeleton, plan, sink, writeback
        self.strict, self.notify = strict, notify
        self.records: list[ModuleRecord] = []
        self.held: dict[str, QuantizedWeight] = {}  # those that are tuned before they are written

    def solve(self, linears: dict[str, nn.Linear], inputs: GroupInputs) -> None:
        """Quantize linears that share one input, put the dequantized weights back and write the packed ones.

        linears  full name -> module with its weight materialised
        inputs   what is known of their input
        """
        wanted = {name: self.plan.schemes[name] for name in linears}
        H, tokens, problem = self._known(linears, inputs)
        factors: dict[tuple[object, ...], HessianFactor] = {}
        corrections: dict[tuple[object, ...], Correction] = {}
        for names in _together(linears, wanted):
            scheme, trouble = wanted[names[0]], problem
            key = (scheme.damp, scheme.act_order, scheme.by_groups and scheme.group_size)
            factor: HessianFactor | None = None
            weights = [self._weight(name, linears[name]) for name in names]
            if scheme.method != "rtn" and H is not None:
                try:
                    with stage("factor"):
                        factor = factors[key] = factors.get(key) or HessianFactor.build(H, scheme)
                except QuantizationError as error:
                    trouble = str(error)
            energies = [_energy(W, H) for W in weights]
            if factor is not None and inputs.mismatch is not None and scheme.mismatch > 0:
                with stage("sweep"):
                    rows = sum(module.out_features for module in linears.values())
                    followed = None if inputs.followed is None else inputs.followed.H
                    correction = corrections[key] = corrections.get(key) or Correction(
                        inputs.mismatch.finish(),
                        factor,
                        rows,
                        followed,
                        weighted=inputs.mismatch.W is not None,
                    )
                    weights = [correction.target(W, scheme.mismatch) for W in weights]
            solved = _solve(names, weights, scheme, H, factor)
            for name, quantized, energy in zip(names, solved, energies, strict=True):
                self._record(name, scheme, quantized, factor, tokens, energy, trouble)
                self._put(name, linears[name], quantized)

    def solve_together(self, groups: list[Group]) -> None:
        """`solve` for many groups: those that agree in shape and scheme as one batch, the others one by one.

        Records, notes and written tensors come in the order of ``groups``.
        """
        known = [self._known(*group) for group in groups]
        energies, batch = {}, {}
        for at, stacked in self._alike(groups, [H for H, _, _ in known]).items():
            energies[at] = [_energy(W, stacked.H) for W in stacked.W.split(stacked.parts)]
            batch[at] = stacked
        results = (
            dict(zip(batch, solve_together(list(batch.values())), strict=True)) if len(batch) > 1 else {}
        )
        for at, (linears, inputs) in enumerate(groups):
            solved, (_, tokens, problem) = results.get(at), known[at]
            if solved is None:
                self.solve(linears, inputs)
                continue
            for name, quantized, energy in zip(linears, solved[1], energies[at], strict=True):
                self._record(name, batch[at].scheme, quantized, solved[0], tokens, energy, problem)
                self._put(name, linears[name], quantized)

    def _alike(self, groups: list[Group], hessians: list[Tensor | None]) -> dict[int, Stacked]:
        """Most of the groups, by their place: those that can be solved as one batch."""
        found: dict[int, Stacked] = {}
        for at, ((linears, inputs), H) in enumerate(zip(groups, hessians, strict=True)):
            schemes = {self.plan.schemes[name] for name in linears}
            scheme = next(iter(schemes))
            weighted = inputs.mismatch is not None and inputs.mismatch.W is not None
            stackable = scheme.method == "gptq" and scheme.static_groups and not weighted
            if len(schemes) == 1 and stackable and H is not None:
                W = torch.cat([self._weight(name, module) for name, module in linears.items()])
                M = inputs.mismatch.finish() if inputs.mismatch is not None and scheme.mismatch > 0 else None
                parts = tuple(module.out_features for module in linears.values())
                followed = inputs.followed.H if M is not None and inputs.followed is not None else None
                found[at] = Stacked(W, parts, H, M, scheme, followed)
        kinds = Counter(one.alike for one in found.values()).most_common(1)
        return {at: one for at, one in found.items() if one.alike == kinds[0][0]}

    def _known(
        self, linears: dict[str, nn.Linear], inputs: GroupInputs
    ) -> tuple[Tensor | None, int, str | None]:
        """H, the tokens in it, and what keeps the group from being solved as asked."""
        needs_hessian = any(self.plan.schemes[name].method != "rtn" for name in linears)
        tokens = inputs.hessian.tokens if inputs.hessian is not None else 0
        problem = inputs.problem
        if needs_hessian and problem is None:
            problem = self._too_few(tokens, linears)
        with stage("hessian"):
            H = inputs.hessian.finish() if inputs.hessian is not None and tokens else None
        return H, tokens, problem

    def _too_few(self, tokens: int, linears: dict[str, nn.Linear]) -> str | None:
        name, module = next(iter(linears.items()))
        inside_expert = any(name.startswith(f"{path}.") for path in self.skeleton.experts)
        remedy = "; give more samples or --moe-all-experts" if inside_expert else ""
        if tokens == 0:
            return f"no calibration token reached it{remedy}"
        if tokens < module.in_features:
            few = f"{tokens} calibration tokens are fewer than its {module.in_features} inputs"
            return f"{few}: its Hessian is incomplete{remedy}"
        return None

    def note_late(self, names: Collection[str], tokens: int) -> None:
        """Report that ``tokens`` calibration tokens reached these linears only when they were quantized already."""
        late = f"{tokens} calibration tokens came too late to count"
        for i, record in enumerate(self.records):
            if record.name in names:
                self.records[i] = replace(
                    record, problem=f"{record.problem}; {late}" if record.problem else late
                )
                if self.strict:
                    raise _strict_error(self.records[i])

    def _weight(self, name: str, module: nn.Linear) -> Tensor:
        """The weight (out, in) in float32, from the source itself where the block holds a rounded copy."""
        source = self.skeleton.sources[f"{name}.weight"]
        if source.dtype(self.skeleton.reader) == module.weight.dtype:
            return module.weight.detach().float()
        return source.read(self.skeleton.reader).to(module.weight.device, torch.float32)

    def _record(
        self,
        name: str,
        scheme: QuantScheme,
        quantized: QuantizedWeight,
        factor: HessianFactor | None,
        tokens: int,
        energy: float,
        problem: str | None,
    ) -> None:
        method = scheme.method if factor is not None else "rtn"
        if scheme.method != method:
            problem = f"{problem or 'no Hessian'}; rounded to nearest instead"
        loss = quantized.loss / tokens if tokens and not math.isnan(quantized.loss) else None
        record = ModuleRecord(
            name=name,
            bits=scheme.bits,
            group_size=scheme.group_size,
            method=method,
            loss=loss,
            relative_loss=loss * tokens / energy if loss is not None and energy > 0 else None,
            damp=factor.damp if factor is not None else None,
            tokens=tokens,
            problem=problem,
        )
        self.records.append(record)
        self.notify(record)
        if self.strict and problem is not None:
            raise _strict_error(record)

    def _put(self, name: str, module: nn.Linear, quantized: QuantizedWeight) -> None:
        module.weight.data.copy_(quantized.dequantize())
        if self.plan.schemes[name].tune:
            self.held[name] = quantized
        else:
            self._write(name, quantized)

    def replace_held(self, linears: dict[str, nn.Linear], tuned: dict[str, QuantizedWeight]) -> None:
        """Put tuned weights into the block and write them; both by full names."""
        for name, quantized in tuned.items():
            del self.held[name]
            linears[name].weight.data.copy_(quantized.dequantize())
            self._write(name, quantized)

    def original(self, name: str) -> Tensor:
        """The weight (out, in) in float32 as it was before it was solved."""
        value = self.skeleton.sources[f"{name}.weight"].read(self.skeleton.reader)
        return value.to(self.skeleton.device, torch.float32)

    def _write(self, name: str, quantized: QuantizedWeight) -> None:
        fields = (quantized.codes, quantized.scales, quantized.zeros, quantized.g_idx)
        copies = [host_copy(field) for field in fields]
        out, bits = packed_name(self.skeleton, name), quantized.bits

        def write() -> None:
            with stage("pack"):
                codes, scales, zeros, g_idx = (copy() for copy in copies)
                on_host = QuantizedWeight(codes, scales, zeros, g_idx, bits)
                packed = pack(on_host, self.plan.config.checkpoint_format)
            with stage("write"):
                for suffix, tensor in packed.tensors().items():
                    self.sink.write(f"{out}.{suffix}", tensor)

        self.writeback.submit(write, quantized.codes.nbytes)


def _strict_error(record: ModuleRecord) -> QuantizationError:
    return QuantizationError(f"{record.name}: {record.problem}; nothing was published because of --strict")


def _together(linears: dict[str, nn.Linear], schemes: dict[str, QuantScheme]) -> list[list[str]]:
    """Names that are solved as one weight: neighbours of one scheme on a GPU; elsewhere only small ones, for memory."""
    result: list[list[str]] = []
    weights = 0
    for name, module in linears.items():
        weights += module.weight.numel()
        alike = bool(result) and schemes[result[-1][0]] == schemes[name] and schemes[name].method == "gptq"
        if alike and (module.weight.is_cuda or weights <= STACKED_WEIGHTS):
            result[-1].append(name)
        else:
            result.append([name])
            weights = module.weight.numel()
    return result


def _solve(
    names: list[str],
    weights: list[Tensor],
    scheme: QuantScheme,
    H: Tensor | None,
    factor: HessianFactor | None,
) -> list[QuantizedWeight]:
    for name, W in zip(names, weights, strict=True):
        try:
            check_weight(W)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
    try:
        if factor is None or H is None:
            return [rtn(W, scheme, H) for W in weights]
        if scheme.method == "obq":
            return [obq(W, H, scheme, factor=factor) for W in weights]
        grid = None
        if scheme.static_groups:
            with stage("grid"):
                stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
                grid = fit_grid(stacked, scheme, factor.importance())
                del stacked
        with stage("sweep"):
            return gptq_stacked(weights, factor, scheme, H=H if scheme.refine else None, grid=grid)
    except QuantizationError as error:
        raise QuantizationError(f"{' and '.join(names)}: {error}") from error


def _energy(W: Tensor, H: Tensor | None) -> float:
    """``sum over rows w H w^T``, what the layer puts out: the scale of its loss.

    Taken from at most 256 rows spread over W, since all of them would cost as much as the sweep itself.
    """
    if H is None:
        return float("nan")
    rows = W[:: max(1, -(-W.shape[0] // ENERGY_ROWS))]
    return float(((rows @ H) * rows).sum(dtype=torch.float64)) * W.shape[0] / rows.shape[0]
