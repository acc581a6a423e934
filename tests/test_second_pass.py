"""Two passes change the weights as one pass does, and reject as it does."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.errors import InvalidArgument
from keras_rsft.model import second_pass

ALWAYS = 1.1


@pytest.fixture
def network():
    """8 -> 3 with a frozen BatchNorm and regularisation, always the same weights."""

    def build():
        keras.utils.set_random_seed(0)
        frozen = keras.layers.BatchNormalization(trainable=False)
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(
                    6, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.01)
                ),
                frozen,
                keras.layers.Dropout(0.0),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )

    return build


@pytest.fixture
def train(network, small_data):
    def run(kind, policy, optimizer="sgd", x=None, weights=None, **options):
        features, labels = small_data
        model = kind(network(), policy)
        model.compile(
            optimizer,
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            **options,
        )
        history = model.fit(
            features if x is None else x, labels, sample_weight=weights,
            batch_size=16, epochs=4, shuffle=False, verbose=0,
        ).history  # fmt: skip
        return model, history

    return run


POLICIES = {
    "threshold": lambda: rsft.LossThreshold(1.0),
    "fraction": lambda: rsft.KeepFraction(0.5, ramp_steps=2),
    "everything": rsft.AcceptAll,
    "batch": lambda: rsft.LossThreshold(1.35, level="batch"),
}


@pytest.mark.parametrize(
    ("policy", "optimizer", "limit"),
    [
        ("threshold", "sgd", ALWAYS),
        ("fraction", "adam", ALWAYS),
        ("fraction", "sgd", second_pass.BREAK_EVEN),
        ("everything", "sgd", ALWAYS),
        ("batch", "adam", ALWAYS),
    ],
)
def test_equal_to_one_pass(train, policy, optimizer, limit, monkeypatch):
    monkeypatch.setattr(second_pass, "BREAK_EVEN", limit)
    one, logs = train(rsft.RSFTModel, POLICIES[policy](), optimizer)
    two, same_logs = train(rsft.TwoPassRSFTModel, POLICIES[policy](), optimizer)
    for own, other in zip(two.model.weights, one.model.weights, strict=True):
        np.testing.assert_allclose(own.numpy(), other.numpy(), atol=1e-6)
    assert int(two.optimizer.iterations) == int(one.optimizer.iterations)
    assert logs.keys() == same_logs.keys()
    for name, values in logs.items():
        np.testing.assert_allclose(same_logs[name], values, atol=1e-6)
    assert logs["acceptance_rate"][-1] > 0


@pytest.mark.parametrize("eagerly", [True, False])
def test_weighted_samples_and_nan(train, small_data, eagerly, monkeypatch):
    monkeypatch.setattr(second_pass, "BREAK_EVEN", ALWAYS)
    x = small_data[0].copy()
    x[5] = np.nan
    weights = np.linspace(0.5, 2, len(x)).astype("float32")
    models = []
    for kind in (rsft.RSFTModel, rsft.TwoPassRSFTModel):
        options = {"x": x, "weights": weights, "run_eagerly": eagerly}
        with pytest.warns(UserWarning, match="NaN or infinity"):
            models.append(train(kind, rsft.LossThreshold(1.2), **options)[0])
    one, two = models
    for own, other in zip(two.model.weights, one.model.weights, strict=True):
        assert np.isfinite(own.numpy()).all()
        np.testing.assert_allclose(own.numpy(), other.numpy(), atol=1e-6)


def test_a_rejected_batch_changes_nothing(network, small_data, values_of, monkeypatch):
    monkeypatch.setattr(second_pass, "BREAK_EVEN", ALWAYS)
    x, y = small_data
    model = rsft.TwoPassRSFTModel(network(), rsft.LossThreshold(1e-6))
    optimizer = keras.optimizers.Adam(use_ema=True)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.train_on_batch(x[:1], y[:1])  # Makes all variables.
    before = values_of(model.model, model.optimizer)
    model.train_on_batch(x, y)
    for old, new in zip(before, values_of(model.model, model.optimizer), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_share_accepted_lately_decides(network, small_data):
    x, y = small_data
    model = rsft.TwoPassRSFTModel(network(), rsft.LossThreshold(1e-6))
    model.compile("sgd", "sparse_categorical_crossentropy")
    passes = []
    in_two = model._in_two_passes

    def noted(data):
        passes.append(float(model.recent_acceptance))
        return in_two(data)

    model._in_two_passes = noted
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.warns(UserWarning, match="accepted no sample"):
        model.fit(x, y, batch_size=6, verbose=0)
    # 1, 0.9, 0.81, 0.73, 0.66, 0.59, 0.53, and then below a half.
    assert passes == pytest.approx([0.9**7])
    assert float(model.recent_acceptance) == pytest.approx(0.9**8)


def test_saved_and_loaded(network, small_data, tmp_path):
    x, y = small_data
    model = rsft.TwoPassRSFTModel(network(), rsft.KeepFraction(0.5))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.recent_acceptance) == float(model.recent_acceptance) < 1
    for own, other in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(own.numpy(), other.numpy())


class TestRefuses:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (keras.layers.BatchNormalization(), "normalises by the batch"),
            (keras.layers.Dropout(0.5), "draws at random"),
            (keras.layers.GaussianNoise(0.5), "draws at random"),
            (keras.layers.Dense(4, activity_regularizer="l2"), "penalises"),
        ],
    )
    def test_what_a_second_pass_would_not_repeat(self, layer, message, small_data):
        model = keras.Sequential([keras.Input((8,)), layer, keras.layers.Dense(3)])
        model = rsft.TwoPassRSFTModel(model, rsft.LossThreshold(1.0))
        model.compile("sgd", "mse")
        with pytest.raises(InvalidArgument, match=message):
            model.fit(*small_data, verbose=0)

    def test_xla(self, network):
        model = rsft.TwoPassRSFTModel(network(), rsft.AcceptAll())
        with pytest.raises(InvalidArgument, match="XLA"):
            model.compile("sgd", "mse", jit_compile=True)


def test_dicts_of_inputs(small_data):
    x, y = small_data

    def weights(kind):
        keras.utils.set_random_seed(0)
        inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
        joined = keras.layers.Concatenate()(list(inputs.values()))
        output = keras.layers.Dense(3, activation="softmax")(joined)
        model = kind(keras.Model(inputs, output), rsft.KeepFraction(0.4))
        model.compile("sgd", "sparse_categorical_crossentropy")
        parts = {"a": x[:, :4], "b": x[:, 4:]}
        data = tf.data.Dataset.from_tensor_slices((parts, y)).batch(16)
        model.fit(data, epochs=8, verbose=0)
        return model.model.get_weights()

    for one, two in zip(
        weights(rsft.RSFTModel), weights(rsft.TwoPassRSFTModel), strict=True
    ):
        np.testing.assert_allclose(two, one, atol=1e-6)
