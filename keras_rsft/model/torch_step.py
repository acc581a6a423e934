"""The training step under PyTorch: autograd, and branches taken in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keras_rsft.model.batch import unpack
from keras_rsft.model.recorded_pass import Pass
from keras_rsft.model.selection import SELECTION_METRICS
from keras_rsft.model.symbolic_build import SymbolicBuild
from keras_rsft.model.training_step import Batch, TrainingStep


class TorchStep(SymbolicBuild, TrainingStep):
    """`TrainingStep` for Keras's PyTorch backend."""

    def train_step(self, data: Any) -> dict[str, Any]:
        with torch.no_grad():  # But for what `recorded` runs.
            return self.train_on(unpack(data))

    def test_step(self, data: Any) -> dict[str, Any]:
        logs = super().test_step(unpack(data)[:3])
        return {k: v for k, v in logs.items() if k not in SELECTION_METRICS}

    def train_on(self, batch: Batch) -> dict[str, Any]:
        # A layer without a seed draws from PyTorch's own generators.
        self._generators_before = _generator_states()
        return super().train_on(batch)

    def reject(self, recorded: Pass) -> None:
        super().reject(recorded)
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
        targets, seeds = zip(*reaching, strict=True)
        return torch.autograd.grad(targets, values, seeds, allow_unused=True)

    def branch(
        self,
        condition: Any,
        when_true: Callable[[], None],
        when_false: Callable[[], None],
        *,
        rare: bool = False,
    ) -> None:
        (when_true if condition else when_false)()


def _generator_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the states of the generators of the CPU and of each GPU in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices
