"""Sample-level selection: gradients, NaN, weights, stalls, losses of every kind."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._policy import Policy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossThreshold,
    RunningThreshold,
)

SCORES = "sparse_categorical_crossentropy"


class AcceptRows(Policy):
    """Accepts the same places of every batch."""

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def decide(self, batch):
        return keras.ops.convert_to_tensor(self.rows)


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
    """A linear softmax head that starts at zero; not compiled."""
    compile_options = {"run_eagerly": True} | compile_options
    head = keras.layers.Dense(3, activation="softmax", kernel_initializer="zeros")
    model = RSFTModel(keras.Sequential([keras.Input((8,)), head]), policy)
    model.compile(keras.optimizers.SGD(rate), SCORES, **compile_options)
    return model


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 8)).astype("float32")
    return x, np.array([0, 1, 2, 2, 1, 0])


def assert_weights(model, expected):
    for weight, value in zip(model.get_weights()[:2], expected, strict=True):
        np.testing.assert_allclose(weight, value, atol=1e-6)


COMPILED = {"run_eagerly": False}


@pytest.mark.parametrize(
    "options", [COMPILED, COMPILED | {"jit_compile": True}, {"run_eagerly": True}]
)
class TestGradient:
    def test_is_the_mean_over_the_accepted(self, batch, options, compile_options):
        mask = [True, False, True, True, False, False]
        model = linear_model(AcceptRows(mask), **compile_options(**options))
        logs = model.train_on_batch(*batch, return_dict=True)
        assert_weights(model, softmax_step(*batch, np.flatnonzero(mask)))
        assert logs["acceptance_rate"] == pytest.approx(0.5)
        assert logs["accepted_loss"] == pytest.approx(np.log(3), abs=1e-5)

    @pytest.mark.parametrize(
        "policy, value",
        [
            (AcceptAll, np.nan),
            (lambda: LossThreshold(9.0), np.inf),
            pytest.param(AcceptAll, np.inf, marks=pytest.mark.slow),
            pytest.param(lambda: LossThreshold(9.0), np.nan, marks=pytest.mark.slow),
        ],
    )
    def test_a_row_that_is_not_finite_leaves_the_others_alone(
        self, batch, options, value, policy, compile_options
    ):
        x, y = batch[0].copy(), batch[1]
        x[2, 3] = value
        model = linear_model(policy(), **compile_options(**options))
        logs = model.train_on_batch(x, y, return_dict=True)
        assert_weights(model, softmax_step(x, y, [0, 1, 3, 4, 5]))
        assert model.selection_totals()["nonfinite"] == 1
        assert logs["acceptance_rate"] == pytest.approx(5 / 6)
        assert np.isfinite(logs["loss"])


def test_a_loss_that_is_not_finite_is_rejected_at_batch_level(batch):
    x = batch[0].copy()
    x[0, 0] = np.nan
    model = linear_model(LossThreshold(9.0, level="batch"))
    model.train_on_batch(x, batch[1])
    assert_weights(model, [np.zeros((8, 3)), np.zeros(3)])


def test_weights_weigh_the_accepted_and_never_decide(batch):
    weights = np.array([1e6, 2.0, 0.0, 1.0, 0.5, 3.0], "float32")
    mask = [False, True, True, True, False, True]
    model = linear_model(AcceptRows(mask))
    model.train_on_batch(*batch, sample_weight=weights)
    rows = np.flatnonzero(mask)
    assert_weights(model, softmax_step(*batch, rows, weights=weights))
    # Every loss is ln 3 = 1.0986; a weight of 1e6 does not lift it over 1.2.
    judged = linear_model(LossThreshold(1.2))
    logs = judged.train_on_batch(*batch, sample_weight=weights, return_dict=True)
    assert logs["acceptance_rate"] == 1.0


def test_the_loss_shown_is_weighted_and_has_what_layers_add(batch):
    x, labels = batch
    head = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                3, "softmax", kernel_initializer="zeros", activity_regularizer="l2"
            ),
        ]
    )
    model = RSFTModel(head, LossThreshold(9.0))
    model.compile("sgd", SCORES, run_eagerly=True)
    weights = np.array([0.0, 2.0, 0.0, 4.0, 0.0, 0.0], "float32")
    head(x)
    added = float(keras.ops.sum(head.losses[0]))  # Of Keras: for a row, or the batch.
    assert added > 0
    history = model.fit(x, labels, batch_size=6, sample_weight=weights, verbose=0)
    assert history.history["loss"][0] == pytest.approx(np.log(3) + added, rel=1e-5)


@pytest.mark.parametrize("policy", [AcceptAll, lambda: LossThreshold(99.0)])
def test_so_it_is_without_a_row_that_is_not_finite(batch, policy):
    x, labels = batch[0].copy(), batch[1]
    x[5] = np.nan
    inner = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                3, "softmax", kernel_initializer="ones", kernel_regularizer="l2"
            ),
        ]
    )
    model = RSFTModel(inner, policy())
    model.compile("sgd", SCORES, run_eagerly=True)
    added = float(keras.ops.sum(inner.losses[0]))
    weights = np.array([1.0, 2.0, 0.0, 4.0, 3.0, 9.0], "float32")
    logs = model.train_on_batch(x, labels, sample_weight=weights, return_dict=True)
    # Every loss is ln 3: equal weights give equal scores.
    assert logs["loss"] == pytest.approx(2 * np.log(3) + added, rel=1e-5)


def test_a_penalty_that_is_not_finite_does_not_reach_the_log(batch):
    x = batch[0].copy()
    x[2] = np.nan
    head = keras.layers.Dense(
        3, "softmax", kernel_initializer="zeros", activity_regularizer="l2"
    )
    model = RSFTModel(keras.Sequential([keras.Input((8,)), head]), LossThreshold(9.0))
    model.compile("sgd", SCORES, run_eagerly=True)
    logs = model.train_on_batch(x, batch[1], return_dict=True)
    assert logs["loss"] == pytest.approx(np.log(3), rel=1e-5)
    assert np.isfinite(model.get_weights()[0]).all()


def test_one_target_that_is_nan_leaves_the_statistics_to_the_others():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype("float32"), rng.normal(size=(16, 1))
    y[15] = np.nan
    normalisation = keras.layers.BatchNormalization(momentum=0.0)
    inner = keras.Sequential([keras.Input((3,)), normalisation, keras.layers.Dense(1)])
    model = RSFTModel(inner, KeepFraction(0.2))
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(x, y.astype("float32"))
    seen = np.concatenate([x[:15], x[:1]])  # The last row is a copy of the first.
    found = normalisation.moving_mean.numpy(), normalisation.moving_variance.numpy()
    np.testing.assert_allclose(found[0], seen.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found[1], seen.var(axis=0), rtol=1e-4)


def test_class_weights_arrive_as_sample_weights(batch):
    class_weight = {0: 1.0, 1: 5.0, 2: 0.25}
    weights = np.array([class_weight[label] for label in batch[1]])
    model = linear_model(LossThreshold(1.2), **COMPILED)
    model.fit(*batch, batch_size=6, class_weight=class_weight, verbose=0)
    assert_weights(model, softmax_step(*batch, range(6), weights=weights))


def indexed(x, y, weights=None):
    parts = (x, y, weights, np.arange(len(y), dtype="int32"))
    return tf.data.Dataset.from_tensors(parts)


def test_data_with_sample_indices_are_weighted_by_class_and_predicted(batch):
    class_weight = {0: 1.0, 1: 5.0, 2: 0.25}
    weights = np.array([class_weight[label] for label in batch[1]], "float32")
    model = linear_model(LossThreshold(1.2))
    model.fit(indexed(*batch), class_weight=class_weight, verbose=0)
    assert_weights(model, softmax_step(*batch, range(6), weights=weights))
    np.testing.assert_array_equal(
        model.predict(indexed(*batch), verbose=0),
        model.predict(batch[0], batch_size=6, verbose=0),
    )
    with pytest.raises(ValueError, match="at the same time"):
        model.fit(indexed(*batch, weights), class_weight=class_weight, verbose=0)


def test_fit_takes_all_places_that_keras_has(batch):
    named, placed = (linear_model(LossThreshold(1.2)) for _ in range(2))
    weights, data = {0: 1.0, 1: 5.0}, (*batch, 3, 2, 0, None)
    one = named.fit(
        *data,
        validation_split=0.5,
        shuffle=False,
        class_weight=weights,
        initial_epoch=1,
    )
    other = placed.fit(*data, 0.5, None, False, weights, None, 1)
    assert one.history == other.history
    assert "val_loss" in one.history


@pytest.mark.parametrize(
    "make_policy",
    [
        lambda: LossThreshold(9.0, class_floor=0.5),
        lambda: RunningThreshold(num_classes=3),
    ],
)
def test_several_labels_a_sample_are_no_class(make_policy, batch):
    policy = make_policy()
    x, y = batch[0], np.eye(3, dtype="float32")[batch[1]]
    model = linear_model(policy)
    model.compile("sgd", "binary_crossentropy", run_eagerly=True)
    with pytest.raises(InvalidArgument, match="samples of one class"):
        model.fit(x, y, verbose=0)
    model.compile("sgd", "categorical_crossentropy", run_eagerly=True)
    model.fit(x, y, verbose=0)
    binary = RSFTModel(keras.Sequential([keras.layers.Dense(1, "sigmoid")]), policy)
    binary.compile("sgd", "binary_crossentropy", run_eagerly=True)
    binary.fit(x, (batch[1] > 0).astype("int32")[:, None], verbose=0)


def test_the_batch_decision_is_strict(batch):
    # The first loss is ln 3 in float32 for every sample.
    exactly = float(np.float32(np.log(np.float32(3))))
    for threshold, accepted in [(exactly * 0.999, 0.0), (exactly * 1.001, 1.0)]:
        model = linear_model(LossThreshold(threshold, level="batch"))
        logs = model.train_on_batch(*batch, return_dict=True)
        assert logs["acceptance_rate"] == accepted


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_rates_are_those_of_the_whole_epoch(
    batch, steps_per_execution, compile_options
):
    x = np.concatenate([batch[0]] * 2)[:10]
    y = np.concatenate([batch[1]] * 2)[:10]

    class FirstTwo(Policy):
        def decide(self, batch):
            places = keras.ops.cumsum(keras.ops.ones_like(batch.losses))
            return places <= 2

    options = compile_options(steps_per_execution=steps_per_execution)
    model = linear_model(FirstTwo(), **options, **COMPILED)
    history = model.fit(x, y, batch_size=4, verbose=0).history  # 4 + 4 + 2 samples.
    assert history["acceptance_rate"] == [pytest.approx(6 / 10)]
    assert "val_acceptance_rate" not in history


class TestStall:
    def test_warns_with_the_losses_seen(self, batch):
        model = linear_model(LossThreshold(0.5))
        with pytest.warns(UserWarning, match=r"lowest loss judged was 1\.099") as seen:
            model.fit(*batch, verbose=0, validation_data=batch)
        said = [str(one.message) for one in seen if one.category is UserWarning]
        assert "A threshold above 1.099" in said[0]

    def test_says_nothing_when_something_was_accepted(self, batch):
        model = linear_model(LossThreshold(1.2))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.fit(*batch, verbose=0, validation_data=batch)


@pytest.mark.only_under("tensorflow", "jax", reason="PyTorch traces nothing")
def test_the_threshold_is_live_without_a_retrace(batch):
    traces = []

    class Counted(keras.layers.Dense):
        def call(self, inputs, training=None):
            traces.append(1)
            return super().call(inputs)

    model = RSFTModel(
        keras.Sequential([keras.Input((8,)), Counted(3, activation="softmax")]),
        LossThreshold(1e-6),
    )
    model.compile("sgd", SCORES)
    raise_threshold = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: model.policy.threshold.assign(
            1e-6 if epoch == 0 else 1e6
        )
    )
    with pytest.warns(UserWarning, match="Epoch 1 accepted no sample"):
        model.fit(*batch, epochs=1, verbose=0, callbacks=[raise_threshold])
    before = len(traces)
    history = model.fit(
        *batch, initial_epoch=1, epochs=3, verbose=0, callbacks=[raise_threshold]
    ).history
    assert history["acceptance_rate"] == [1.0, 1.0]
    assert len(traces) == before


def stock_and_ours(build, compile_options, data, **fit_options):
    """Trains a model plainly and wrapped; returns weights and history of both."""
    outcomes = []
    for wrap in (lambda m: m, lambda m: RSFTModel(m, LossThreshold(1e9))):
        keras.utils.set_random_seed(0)
        inner = build()
        model = wrap(inner)
        model.compile(keras.optimizers.SGD(0.05), **compile_options())
        options = {"epochs": 2, "batch_size": 16, "verbose": 0, "shuffle": False}
        history = model.fit(*data, **options | fit_options).history
        outcomes.append((inner.get_weights(), history))
    return outcomes


def assert_same_training(outcomes):
    (stock, stock_logs), (ours, our_logs) = outcomes
    for one, other in zip(ours, stock, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for name, values in stock_logs.items():
        np.testing.assert_allclose(our_logs[name], values, rtol=1e-5)


def dense(units, **options):
    return lambda: keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(units, **options)]
    )


class NoTrainingArgument(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3, activation="softmax")

    def call(self, inputs):
        return self.dense(inputs)


LOSSES = {
    "string": (dense(3, activation="softmax"), lambda: SCORES, "labels"),
    "alias": (dense(3, activation="softmax"), lambda: "crossentropy", "labels"),
    "from logits": (
        dense(3),
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "labels",
    ),
    "one-hot, smoothed": (
        dense(3, activation="softmax"),
        lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        "one-hot",
    ),
    "object with arguments": (
        dense(1), lambda: keras.losses.Huber(delta=0.1), "numbers",
    ),
    "function": (
        dense(1),
        lambda: lambda y, p: keras.ops.mean(keras.ops.abs(y - p), axis=-1),
        "numbers",
    ),
    "name of a function, targets of rank 1": (dense(1), lambda: "mse", "numbers"),
    "several values a sample": (
        lambda: keras.Sequential(
            [keras.Input((8,)), keras.layers.Reshape((4, 2)), keras.layers.Dense(1)]
        ),
        lambda: "mse",
        "sequences",
    ),
    "regularised": (
        dense(3, activation="softmax", kernel_regularizer="l2",
              activity_regularizer="l2"),
        lambda: SCORES,
        "labels",
    ),
    "built lazily": (
        lambda: keras.Sequential([keras.layers.Dense(3, activation="softmax")]),
        lambda: SCORES,
        "labels",
    ),
    "no training argument": (NoTrainingArgument, lambda: SCORES, "labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_any_loss_trains_as_in_stock_keras(case, small_data):
    build, loss, kind = LOSSES[case]
    x, labels = small_data
    targets = {
        "labels": labels,
        "one-hot": np.eye(3, dtype="float32")[labels],
        "numbers": labels.astype("float32"),
        "sequences": x[:, :4, None],
    }[kind]
    eagerly = case not in ("function", "several values a sample", "regularised")
    options = {"run_eagerly": eagerly}
    outcomes = stock_and_ours(build, lambda: options | {"loss": loss()}, (x, targets))
    assert_same_training(outcomes)


@pytest.mark.parametrize(
    "container", [pytest.param(dict, marks=pytest.mark.slow), list]
)
def test_several_outputs(container, small_data):
    x, labels = small_data
    number = labels.astype("float32")[:, None]
    scores = keras.losses.SparseCategoricalCrossentropy()
    targets = {"scores": labels, "number": number}
    losses = {"scores": scores, "number": keras.losses.Huber(delta=0.3)}
    weights = {"scores": 0.7, "number": 2.0}
    if container is list:
        targets, losses, weights = (
            list(v.values()) for v in (targets, losses, weights)
        )

    def build():
        inputs = keras.Input((8,))
        outputs = [
            keras.layers.Dense(3, activation="softmax", name="scores")(inputs),
            keras.layers.Dense(1, name="number")(inputs),
        ]
        if container is dict:
            outputs = dict(zip(("scores", "number"), outputs, strict=True))
        return keras.Model(inputs, outputs)

    sample_weight = keras.tree.map_structure(
        lambda weight: np.linspace(0, weight, 48), weights
    )
    assert_same_training(
        stock_and_ours(
            build,
            lambda: {
                "loss": losses,
                "loss_weights": weights,
                "run_eagerly": container is list,
            },
            (x, targets),
            sample_weight=sample_weight,
        )
    )


def test_inputs_may_be_a_dict_with_a_bad_row(small_data):
    x, y = small_data[0][:16].copy(), small_data[1][:16]
    x[3] = np.nan
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    scores = keras.layers.Dense(3, activation="softmax")(joined)
    model = RSFTModel(
        keras.Model({"left": left, "right": right}, scores), LossThreshold(9.0)
    )
    model.compile("sgd", SCORES, run_eagerly=True)
    model.fit({"left": x[:, :4], "right": x[:, 4:]}, y, verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_tf_data_and_py_dataset(small_data):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(16 * index, 16 * index + 16)
            return small_data[0][part], small_data[1][part]

    histories = []
    for data in (
        tf.data.Dataset.from_tensor_slices(small_data).batch(16),
        Batches(),
    ):
        model = linear_model(LossThreshold(1.2), **COMPILED)
        history = model.fit(data, epochs=2, verbose=0, shuffle=False).history
        histories.append(history)
        assert len(model.predict(small_data[0], verbose=0)) == 48
        evaluated = model.evaluate(data, verbose=0, return_dict=True)
        assert set(evaluated) == {"loss"}
    assert histories[0] == histories[1]
    assert 0 < histories[0]["acceptance_rate"][-1] < 1


@pytest.mark.only_under("tensorflow", reason="tf.distribute is TensorFlow's")
def test_a_strategy_without_mirrored_variables_is_refused(small_data, monkeypatch):
    model = linear_model(AcceptAll())

    class Two:
        num_replicas_in_sync = 2

    monkeypatch.setattr(type(model), "distribute_strategy", Two())
    with pytest.raises(ValueError, match="MirroredStrategy"):
        model.fit(*small_data, verbose=0)
