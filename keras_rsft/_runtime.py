"""The process: its index in a cluster, Keras's backend, and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any

from keras_rsft.config import STRATEGY_NAMES, require_known
from keras_rsft.errors import InvalidArgument

# Cluster ------------------------------------------------------------------------------

CLUSTER_VARIABLE = "TF_CONFIG"
# Seconds without progress after which a worker is given up.
DEFAULT_TIMEOUT = 600.0
_TASK_TYPES = ("chief", "worker")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Several processes, by `host:port`, and which of them this one is."""

    workers: tuple[str, ...] = ("",)
    index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.workers):
            raise InvalidArgument(
                f"The index of a worker must be in [0, {len(self.workers)}), as there "
                f"are {len(self.workers)} of them. Received: {self.index}."
            )

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def is_alone(self) -> bool:
        return len(self) == 1

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def named(self, index: int) -> str:
        address = self.workers[index]
        return f"worker {index} ({address})" if address else f"worker {index}"


def cluster_of(environment: Mapping[str, str] = os.environ) -> Cluster:
    """Returns the cluster that `TF_CONFIG` describes; without it, one of one worker."""
    text = environment.get(CLUSTER_VARIABLE, "").strip()
    if not text:
        return Cluster()
    try:
        return _cluster_in(json.loads(text))
    except ValueError as error:
        is_json = not isinstance(error, json.JSONDecodeError)
        reason = error if is_json else f"it is no JSON: {error}"
        raise InvalidArgument(
            f"{CLUSTER_VARIABLE} cannot be used: {reason}. Expected, for example, "
            '{"cluster": {"worker": ["host-a:2222", "host-b:2222"]}, "task": {"type": '
            f'"worker", "index": 0}}}}. Received: {text}'
        ) from error


def _cluster_in(config: Any) -> Cluster:
    cluster = config.get("cluster", {}) if isinstance(config, dict) else None
    if not isinstance(cluster, dict):
        raise ValueError('"cluster" must be an object of lists of addresses')
    for name, addresses in cluster.items():
        if name not in _TASK_TYPES:
            raise ValueError(
                f'"cluster" has tasks of type {name!r}; only "worker" and "chief" are '
                "used, as there are no parameter servers"
            )
        is_list = isinstance(addresses, list) and addresses
        if not is_list or not all(isinstance(one, str) and one for one in addresses):
            raise ValueError(f'"cluster"."{name}" must be a list of "host:port"')
    chiefs, workers = (cluster.get(name, []) for name in _TASK_TYPES)
    if len(chiefs) > 1:
        raise ValueError("there may be one chief")
    every = (*chiefs, *workers)
    if len(set(every)) < len(every):
        raise ValueError("two tasks have the same address")
    if not every:
        return Cluster()
    task = config.get("task")
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise ValueError('"task" must have "type" and "index"')
    kind, index = task["type"], task["index"]
    if isinstance(index, str) and index.isascii() and index.isdigit():
        index = int(index)  # As shell scripts often have it.
    if kind not in cluster:
        raise ValueError(f'"task"."type" is {kind!r}, which is not in "cluster"')
    count = len(cluster[kind])
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise ValueError(
            f'"task"."index" must be in [0, {count}), as there are {count} of type '
            f"{kind!r}; it is {index!r}"
        )
    return Cluster(every, index + len(chiefs) if kind == "worker" else index)


def check_strategy(name: str, environment: Mapping[str, str] = os.environ) -> Cluster:
    """Returns the processes that train together: several for `multiworker` alone."""
    require_known("strategy", name, STRATEGY_NAMES)
    if name != "multiworker":
        return Cluster()
    if not environment.get(CLUSTER_VARIABLE, "").strip():
        raise InvalidArgument(
            f"The strategy multiworker needs the variable {CLUSTER_VARIABLE}, which "
            "names all workers and says which one this is. Received: none."
        )
    return cluster_of(environment)


# Keras Tuner's own variables of a search by several processes.
TUNER_ID = "KERASTUNER_TUNER_ID"
ORACLE_HOST = "KERASTUNER_ORACLE_IP"
ORACLE_PORT = "KERASTUNER_ORACLE_PORT"
# Tells a worker which process started it, and that it must not outlive it.
PARENT = "KERAS_RSFT_PARENT"


def part_in_search(given: Mapping[str, str] = os.environ) -> str:
    """Returns `"alone"`, `"chief"` or `"worker"`, as Keras Tuner's variables say."""
    if ORACLE_HOST not in given and ORACLE_PORT not in given:
        return "alone"
    names = (ORACLE_HOST, ORACLE_PORT, TUNER_ID)
    if missing := [name for name in names if not given.get(name)]:
        raise InvalidArgument(
            f"A search by chief and workers needs {', '.join(names)}, and the "
            f"environment does not set {' and '.join(missing)}. Set all or none."
        )
    port = given[ORACLE_PORT]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InvalidArgument(
            f"{ORACLE_PORT} must be a port, from 1 to 65535. Received: {port!r}."
        )
    return "chief" if "chief" in given[TUNER_ID] else "worker"


# Keras's backend ----------------------------------------------------------------------


def require_tensorflow_backend(what: str) -> None:
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise InvalidArgument(
            f"{what} needs Keras's TensorFlow backend. Received: {backend}. Set "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        )


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Imports a module that one of this package's extras brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{user} needs the package {module.partition('.')[0]}. Install it with: "
            f'pip install "keras_rsft[{extra}]".'
        ) from error


# Imports ------------------------------------------------------------------------------

# Keras and TensorFlow import them where they are installed, to wrap what a user might
# hand over: two fifths of their start-up, and the command line hands nothing over.
_WRAPPED = frozenset({"IPython", "jax", "matplotlib", "pandas", "scipy", "sklearn"})


class _LeaveOutWrapped:
    """A finder for which Keras and TensorFlow, and nobody else, lack these packages."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name not in _WRAPPED:
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        importer = "" if frame is None else frame.f_globals.get("__name__", "")
        if importer.partition(".")[0] in ("keras", "tensorflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Imports Keras and TensorFlow without the packages that they only wrap."""
    thresholds = gc.get_threshold()
    gc.set_threshold(10_000)  # Millions of objects are made that stay.
    sys.meta_path.insert(0, _LeaveOutWrapped)
    try:
        yield
    finally:
        sys.meta_path.remove(_LeaveOutWrapped)
        gc.set_threshold(*thresholds)


# Signals ------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); raised where Ctrl-C would be."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` while the context is open."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    hook = sys.unraisablehook

    def report(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            terminated = issubclass(dropped.exc_type, Terminated)
            _send_again(signal.SIGTERM if terminated else signal.SIGINT)
        else:
            hook(dropped)

    sys.unraisablehook = report
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _heard.clear()
    threading.Thread(target=_end_if_stuck, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        os.close(writer)
        _heard.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


# How long what runs in a library may go on after the process was asked to end.
SECONDS_TO_END = 30.0
_heard = threading.Event()


def _end_if_stuck(reader: int) -> None:
    """Ends the process where the main thread never gets to hear of a signal."""
    # Handlers run between two steps of Python: a graph that runs without end, or waits
    # for what never comes, would keep them off.
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                if not _heard.wait(SECONDS_TO_END):
                    os._exit(128 + number[0])
                _heard.clear()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _heard.set()
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # There an exception would be lost.
            _send_again(number)
            return
        frame = frame.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _send_again(number: int) -> None:
    """Sends this process a signal once more, a little later."""
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
