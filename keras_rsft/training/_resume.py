"""Resumes a training that was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np

from keras_rsft import _storage
from keras_rsft._ledger import RejectionLedger
from keras_rsft._storage import run_identity
from keras_rsft.data._samples import SampleData
from keras_rsft.training._devices import ONE_DEVICE, Devices

# Least time between two states, in seconds and as a multiple of the time that writing
# takes: a kill loses little, and writing costs little.
SECONDS_BETWEEN = 10.0
TIMES_ITS_COST = 50.0
# Names in the file: of what is JSON, and of arrays in the memory of callbacks.
_DESCRIPTION, _ARRAY = "description", "array/"


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
    _recorder: RejectionLedger

    def __init__(self, path: Path, *, devices: Devices = ONE_DEVICE):
        super().__init__()
        self._devices = devices
        self._path = path
        self._others: Sequence[keras.callbacks.Callback] = ()
        self._belongs_to: Any = None
        self._restored: TrainingState | None = None
        self._latest: TrainingState | None = None
        self._on_disk: TrainingState | None = None
        self._written_at, self._cost = time.monotonic(), 0.0
        self.history: dict[str, list[float]] = {}

    @property
    def epochs_done(self) -> int:
        return 0 if self._latest is None else self._latest.epochs_done

    @property
    def stopped(self) -> bool:
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
        if self._devices.cluster.is_alone:
            state = read_state(self._path)
        else:
            content = b""
            if self._devices.is_chief and self._path.exists():
                content = _storage.bytes_of(self._path)
            state = read_state(io.BytesIO(self._devices.from_chief(content)))
        if state is not None and state.belongs_to == self._belongs_to:
            self._restored = self._latest = self._on_disk = state
            self.history = {name: list(row) for name, row in state.history.items()}

    def on_train_begin(self, logs: dict | None = None) -> None:
        if (state := self._restored) is not None:
            for number, variable in enumerate(self._variables()):
                variable.assign(state.arrays[f"variable/{number}"])
            ledger = {
                name.removeprefix("ledger/"): array
                for name, array in state.arrays.items()
                if name.startswith("ledger/")
            }
            self._recorder.restore(ledger)
            for callback, remembered in zip(self._others, state.callbacks, strict=True):
                vars(callback).update(remembered)
        self._restored = None
        self._written_at = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        arrays = {
            f"variable/{number}": np.array(variable.numpy())
            for number, variable in enumerate(self._variables())
        }
        ledger = self._recorder.state()
        self._latest = TrainingState(
            belongs_to=self._belongs_to,
            epochs_done=epoch + 1,
            stopped=bool(self.model.stop_training),
            history={name: list(row) for name, row in self.history.items()},
            callbacks=[memory_of(callback) for callback in self._others],
            arrays=arrays | {f"ledger/{name}": ledger[name] for name in ledger},
        )
        waited = time.monotonic() - self._written_at
        if waited >= max(SECONDS_BETWEEN, TIMES_ITS_COST * self._cost):
            self.flush()

    def flush(self) -> None:
        """Writes the state of the last whole epoch, if it is not on disk yet."""
        state, started = self._latest, time.monotonic()
        if state is None or state is self._on_disk or not self._devices.is_chief:
            return
        _storage.replaced(self._path, lambda beside: write_state(beside, state))
        self._on_disk, self._written_at = state, time.monotonic()
        self._cost = self._written_at - started

    def _variables(self) -> list[Any]:
        """Returns all that an epoch hands to the next: metrics begin anew in each."""
        metrics = {id(variable) for variable in self.model.metrics_variables}
        own = [v for v in self.model.variables if id(v) not in metrics]
        return [*own, *self.model.optimizer.variables]


def write_state(path: Path, state: TrainingState) -> None:
    arrays: dict[str, Any] = dict(state.arrays)

    def named(value: np.ndarray) -> dict[str, str]:
        name = f"{_ARRAY}{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}

    described = {**vars(state)}
    del described["arrays"]
    text = json.dumps(described, default=named).encode()
    arrays[_DESCRIPTION] = np.frombuffer(text, np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


# Of NumPy, of zip files, and of JSON.
_DAMAGES = (
    OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error,
    struct.error, MemoryError, RecursionError, NotImplementedError, RuntimeError,
)  # fmt: skip


def read_state(file: Path | BinaryIO) -> TrainingState | None:
    """Reads a state, or None where there is none or it is damaged."""
    with contextlib.suppress(*_DAMAGES):
        if isinstance(file, Path):
            with _storage.open_regular(file) as opened:
                return read_state(opened)
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        described = json.loads(
            arrays.pop(_DESCRIPTION).tobytes(),
            object_hook=lambda one: (
                arrays[one[_ARRAY]] if set(one) == {_ARRAY} else one
            ),
        )
        return TrainingState(**described, arrays=arrays)
    return None


# --- What a callback remembers -----------------------------------------------------


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


def _plain_attributes(callback: keras.callbacks.Callback) -> dict[str, Any]:
    attributes = vars(callback).items()
    return {name: _copied(value) for name, value in attributes if _is_plain(value)}


def _parameters(kind: type) -> set[str]:
    constructors = (vars(base).get("__init__") for base in kind.__mro__)
    return {
        name
        for constructor in constructors
        if constructor is not None
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


def identity_of_run(data: SampleData, callbacks: Any, **choices: Any) -> dict[str, Any]:
    samples: list[bytes] = []
    for split in (data.train, data.validation, data.test):
        samples.append("\n".join(split.ids.tolist()).encode())
        # A reviewed label is accepted whatever the policy says.
        for values in (split.labels, split.clean_labels, split.reviewed):
            samples.append(b"-" if values is None else b"+")
            if values is not None:
                samples.append(np.ascontiguousarray(values).tobytes())
    if data.fingerprint is not None:  # Rows of another array have the same ids.
        samples.append(data.fingerprint.encode())
    if callable(callbacks):
        made: Any = f"{callbacks.__module__}.{callbacks.__qualname__}"
    else:
        made = [options_of(callback) for callback in callbacks]
    return run_identity(
        data.source, data.class_names, samples, callbacks=made, **choices
    )


class TrainingClock(keras.callbacks.Callback):
    """Adds up the seconds of the epochs, those before a kill included."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        # A tuple, which is not taken for the callback's memory.
        self._since = (time.perf_counter(),)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since[0]
        self._since = (now,)
