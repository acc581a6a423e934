"""Tiny fits take longer to trace than to train: this trains them eagerly.

The tests of the backends and of `RSFTModel` compare compiled steps with eager ones.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import keras


@contextlib.contextmanager
def eagerly(always=True):
    """Has `fit`, `evaluate` and `predict` of each Keras model run eagerly, or not."""
    fixed = property(lambda model: always, lambda model, value: None)
    with mock.patch.object(keras.Model, "run_eagerly", fixed):
        yield
