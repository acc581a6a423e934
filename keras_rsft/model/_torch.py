"""The training step under PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keras_rsft.model._step import Change, Pass, SymbolicBuild, unpack, unselected


class TorchStep(SymbolicBuild):
    def train_step(self, data: Any) -> dict[str, Any]:
        # A layer without a seed draws from PyTorch's own generators.
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._generators_before = torch.get_rng_state(), devices
        with torch.no_grad():  # But for what `recorded` runs.
            return self.train_on(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        return unselected(super().test_step(unpack(data)[:3]))

    def reject(self, whole: Pass) -> None:
        super().reject(whole)
        cpu, devices = self._generators_before
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(devices)

    def recorded(self, score: Callable[[], Pass]) -> Pass:
        with torch.enable_grad():
            return score()

    def gradients(self, recorded: Pass, seeds: list[Any]) -> list[Any]:
        values = [variable.value for variable in self.trainable_variables]
        reaching = [
            (target, seed)
            for target, seed in zip(recorded.targets(), seeds, strict=True)
            if target.requires_grad
        ]
        if not reaching:
            return [None] * len(values)
        targets, given = zip(*reaching, strict=True)
        return torch.autograd.grad(targets, values, given, allow_unused=True)

    def branch(
        self, condition: Any, accepted: Change, otherwise: Change, rare: bool = False
    ) -> Any:
        return (accepted if condition else otherwise)()
