"""Tiny fits take longer to trace than to train: this trains them eagerly.

The tests of the backends and of `RSFTModel` compare compiled steps with eager ones.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import keras

_ALWAYS = property(lambda model: True, lambda model, value: None)


@contextlib.contextmanager
def eagerly():
    """Has `fit`, `evaluate` and `predict` of each Keras model run eagerly."""
    with mock.patch.object(keras.Model, "run_eagerly", _ALWAYS):
        yield
