"""What is noted of each head while heads train together."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from keras_rsft.searching.batched_step import HeadState

METRICS = ("loss", "acceptance_rate", "accepted_loss", "val_accuracy", "val_loss")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedHeads:
    """What the training of `k` heads gives.

    Attributes:
        history: For each of `METRICS` a float32 array `(k, epochs)`; NaN after the
            epoch in which a head was dropped. Without a validation split the last
            two are not there.
        kernels: Float32 array `(k, dim, classes)` of the last epoch.
        biases: Float32 array `(k, classes)`.
        best_kernels: Float32 array `(k, dim, classes)` of the best epoch.
        best_biases: Float32 array `(k, classes)`.
        best_epochs: int array `(k,)`, counted from 0.
        diverged: bool array `(k,)`: heads whose loss became NaN or infinite.
    """

    history: dict[str, np.ndarray]
    kernels: np.ndarray
    biases: np.ndarray
    best_kernels: np.ndarray
    best_biases: np.ndarray
    best_epochs: np.ndarray
    diverged: np.ndarray


class HeadNotes:
    """What is noted of each head while it trains."""

    def __init__(self, count: int, epochs: int, dim: int, classes: int):
        self._history = {
            name: np.full((count, epochs), np.nan, np.float32) for name in METRICS
        }
        self.best_values = np.full(count, -np.inf)
        self._best_epochs = np.zeros(count, int)
        self._diverged = np.zeros(count, bool)
        shapes = (count, dim, classes), (count, classes)
        self._last = tuple(np.zeros(shape, np.float32) for shape in shapes)
        self._best = tuple(np.zeros(shape, np.float32) for shape in shapes)

    def add(
        self,
        epoch: int,
        heads: np.ndarray,
        logs: dict[str, np.ndarray],
        values: np.ndarray,
        state: HeadState,
    ) -> None:
        """Notes an epoch of some heads; of equal values the earlier is the best."""
        for name, numbers in logs.items():
            self._history[name][heads, epoch] = numbers
        scored = logs.get("val_loss", logs["loss"])
        self._diverged[heads] |= ~np.isfinite(scored)
        better = np.flatnonzero(values > self.best_values[heads])
        self.best_values[heads[better]] = values[better]
        self._best_epochs[heads[better]] = epoch
        self._copy(self._best, heads[better], better, state)

    def finish(self, heads: np.ndarray, rows: np.ndarray, state: HeadState) -> None:
        """Notes the weights with which some heads, in these rows, end."""
        self._copy(self._last, heads, rows, state)

    def trained(self, *, has_validation: bool) -> TrainedHeads:
        """Returns what was noted."""
        history = {
            name: values
            for name, values in self._history.items()
            if has_validation or not name.startswith("val_")
        }
        return TrainedHeads(
            history, *self._last, *self._best, self._best_epochs, self._diverged
        )

    @staticmethod
    def _copy(
        target: tuple[np.ndarray, np.ndarray],
        heads: np.ndarray,
        rows: np.ndarray,
        state: HeadState,
    ) -> None:
        if len(heads):
            for place, values in enumerate((state.kernel, state.bias)):
                chosen = tf.gather(values, rows, axis=-1).numpy()
                target[place][heads] = np.moveaxis(chosen, -1, 0)
