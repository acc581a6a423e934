"""Runs the forward pass of a backbone on the fastest engine that is installed.

TensorFlow's graph is converted to ONNX once, beside the cached features, and compared
with TensorFlow on the user's own samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._storage import (
    bytes_of,
    locked,
    make_folder,
    read_json,
    replaced,
    write_json,
)
from keras_rsft.backbones._build import first_line
from keras_rsft.backbones._foreign import to_onnx
from keras_rsft.config import missing_packages
from keras_rsft.errors import DataError

Forward = Callable[[np.ndarray], np.ndarray]

# Relative to the largest feature. float32 sums in another order differ by 1e-6.
TOLERANCE = 1e-4
# A shorter pass is over before another engine has been converted and measured.
MIN_SECONDS = 60.0
MIN_GAIN = 1.05
OPSET = 17
_MEASURED_RUNS = 3
FOLDER = "engines"  # Beside the cached features.


class EngineError(Exception):
    """An engine cannot run a backbone; the message says why."""


def _installed() -> list[str]:
    """Returns the engines but TensorFlow that can be used."""
    return [one for one in _LOADERS if not missing_packages(one)]


def choose_engine(
    wanted: str,
    forward: Any,
    *,
    folder: Path,
    fingerprint: str,
    batch: np.ndarray,
    num_batches: float,
    on_note: Callable[[str], None],
) -> tuple[str, Forward | None]:
    """Returns the name of the engine to use, and how to run it; None: TensorFlow's.

    `forward` is the backbone as a `tf.function`, `batch` one of those that it is to be
    run on. `auto` measures where the pass takes long, and remembers what it found.
    """
    if wanted == "tensorflow" or (wanted == "auto" and not _installed()):
        return "tensorflow", None
    path = folder / f"{fingerprint}.onnx"
    record_path = path.with_suffix(".json")
    try:
        make_folder(folder)
    except OSError as error:
        on_note(f"TensorFlow runs the backbone: {folder} cannot be made ({error}).")
        return "tensorflow", None
    with locked(f"{path}.lock", needed=False):
        record = read_json(record_path)
        known = record if isinstance(record, dict) else {}
        chosen = wanted
        if wanted == "auto":
            chosen = known.get("fastest", {}).get(_machine(), "auto")
        if chosen == "tensorflow":
            return "tensorflow", None
        seconds: dict[str, float] = {}
        expected = None
        if chosen == "auto":
            expected = forward(batch).numpy()
            seconds["tensorflow"] = _seconds(lambda: forward(batch).numpy())
            if seconds["tensorflow"] * num_batches < MIN_SECONDS:
                return "tensorflow", None
        candidates = _installed() if chosen == "auto" else [chosen]
        runs: dict[str, Forward] = {}
        for engine in candidates:
            try:
                content = _read(path, known.get("checksum"))
                if content is None:
                    content, known = _convert(forward, path, record_path)
                    expected = forward(batch).numpy() if expected is None else expected
                run = _LOADERS[engine](content)
                if expected is not None:
                    _require_equal(run(batch), expected)
            except EngineError as error:
                on_note(f"{engine} is not used for this backbone: {error}.")
                continue
            runs[engine] = run
            if chosen == "auto":
                seconds[engine] = _seconds(functools.partial(run, batch))
        if chosen != "auto":
            return (chosen, runs[chosen]) if runs else ("tensorflow", None)
        fastest = min(seconds, key=seconds.__getitem__)
        gain = seconds["tensorflow"] / seconds[fastest]
        if gain < MIN_GAIN:
            fastest, gain = "tensorflow", 1.0
        known["fastest"] = {**known.get("fastest", {}), _machine(): fastest}
        _write(record_path, known)
    if fastest != "tensorflow":
        on_note(f"{fastest} runs the backbone: {gain:.1f} times as fast here.")
    return fastest, runs.get(fastest)


def _seconds(run: Callable[[], Any]) -> float:
    run()
    best = math.inf
    for _ in range(_MEASURED_RUNS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def _require_equal(found: np.ndarray, expected: np.ndarray) -> None:
    difference = float(np.abs(found - expected).max(initial=0.0))
    scale = float(np.abs(expected).max(initial=0.0))
    if not difference <= TOLERANCE * max(scale, 1e-30):
        raise EngineError(
            f"its features differ from TensorFlow's by {difference:.2g}, where the "
            f"largest is {scale:.2g}"
        )


def _convert(
    forward: Any, path: Path, record_path: Path
) -> tuple[bytes, dict[str, Any]]:
    """Writes the ONNX file, and returns it with the record of it."""
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        converted = to_onnx(forward.get_concrete_function(), "features", OPSET)
        content = converted.SerializeToString()
    # What tf2onnx raises for an operation that it does not know is no documented type.
    except Exception as error:
        reason = first_line(error)
        raise EngineError(f"it cannot be converted to ONNX ({reason})") from error
    finally:
        logger.setLevel(level)
    try:
        replaced(path, lambda place: place.write_bytes(content))
    except OSError as error:
        raise EngineError(f"{path} cannot be written ({error.strerror})") from error
    record = {"checksum": _checksum(content)}
    _write(record_path, record)
    return content, record


def _write(path: Path, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # It is measured again the next time.
        replaced(path, lambda place: write_json(place, record))


def _read(path: Path, checksum: Any) -> bytes | None:
    """Returns a file as it was written, or None."""
    try:
        content = bytes_of(path)
    except (OSError, DataError):
        return None
    return content if _checksum(content) == checksum else None


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _machine() -> str:
    """Names what the speed of an engine depends on."""
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("tensorflow", *_installed())
    ]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return ", ".join([_processor(), f"{threads or os.cpu_count()} cores", *versions])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _onnxruntime(content: bytes) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # Of its C++ part; the types are not public.
        raise EngineError(f"it cannot load the file ({first_line(error)})") from error
    (taken,) = session.get_inputs()
    return lambda images: session.run(None, {taken.name: images})[0]


def _openvino(content: bytes) -> Forward:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    try:
        core = openvino.Core()
        network = core.compile_model(core.read_model(content), "CPU", options)
    except RuntimeError as error:
        raise EngineError(f"it cannot load the file ({first_line(error)})") from error
    return lambda images: network(images)[0]


_LOADERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
