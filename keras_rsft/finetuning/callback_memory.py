"""What a Keras callback remembers, as far as it is numbers, text and arrays.

Keras's own callbacks keep their memory there: `EarlyStopping` its patience and best
weights, `ReduceLROnPlateau` and `ModelCheckpoint` their best values.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

_ARRAY = "array"


def memory_of(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns what a callback has learnt: plain attributes that are no options.

    Plain are None, bool, number, text, array, and lists of these; models, files and
    functions are not. An option has the name of a constructor's parameter: it stays as
    it was given, since some callbacks make others of them on their first epoch
    (Keras turns the sign of `min_delta`).
    """
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


def identity_of(callbacks: Any) -> Any:
    """Returns what a run must share of its callbacks to be the same run.

    Args:
        callbacks: Callbacks, or a function that makes them of a ledger. Of that it is
            the name: what it makes is compared when there is a ledger to make it of,
            and a state of other callbacks is then not gone on with.
    """
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
