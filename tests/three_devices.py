"""Trains on one device and on three, and prints how far apart the results are.

Run as a program: the devices of a process are chosen before anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from made_features import split_features

from keras_rsft._ledger import RejectionLedger
from keras_rsft.config import TrainConfig
from keras_rsft.features._extract import FrozenBackbone
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AutoPolicy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
)
from keras_rsft.training._devices import Devices
from keras_rsft.training._head import train_head

REPLICAS = 3
ROWS, BATCH = 49, 16  # 3 batches of 16, and one row: two replicas have none.


def sgd():
    return keras.optimizers.SGD(0.3, momentum=0.9)


def slow_sgd():
    return keras.optimizers.SGD(0.002)


def clipped_adam():
    return keras.optimizers.AdamW(0.05, global_clipnorm=0.2)


def averaging_sgd():
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)


def by_class():
    return RunningThreshold(
        percentile=0.7, num_classes=3, class_floor=0.2, warmup_steps=2
    )


def weighing():
    accept, weights = np.arange(ROWS) % 3 > 0, np.linspace(0.1, 1.0, ROWS)
    return AutoPolicy(accept, weights=weights)


CASES = {
    "batch": (lambda: LossThreshold(1.25, level="batch"), sgd, {}),
    "sample": (lambda: LossThreshold(1.0), sgd, {}),
    "keep": (lambda: KeepFraction(0.6), clipped_adam, {}),
    "auto": (weighing, sgd, {}),
    "running": (by_class, sgd, {"weights": True}),
    "mixture": (lambda: LossMixture(warmup_steps=0), averaging_sgd, {}),
    "nan": (lambda: LossThreshold(1.0), sgd, {"nan": True}),
    "nan, all else accepted": (AcceptAll, sgd, {"nan": True}),
    "mixed_bfloat16": (
        lambda: KeepFraction(0.6), slow_sgd, {"dtype": "mixed_bfloat16"}
    ),
    "mixed_float16": (lambda: KeepFraction(0.6), slow_sgd, {"dtype": "mixed_float16"}),
    "nothing": (lambda: LossThreshold(1e-6), sgd, {}),
}  # fmt: skip


def made_data(nan):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 8)).astype("float32")
    y = np.argmax(x[:, :3] + rng.normal(size=(ROWS, 3)), axis=1).astype("int32")
    if nan:  # One row; all rows of a replica; the only row of the last batch.
        x[3, 2] = np.nan
        x[16:22, 0] = np.nan
        x[-1] = np.inf
    return x, y


def made_model(policy, optimizer, dtype, plain):
    keras.utils.set_random_seed(0)
    regular = (
        {} if plain else {"kernel_regularizer": "l2", "activity_regularizer": "l2"}
    )
    head = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, activation="tanh", dtype=dtype, **regular),
            keras.layers.Dense(3, dtype=dtype),
            keras.layers.Activation("softmax", dtype="float32"),
        ]
    )
    model = RSFTModel(head, policy())
    model.compile(optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def trained(strategy, policy, optimizer, *, nan=False, weights=False, dtype=None):
    x, y = made_data(nan)
    if dtype:
        keras.config.set_dtype_policy(dtype)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = made_model(policy, optimizer, dtype, plain=weights or dtype or nan)
        model.optimizer.build(model.trainable_variables)
    keras.config.set_dtype_policy("float32")
    weight = np.linspace(0, 2, ROWS).astype("float32") if weights else None
    index = np.arange(ROWS, dtype="int32")
    columns = (x, y, weight, index) if weights else (x, y, index)
    data = tf.data.Dataset.from_tensor_slices(columns).batch(BATCH)
    if not weights:
        data = data.map(lambda x, y, index: (x, y, None, index))
    ledger = RejectionLedger(index.astype(str), y)
    before = [v.numpy() for v in model.model.variables + model.optimizer.variables]
    history = model.fit(
        data, epochs=3, verbose=0, callbacks=[ledger], validation_data=(x, y)
    ).history
    return model, history, ledger, before


def variables(model):
    parts = model.model, model.policy, model.optimizer
    return [variable for part in parts for variable in part.variables]


def arrays(model):
    return [np.asarray(v.numpy(), "float64") for v in variables(model)]


def differences(one, three):
    """Returns what a test looks at, as plain numbers."""
    (model, history, ledger, _), (model3, history3, ledger3, before3) = one, three
    pairs = list(zip(arrays(model), arrays(model3), strict=True))
    copies = []
    for variable in variables(model3):
        values = [1.0 * copy.numpy() for copy in variable.value.values]
        copies.append(float(np.ptp(values, axis=0).max(initial=0)))
    now = [v.numpy() for v in model3.model.variables + model3.optimizer.variables]
    states = ledger.state(), ledger3.state()
    return {
        "variables": max(float(np.abs(a - b).max(initial=0)) for a, b in pairs),
        "copies": max(copies),
        "history": max(
            float(np.nanmax(np.abs(np.subtract(history[name], history3[name]))))
            for name in history
        ),
        "ledger": max(
            float(np.nanmax(np.abs(np.subtract(a, states[1][name])), initial=0))
            for name, a in states[0].items()
        ),
        "rates": history["acceptance_rate"],
        "unchanged": all(
            np.array_equal(a, b) for a, b in zip(before3, now, strict=True)
        ),
    }


def compared_features():
    """Runs a base on one device and on all of them, five batches of two images."""
    images = keras.Input((8, 8, 3))
    values = keras.layers.Conv2D(4, 3, activation="relu")(images)
    values = keras.layers.BatchNormalization()(values)
    base = keras.Model(images, keras.layers.GlobalAveragePooling2D()(values))
    rng = np.random.default_rng(0)
    batches = [rng.random((2, 8, 8, 3)).astype("float32") for _ in range(5)]
    batches = [(number, tf.constant(batch)) for number, batch in enumerate(batches)]
    names = tuple(f"CPU:{number}" for number in range(REPLICAS))
    one = list(FrozenBackbone(base).over(batches))
    all_of_them = list(FrozenBackbone(base, device_names=names).over(batches))
    return {
        "equal": all(
            a == b and np.array_equal(x, y)
            for (a, x), (b, y) in zip(one, all_of_them, strict=True)
        ),
        "devices": len(names),
    }


def compared_heads(strategy):
    """Trains a head on kept features by the policy `auto`, on one device and on all."""
    settings = TrainConfig(epochs=3, batch_size=16, learning_rate=0.05)
    with tempfile.TemporaryDirectory() as folder:
        features = split_features(Path(folder))
        one, three = (
            train_head(features, settings, progress=False, devices=devices)
            for devices in (Devices(), Devices("mirrored", strategy))
        )
    pairs = zip(arrays(one.model), arrays(three.model), strict=True)
    return {
        "variables": max(float(np.abs(a - b).max(initial=0)) for a, b in pairs),
        "accepted": bool(np.array_equal(one.accepted, three.accepted)),
    }


def main():
    devices = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    (processor,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(processor, devices)
    # One strategy for all: TensorFlow's exchange remembers the groups of a process.
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])
    warnings.simplefilter("ignore")
    results = {}
    for name, (policy, optimizer, options) in CASES.items():
        one, three = (
            trained(where, policy, optimizer, **options) for where in (None, strategy)
        )
        results[name] = differences(one, three)
    results["features"] = compared_features()
    results["run"] = compared_heads(strategy)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
