"""The state of a head's training on disk, so that a killed run goes on.

Goes on to the last bit: beside the weights there are the optimizer's slots, the
policy's numbers, the ledger, the history and what the callbacks remember, and the
order of the samples depends on the seed and the epoch's number alone. A state is that
of the end of an epoch. Plain arrays and JSON, nothing that is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np

from keras_rsft.finetuning.callback_memory import decoded, encoded, memory_of
from keras_rsft.finetuning.devices import ONE_DEVICE, Devices
from keras_rsft.ledger import RejectionLedger
from keras_rsft.result_folder import replaced

# A state is written when so many seconds have passed since the last one, or so many
# times the time that writing took: what a kill loses stays small, and so does the cost.
SECONDS_BETWEEN = 10.0
TIMES_ITS_COST = 50.0
_DESCRIPTION = "description"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState:
    """What the end of an epoch leaves.

    Attributes:
        belongs_to: What it must be used with, as JSON can hold it.
        epochs_done: Number of finished epochs, at least 1.
        stopped: True where a callback ended the training in that epoch.
        history: Each logged value, one number an epoch.
        callbacks: What each of the user's callbacks remembers.
        arrays: Values of the variables and of the ledger by name.
    """

    belongs_to: Any
    epochs_done: int
    stopped: bool
    history: dict[str, list[float]]
    callbacks: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]


class TrainingCheckpoint(keras.callbacks.Callback):
    """Keeps the state of a training in a file, and begins where the file ends.

    Goes last among the callbacks, so that it sees and restores what the others have
    done.

    Args:
        path: The file; its folder must exist.
        seconds_between: Least time between two states on disk. Default 10.
        devices: What is trained on. The chief of several workers keeps the file, and
            tells the others what is in it. Default: one device.

    Attributes:
        epochs_done: Finished epochs, those of an earlier process included.
        stopped: True where a callback ended the training.
        history: Each logged value, one number for each of these epochs.
    """

    def __init__(
        self,
        path: Path,
        *,
        seconds_between: float = SECONDS_BETWEEN,
        devices: Devices = ONE_DEVICE,
    ):
        super().__init__()
        self._devices = devices
        self._path = path
        self._seconds_between = seconds_between
        self._recorder: RejectionLedger | None = None
        self._others: Sequence[keras.callbacks.Callback] = ()
        self._belongs_to: Any = None
        self._restored: TrainingState | None = None
        self._latest: TrainingState | None = None
        self._on_disk: TrainingState | None = None
        self._written_at, self._cost = time.monotonic(), 0.0
        self.history: dict[str, list[float]] = {}

    @property
    def epochs_done(self) -> int:
        """Finished epochs."""
        return 0 if self._latest is None else self._latest.epochs_done

    @property
    def stopped(self) -> bool:
        """Whether a callback ended the training."""
        return self._latest is not None and self._latest.stopped

    def open(
        self,
        belongs_to: Any,
        recorder: RejectionLedger,
        others: Sequence[keras.callbacks.Callback],
    ) -> None:
        """Says what is trained, and reads the state of it if there is one.

        Args:
            belongs_to: What a state must be of to be gone on with, as JSON.
            recorder: The ledger's callback.
            others: The user's callbacks, whose memory is part of the state.
        """
        self._belongs_to = json.loads(json.dumps(belongs_to))
        self._recorder, self._others = recorder, others
        state = self._kept_state()
        if state is not None and state.belongs_to == self._belongs_to:
            self._restored = self._latest = self._on_disk = state
            self.history = {name: list(row) for name, row in state.history.items()}

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self._restored is not None:
            self._restore(self._restored)
        self._restored = None
        self._written_at = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        self._latest = self._state(epoch + 1)
        waited = time.monotonic() - self._written_at
        if waited >= max(self._seconds_between, TIMES_ITS_COST * self._cost):
            self.flush()

    def flush(self) -> None:
        """Writes the state of the last whole epoch, if it is not on disk yet."""
        if self._latest is None or self._latest is self._on_disk:
            return
        if not self._devices.is_chief:
            return
        state, started = self._latest, time.monotonic()
        replaced(self._path, lambda beside: write_state(beside, state))
        self._on_disk, self._written_at = state, time.monotonic()
        self._cost = self._written_at - started

    def _kept_state(self) -> TrainingState | None:
        if self._devices.cluster.is_alone:
            return read_state(self._path)
        kept = b""
        if self._devices.is_chief and self._path.exists():
            kept = self._path.read_bytes()
        return read_state(io.BytesIO(self._devices.from_chief(kept)))

    def _state(self, epochs_done: int) -> TrainingState:
        arrays = {
            f"variable/{number}": np.array(variable.numpy())
            for number, variable in enumerate(self._variables())
        }
        arrays |= {
            f"ledger/{name}": value for name, value in self._recorder.state().items()
        }
        return TrainingState(
            belongs_to=self._belongs_to,
            epochs_done=epochs_done,
            stopped=bool(self.model.stop_training),
            history={name: list(row) for name, row in self.history.items()},
            callbacks=[memory_of(callback) for callback in self._others],
            arrays=arrays,
        )

    def _restore(self, state: TrainingState) -> None:
        for number, variable in enumerate(self._variables()):
            variable.assign(state.arrays[f"variable/{number}"])
        prefix = "ledger/"
        self._recorder.restore(
            {
                name.removeprefix(prefix): value
                for name, value in state.arrays.items()
                if name.startswith(prefix)
            }
        )
        for callback, remembered in zip(self._others, state.callbacks, strict=True):
            vars(callback).update(remembered)

    def _variables(self) -> list[Any]:
        """Returns all that an epoch hands to the next: metrics begin anew in each."""
        metrics = {id(variable) for variable in self.model.metrics_variables}
        own = [v for v in self.model.variables if id(v) not in metrics]
        return [*own, *self.model.optimizer.variables]


def write_state(path: Path, state: TrainingState) -> None:
    """Writes a state as one `.npz` file at exactly this path."""
    arrays = dict(state.arrays)
    description = {
        "belongs_to": state.belongs_to,
        "epochs_done": state.epochs_done,
        "stopped": state.stopped,
        "history": state.history,
        "callbacks": encoded(state.callbacks, arrays),
    }
    text = json.dumps(description).encode()
    arrays[_DESCRIPTION] = np.frombuffer(text, np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def read_state(file: Path | BinaryIO) -> TrainingState | None:
    """Reads a state, or None where there is none or it is damaged."""
    damages = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
    with contextlib.suppress(*damages):
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        description = json.loads(arrays.pop(_DESCRIPTION).tobytes())
        callbacks = decoded(description.pop("callbacks"), arrays)
        return TrainingState(**description, callbacks=callbacks, arrays=arrays)
    return None
