"""The rules of rejection: what a training step may change, and what it must."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.model import RSFTModel
from keras_rsft.policies import AcceptAll, KeepFraction, LossThreshold, Policy

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "clipnorm": lambda: keras.optimizers.SGD(0.05, momentum=0.9, clipnorm=0.1),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
    "mixed_bfloat16": {},
    "mixed_float16": {},
}
SCORES = "sparse_categorical_crossentropy"


class BackwardCounter(keras.layers.Layer):
    """Passes its input on and counts the backward passes through it."""

    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0, trainable=False)

    def call(self, inputs):
        @tf.custom_gradient
        def passed_on(x):
            def gradient(upstream):
                self.count.assign_add(1)
                return upstream

            return tf.identity(x), gradient

        return passed_on(inputs)


class AcceptRows(Policy):
    """Accepts the same places of every batch."""

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def decide(self, per_sample_loss, step):
        return tf.constant(self.rows)


def softmax_step(x, y, rows, *, weights=None, rate=0.5):
    """One SGD step of a zero linear softmax head, worked in NumPy.

    At zero weights every class has probability 1/3, so the gradient of one
    sample is `x (p - onehot(y))`.
    """
    rows = np.asarray(rows)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights)
    error = (1 / 3 - np.eye(3)[y[rows]]) * weights[rows][:, None]
    kernel = -rate * x[rows].T.astype("float64") @ error / len(rows)
    return [kernel, -rate * error.sum(axis=0) / len(rows)]


def linear_model(policy, *, rate=0.5, **compile_options):
    """A linear softmax head that starts at zero."""
    head = keras.layers.Dense(3, activation="softmax", kernel_initializer="zeros")
    model = RSFTModel(keras.Sequential([keras.Input((8,)), head]), policy)
    model.compile(keras.optimizers.SGD(rate), SCORES, **compile_options)
    return model


def assert_equal(values, expected):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def fit(model, data, **options):
    """Fits without shuffling or printing."""
    options = {"batch_size": 16, "shuffle": False, "verbose": 0} | options
    return model.fit(*data, **options).history


REJECTION_CASES = [
    *((name, "graph") for name in OPTIMIZERS),
    *(("momentum", mode) for mode in MODES if mode != "graph"),
    ("adam", "eager"),
    ("ema", "eager"),
    ("accumulation", "xla"),
    ("accumulation", "mixed_float16"),
    ("adamw", "mixed_bfloat16"),
]


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no sample")
@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("optimizer, mode", REJECTION_CASES)
def test_rejected_batch_changes_no_variable(
    optimizer, mode, level, small_data, make_model, values_of, dtype_policy
):
    if mode.startswith("mixed"):
        dtype_policy(mode)
    counter = BackwardCounter()
    wrapped = make_model(counter)
    model = RSFTModel(wrapped, LossThreshold(1e9, level=level))
    model.compile(OPTIMIZERS[optimizer](), SCORES, **MODES[mode])

    at_first = values_of(wrapped)
    fit(model, small_data)  # Three accepted steps: slots and averages are not zero.
    trained = values_of(wrapped, model.optimizer)
    changed = [
        not np.array_equal(a, b) for a, b in zip(at_first, trained, strict=False)
    ]
    assert all(changed), "BatchNorm, Dropout's seed and every weight are in play"
    assert counter.count.numpy() == 3

    model.policy.threshold.assign(1e-9)
    history = fit(model, small_data)
    if optimizer == "ema":  # Keras itself puts the averages in at the end of `fit`.
        trained[: len(wrapped.variables)] = with_averages(wrapped, model, trained)
    assert_equal(values_of(wrapped, model.optimizer), trained)
    assert counter.count.numpy() == 3, "no backward pass ran"
    assert history["acceptance_rate"] == [0.0]
    assert history["accepted_loss"] == [0.0]
    assert np.isfinite(history["loss"][0])
    assert int(model.policy.steps_seen.numpy()) == 6


def test_policies_and_models_are_checked(make_model):
    with pytest.raises(TypeError, match=r"`policy` must be .* Received: float"):
        RSFTModel(make_model(), 1.5)
    with pytest.raises(TypeError, match=r"`model` must be .* Received: Dense"):
        RSFTModel(keras.layers.Dense(3), AcceptAll())


@pytest.mark.parametrize("mode", ["graph", "eager", "xla", "mixed_bfloat16"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize(
    "policy", [AcceptAll, lambda: LossThreshold(1e9)], ids=["AcceptAll", "threshold"]
)
def test_accepting_everything_equals_stock_keras(
    policy, optimizer, mode, small_data, make_model, values_of, dtype_policy
):
    if mode == "xla" and optimizer != "adam":
        pytest.skip("XLA is slow to compile: one optimizer is enough")
    if mode.startswith("mixed"):
        dtype_policy(mode)
    runs = []
    for wrap in (lambda m: m, lambda m: RSFTModel(m, policy())):
        wrapped = make_model()
        model = wrap(wrapped)
        model.compile(
            OPTIMIZERS[optimizer](), SCORES, metrics=["accuracy"], **MODES[mode]
        )
        history = fit(model, small_data, epochs=2, validation_data=small_data)
        runs.append((values_of(wrapped, model.optimizer), history))
    (stock, stock_logs), (ours, our_logs) = runs
    compare = assert_within_1e6 if mode == "xla" else assert_equal
    compare(ours, stock)
    assert our_logs.pop("acceptance_rate") == [1.0, 1.0]
    np.testing.assert_allclose(our_logs.pop("accepted_loss"), stock_logs["loss"], 1e-6)
    assert set(our_logs) == set(stock_logs)
    for name in stock_logs:
        np.testing.assert_allclose(our_logs[name], stock_logs[name], 1e-6)


def assert_within_1e6(values, expected):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-6)
