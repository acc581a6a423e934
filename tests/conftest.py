"""What the tests of several rooms share: tiny data, a tiny model, equality to the bit."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest


@pytest.fixture(scope="session")
def small_data():
    """48 rows of 8 inputs in 3 classes: three batches of 16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 8)).astype("float32")
    y = np.argmax(x[:, :3] + rng.normal(size=(48, 3)) * 0.3, axis=1)
    return x, y


@pytest.fixture(scope="session")
def make_model():
    """Builds 8 -> 3 with BatchNorm and Dropout, the same weights every time."""

    def build(*extra_layers, dtype=None):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(6, activation="relu", dtype=dtype),
                *extra_layers,
                keras.layers.BatchNormalization(dtype=dtype),
                keras.layers.Dropout(0.3, dtype=dtype),
                keras.layers.Dense(3, activation="softmax", dtype=dtype),
            ]
        )

    return build


@pytest.fixture(scope="session")
def values_of():
    """Copies the values of variables, so that they can be compared later."""

    def copy(*sources):
        return [np.array(v) for source in sources for v in source.variables]

    return copy


@pytest.fixture
def dtype_policy():
    """Sets Keras's global precision for the time of one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
