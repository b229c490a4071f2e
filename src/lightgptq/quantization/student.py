"""Student: everything that end-to-end tuning trains, with its optimizer, between checkpoint, memory and state file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.core.trainable import TrainableWeight
from lightgptq.core.types import QuantizedWeight
from lightgptq.quantization import durable
from lightgptq.quantization.stored import StoredWeights
from lightgptq.quantization.timing import stage

SAVE_SECONDS = 60.0


class Student:
    """The scales, and with ``codes`` the codes, of quantized linears as parameters of one Adam.

    stored       where the linears are read and the results written
    names        full names of the linears that are trained
    state        file of an unfinished training
    keep         whether codes stay in memory between two uses; with ``codes`` they do anyway
    codes        train positions on the code axis, too, starting from the original weights
    scale_lr, rounding_lr  first step sizes
    """

    def __init__(
        self,
        stored: StoredWeights,
        names: list[str],
        state: Path,
        *,
        keep: bool,
        codes: bool,
        scale_lr: float,
        rounding_lr: float,
    ) -> None:
        self.stored, self.state, self.keep, self.codes = stored, state, keep or codes, codes
        self.device = stored.skeleton.device
        self.step = 0
        self.start: dict[str, Tensor] = {}
        self.ratios: dict[str, nn.Parameter] = {}
        self._weights: dict[str, TrainableWeight] = {}
        self._saved, self._pause = time.perf_counter(), SAVE_SECONDS
        loaded = self._load()
        for name in names:
            if loaded is None:
                self.start[name] = stored.read(name).scales.float().to(self.device)
            ratio = torch.ones_like(self.start[name]) if loaded is None else loaded["ratios"][name]
            self.ratios[name] = nn.Parameter(ratio)
        if codes:
            for name in names:
                self._weights[name] = self._read(name, None if loaded is None else loaded["positions"][name])
        self._rates = {"scales": scale_lr, "codes": rounding_lr}
        groups = [{"params": list(self.ratios.values()), "name": "scales"}]
        if codes:
            positions = [weight.position for weight in self._weights.values()]
            groups.append({"params": positions, "name": "codes"})
        self.optimizer = torch.optim.Adam(groups, lr=scale_lr, betas=(0.9, 0.95), fused=True)
        if loaded is None:
            self.save()
        else:
            self.optimizer.load_state_dict(loaded["optimizer"])

    def weight(self, name: str) -> TrainableWeight:
        """One linear's trainable weight."""
        found = self._weights.get(name)
        if found is None:
            found = self._read(name, None)
            if self.keep:
                self._weights[name] = found
        return found

    def _read(self, name: str, position: Tensor | None) -> TrainableWeight:
        with stage("read"):
            q = self.stored.read(name)
            q.scales = self.start[name].half().cpu()  # those in the file may be results already
            original = self.stored.original(name) if self.codes and position is None else None
            weight = TrainableWeight(q, original, rounding=self.codes).to(self.device)
        weight.ratio = self.ratios[name]
        if position is not None:
            weight.position = nn.Parameter(position)
        return weight

    def update(self, progress: float) -> None:
        """One step of Adam with the gradients at hand; ``progress`` is the share of the steps that are done."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rates[group["name"]] * (1 - progress)
        self.optimizer.step()
        with torch.no_grad():
            for ratio in self.ratios.values():
                ratio.clamp_(0.1, 10.0)
        for weight in self._weights.values():
            weight.project()
        self.step += 1

    def save_now_and_then(self) -> None:
        """Save when the last time is a while ago: a minute, or more where saving takes seconds itself."""
        if time.perf_counter() - self._saved > self._pause:
            self.save()

    def save(self) -> None:
        """Write the state; a training that is killed afterwards goes on from here."""
        started = time.perf_counter()
        positions = {name: one.position.detach() for name, one in self._weights.items()} if self.codes else {}
        state = {
            "step": self.step,
            "start": self.start,
            "ratios": {name: ratio.detach() for name, ratio in self.ratios.items()},
            "positions": positions,
            "optimizer": self.optimizer.state_dict(),
        }
        durable.save(state, self.state)
        self._saved = time.perf_counter()
        self._pause = max(SAVE_SECONDS, 20 * (self._saved - started))

    def _load(self) -> dict[str, Any] | None:
        if not self.state.exists():
            return None
        state = torch.load(self.state, weights_only=True, map_location=self.device)
        self.step, self.start = state["step"], state["start"]
        return state

    def results(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """What was reached, one linear after the other, on the CPU."""
        for name in self.ratios:
            result = self.weight(name).cpu().result(self.stored.read(name))
            yield name, result
