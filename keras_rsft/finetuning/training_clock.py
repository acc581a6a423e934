"""How long a training took, the processes before a kill included."""

from __future__ import annotations

import time

import keras


class TrainingClock(keras.callbacks.Callback):
    """Adds up the time of the epochs, over all processes that share a training.

    It runs from when it is made, so that what prepares the first epoch counts.

    Attributes:
        seconds: Of the epochs that have ended.
    """

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        self._lap = _Lap()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.seconds += self._lap.seconds()


class _Lap:
    """A clock of this process: no number that a checkpoint would take for its own."""

    def __init__(self):
        self._from = time.perf_counter()

    def seconds(self) -> float:
        begun, self._from = self._from, time.perf_counter()
        return self._from - begun
