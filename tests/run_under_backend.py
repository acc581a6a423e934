"""Trains small models under the backend of KERAS_BACKEND and writes what came of it.

A program that `test_backends.py` runs:  python run_under_backend.py OUTPUT.npz
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_rsft as rsft

SAMPLES, BATCH, DIM, CLASSES, EPOCHS = 60, 12, 8, 3, 4
CASES = {
    "sample": (lambda: rsft.LossThreshold(1.1), False),
    "batch": (lambda: rsft.LossThreshold(1.25, level="batch"), True),
    "accept all": (rsft.AcceptAll, True),
    "keep": (lambda: rsft.KeepFraction(0.6, ramp_steps=6, class_floor=0.25), True),
    "running": (
        lambda: rsft.RunningThreshold(0.2, num_classes=3, warmup_steps=3),
        True,
    ),
    "auto": (
        lambda: rsft.AutoPolicy(
            np.arange(SAMPLES) % 3 > 0, weights=np.linspace(0.1, 1.0, SAMPLES)
        ),
        True,
    ),
}


def made_data(bad_row):
    """Inputs, labels, weights and indices, in batches, the same everywhere."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(SAMPLES, DIM)).astype("float32")
    y = np.argmax(x[:, :CLASSES] + rng.normal(size=(SAMPLES, CLASSES)), axis=1)
    weight = rng.uniform(0.5, 2.0, SAMPLES).astype("float32")
    if bad_row:
        x[7, 2] = np.nan
    index = np.arange(SAMPLES, dtype="int32")
    return x, y.astype("int32"), weight, index


def made_model(batch_norm):
    """A network whose weights do not depend on the backend's random numbers."""
    layers = [keras.Input((DIM,)), keras.layers.Dense(6, activation="tanh")]
    if batch_norm:
        layers.append(keras.layers.BatchNormalization())
    layers.append(keras.layers.Dense(CLASSES, kernel_regularizer="l2"))
    network = keras.Sequential(layers)
    rng = np.random.default_rng(4)
    for layer in network.layers:
        if isinstance(layer, keras.layers.Dense):
            shapes = [weight.shape for weight in layer.weights]
            layer.set_weights([rng.normal(size=s) * 0.4 for s in shapes])
    return network


def trained(policy, batch_norm):
    """Trains for some epochs, batch by batch; returns arrays by name."""
    # Through a BatchNorm a NaN reaches the rest of its batch.
    x, y, weight, index = made_data(bad_row=not batch_norm)
    model = rsft.RSFTModel(made_model(batch_norm), policy)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    ledger = rsft.RejectionLedger(index.astype(str), y)

    def batches():
        for _ in range(EPOCHS):
            for first in range(0, SAMPLES, BATCH):
                rows = slice(first, first + BATCH)
                yield x[rows], y[rows], weight[rows], index[rows]

    history = model.fit(
        batches(),
        epochs=EPOCHS,
        steps_per_epoch=SAMPLES // BATCH,
        verbose=0,
        callbacks=[ledger],
    ).history
    found = {f"log {name}": np.array(values) for name, values in history.items()}
    weights = enumerate(model.model.get_weights())
    found |= {f"weight {number}": value for number, value in weights}
    state = ledger.state()
    del state["loss_histograms"]  # A loss may lie beside the edge of a bin.
    found |= {f"ledger {name}": value for name, value in state.items()}
    state = enumerate(model.policy.get_weights())
    return found | {f"policy {number}": np.array(v) for number, v in state}


def fitted_by_itself(numbered):
    """Trains on arrays or on `tf.data` with the policy auto and a ledger."""
    right = np.arange(SAMPLES) % CLASSES
    x = np.random.default_rng(5).normal(size=(SAMPLES, DIM)) + 8 * np.eye(DIM)[right]
    given = np.where(np.arange(SAMPLES) < 6, (right + 1) % CLASSES, right)
    data = (x.astype("float32"), given.astype("int32"))
    if numbered:
        import tensorflow as tf

        rows = tf.data.Dataset.from_tensor_slices(data)
        data = (rsft.with_ids(rows).shuffle(SAMPLES, seed=1).batch(BATCH),)
    model = rsft.RSFTModel(made_model(batch_norm=False), "auto")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    ledger = rsft.RejectionLedger()
    model.fit(*data, epochs=2, verbose=0, callbacks=[ledger], shuffle=False)
    names = ("labels", "seen", "accepted", "looks_wrong")
    return {name: getattr(ledger.ledger, name) for name in names}


def main(path):
    results = {"backend": np.array(keras.backend.backend())}
    for numbered in (False, True):
        found = fitted_by_itself(numbered)
        results |= {f"auto {numbered}: {name}": one for name, one in found.items()}
    for case, (policy, batch_norm) in CASES.items():
        found = trained(policy(), batch_norm)
        results |= {f"{case}: {name}": value for name, value in found.items()}
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
