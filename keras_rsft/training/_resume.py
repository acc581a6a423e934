"""Resumes a training that was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np

from keras_rsft import _storage
from keras_rsft._ledger import RejectionLedger
from keras_rsft.data._samples import SampleData
from keras_rsft.training._devices import ONE_DEVICE, Devices

# Least time between two states, in seconds and as a multiple of the time that writing
# takes: a kill loses little, and writing costs little.
SECONDS_BETWEEN = 10.0
TIMES_ITS_COST = 50.0
_DESCRIPTION = "description"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState:
    """What the end of an epoch leaves, with the variables and the ledger by name."""

    belongs_to: Any
    epochs_done: int
    stopped: bool
    history: dict[str, list[float]]
    callbacks: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]


class TrainingCheckpoint(keras.callbacks.Callback):
    """Keeps the state of a training in a file, and resumes from it."""

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
        """Finished epochs, those of an earlier process included."""
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
        """Reads the state of this training, and the memory of its callbacks."""
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
        _storage.replaced(self._path, lambda beside: write_state(beside, state))
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


# --- What a callback remembers -----------------------------------------------------

_ARRAY = "array"


def memory_of(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns what a callback has learnt: plain attributes that are no options."""
    options = _parameters(type(callback))
    return {n: v for n, v in _plain_attributes(callback).items() if n not in options}


def options_of(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns the class and plain options of a callback that was not used yet."""
    options = _parameters(type(callback))
    attributes = sorted(_plain_attributes(callback).items())
    return {
        "class": type(callback).__qualname__,
        "options": {name: repr(v) for name, v in attributes if name in options},
    }


def callbacks_identity(callbacks: Any) -> Any:
    """Returns the identity of callbacks, or of a function that makes them."""
    if callable(callbacks):
        return f"{callbacks.__module__}.{callbacks.__qualname__}"
    return [options_of(callback) for callback in callbacks]


def encoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Returns plain values as JSON can hold them, and adds their arrays to `arrays`."""
    if isinstance(value, dict):
        return {name: encoded(item, arrays) for name, item in value.items()}
    if isinstance(value, list):
        return [encoded(item, arrays) for item in value]
    if isinstance(value, np.ndarray):
        name = f"{_ARRAY}/{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    return value


def decoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Returns what `encoded` was given."""
    if isinstance(value, list):
        return [decoded(item, arrays) for item in value]
    if isinstance(value, dict) and set(value) == {_ARRAY}:
        return arrays[value[_ARRAY]]
    if isinstance(value, dict):
        return {name: decoded(item, arrays) for name, item in value.items()}
    return value


def _plain_attributes(callback: keras.callbacks.Callback) -> dict[str, Any]:
    attributes = vars(callback).items()
    return {name: _copied(value) for name, value in attributes if _is_plain(value)}


def _parameters(kind: type) -> set[str]:
    constructors = (base.__init__ for base in kind.__mro__ if "__init__" in vars(base))
    return {
        name
        for constructor in constructors
        for name in inspect.signature(constructor).parameters
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufSU"
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return np.array(value)  # A scalar too keeps its type and its empty shape.
    return value


def run_identity(data: SampleData, **choices: Any) -> dict[str, Any]:
    """Returns what two runs on the same data must share to be the same run."""

    def samples() -> Iterator[bytes]:
        for split in (data.train, data.validation, data.test):
            yield "\n".join(split.ids.tolist()).encode()
            # What was reviewed is accepted whatever the policy says.
            for values in (split.labels, split.clean_labels, split.reviewed):
                yield b"-" if values is None else b"+"
                if values is not None:
                    yield np.ascontiguousarray(values).tobytes()

    return _storage.run_identity(data.source, data.class_names, samples(), **choices)


class TrainingClock(keras.callbacks.Callback):
    """Adds up the seconds of the epochs, those before a kill included."""

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
