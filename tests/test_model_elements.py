"""Selection of elements within samples: pixels, boxes, time steps, labels."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft._ledger import RejectionLedger
from keras_rsft.errors import InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AcceptListed
from keras_rsft.policies._policy import Policy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
)

SCORES = "sparse_categorical_crossentropy"
MODES = pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"run_eagerly": True}]
)
RATE = 0.5
# Of a batch of three samples with four places each.
MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)


class AcceptPlaces(Policy):
    """Accepts the same places of every batch."""

    level = "element"

    def __init__(self, places):
        super().__init__()
        self.places = np.ravel(places)

    def decide(self, batch):
        return keras.ops.convert_to_tensor(self.places)


@pytest.fixture(scope="module")
def places():
    """Inputs `(3, 4, 5)` and a class of three for each of the twelve places."""
    rng = np.random.default_rng(2)
    return rng.normal(size=(3, 4, 5)).astype("float32"), rng.integers(0, 3, (3, 4))


def linear(policy, *, units=3, activation="softmax", loss=SCORES, **options):
    """One linear layer, at zero, for each place or sample."""
    layer = keras.layers.Dense(units, activation, kernel_initializer="zeros")
    model = RSFTModel(keras.Sequential([layer]), policy)
    model.compile(keras.optimizers.SGD(RATE), loss, **options)
    return model


def softmax_kernel(x, y, weights):
    """The kernel after a step from zero, where each class has probability 1/3.

    `weights` are 0 for what is rejected; the mean is over those above it.
    """
    error = (1 / 3 - np.eye(3)[y]) * weights[..., None]
    return -RATE * np.einsum("bpi,bpo->io", x, error) / np.count_nonzero(weights)


def kernel_of(model):
    return model.model.get_weights()[0]


@MODES
class TestGradient:
    def test_is_the_mean_over_the_accepted_of_the_whole_batch(self, places, options):
        model = linear(AcceptPlaces(MASK), **options)
        logs = model.train_on_batch(*places, return_dict=True)
        expected = softmax_kernel(*places, MASK)
        np.testing.assert_allclose(kernel_of(model), expected, atol=1e-6)
        assert logs["acceptance_rate"] == pytest.approx(4 / 12)
        assert logs["accepted_loss"] == pytest.approx(np.log(3), abs=1e-5)

    def test_a_target_of_nan_leaves_the_rest_of_its_sample_alone(self, places, options):
        x, y = places[0], places[1][..., None].astype("float32")
        y[0, 1], y[2, 3] = np.nan, np.inf
        policy = LossThreshold(9.0, level="element")
        model = linear(policy, units=1, activation=None, loss="mse", **options)
        logs = model.train_on_batch(x, y, return_dict=True)
        error = np.where(np.isfinite(y), -2 * y, 0)  # Predictions are 0.
        expected = -RATE * np.einsum("bpi,bpo->io", x, error) / 10
        np.testing.assert_allclose(kernel_of(model), expected, atol=1e-6)
        assert logs["acceptance_rate"] == pytest.approx(10 / 12)
        assert np.isfinite(logs["loss"])
        assert model.selection_totals()["nonfinite"] == 2

    def test_an_input_of_nan_rejects_its_whole_sample(self, places, options):
        x, y = places[0].copy(), places[1]
        x[1, 2, 0] = np.nan
        model = linear(LossThreshold(9.0, level="element"), **options)
        model.train_on_batch(x, y)
        weights = np.ones((3, 4))
        weights[1] = 0
        expected = softmax_kernel(places[0], y, weights)
        np.testing.assert_allclose(kernel_of(model), expected, atol=1e-6)
        assert model.selection_totals()["nonfinite"] == 4


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
def test_weights_weigh_the_accepted_and_never_decide(places, shape):
    weights = np.linspace(0.5, 1e4, np.prod(shape)).reshape(shape)
    policy = KeepFraction(1.0, level="element")
    model = linear(policy)
    # Stock Keras, which computes the loss that is shown, takes no shape (3,) here.
    if shape == (3,):
        values = model._scorer(places[1], np.full((3, 4, 3), 1 / 3), weights)
        expected = np.log(3) * np.broadcast_to(weights[:, None], (3, 4))
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        return
    logs = model.train_on_batch(*places, sample_weight=weights, return_dict=True)
    each = np.broadcast_to(weights, (3, 4))
    expected = softmax_kernel(*places, each)
    np.testing.assert_allclose(kernel_of(model), expected, rtol=1e-4)
    assert logs["acceptance_rate"] == 1.0


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no element")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_nothing_accepted_changes_no_variable(places, values_of, optimizer):
    inner = keras.Sequential(
        [
            keras.Input((4, 5)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model = RSFTModel(inner, LossThreshold(1e9, level="element"))
    model.compile(optimizer, SCORES)
    model.fit(*places, verbose=0)
    before = values_of(inner, model.optimizer)
    model.policy.threshold.assign(1e-9)
    history = model.fit(*places, verbose=0).history
    for value, other in zip(values_of(inner, model.optimizer), before, strict=True):
        np.testing.assert_array_equal(value, other)
    assert history["acceptance_rate"] == [0.0]


def test_the_guard_speaks_of_elements(places):
    model = linear(LossThreshold(0.5, level="element"))
    with pytest.warns(UserWarning, match=r"accepted no element.*judged was 1\.099"):
        model.fit(*places, verbose=0)


class TestWhatAnElementIs:
    @pytest.mark.parametrize(
        "loss", ["binary_crossentropy", keras.losses.BinaryCrossentropy()]
    )
    def test_each_label_of_a_sample_with_several(self, places, loss):
        x, y = places[0][:, 0], np.array([[1, 0], [1, 1], [0, 1]], "float32")
        mask = np.array([[1, 0], [0, 0], [1, 1]], bool)
        policy = AcceptPlaces(mask)
        model = linear(policy, units=2, activation="sigmoid", loss=loss)
        logs = model.train_on_batch(x, y, return_dict=True)
        error = np.where(mask, 0.5 - y, 0)  # Probabilities are 1/2.
        np.testing.assert_allclose(kernel_of(model), -RATE * x.T @ error / 3, atol=1e-6)
        assert logs["acceptance_rate"] == pytest.approx(0.5)

    @pytest.mark.parametrize("squeezed", [True, False])
    def test_each_pixel_of_a_mask_of_one_channel(self, places, squeezed):
        y = np.zeros((3, 4) if squeezed else (3, 4, 1), "float32")
        policy = LossThreshold(9.0, level="element")
        model = linear(policy, units=1, activation="sigmoid", loss="crossentropy")
        model.train_on_batch(places[0], y)
        assert model.selection_totals()["samples"] == 12

    def test_each_box_not_each_coordinate(self, places):
        y = np.stack([places[1].astype("float32")] * 2, axis=-1)
        model = linear(AcceptPlaces(MASK), units=2, activation=None, loss="mse")
        logs = model.train_on_batch(places[0], y, return_dict=True)
        assert logs["accepted_loss"] == pytest.approx(np.mean(y[MASK] ** 2))

    def test_one_number_a_sample_is_refused(self, places):
        model = linear(AcceptPlaces(MASK))
        with pytest.raises(InvalidArgument, match="several values a sample"):
            model.train_on_batch(places[0][:, 0], places[1][:, 0])

    def test_a_loss_that_is_not_of_places_is_refused(self, places):
        def of_each_class(y, p):  # Such as Dice.
            return keras.ops.mean(p, axis=1)

        model = linear(AcceptPlaces(MASK), loss=of_each_class)
        with pytest.raises(InvalidArgument, match="each position of the predictions"):
            model.train_on_batch(*places)


class TestLeftOut:
    """Half of the pixels belong to a class that the loss ignores."""

    def ignoring(self, places, policy):
        y = places[1].copy()
        y[:, ::2] = 255
        loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=255)
        model = linear(policy, loss=loss)
        return model, y, model.train_on_batch(places[0], y, return_dict=True)

    def test_is_neither_judged_nor_counted(self, places):
        policy = LossThreshold(9.0, level="element")
        model, y, logs = self.ignoring(places, policy)
        weights = (y != 255).astype(float)
        expected = softmax_kernel(places[0], np.minimum(y, 2), weights)
        np.testing.assert_allclose(kernel_of(model), expected, atol=1e-6)
        totals = model.selection_totals()
        assert (totals["samples"], totals["nonfinite"]) == (6, 0)
        assert logs["acceptance_rate"] == 1.0
        assert logs["accepted_loss"] == pytest.approx(np.log(3), abs=1e-5)

    def test_does_not_make_a_sample_look_easy(self, places):
        logs = self.ignoring(places, LossThreshold(9.0))[2]
        assert logs["accepted_loss"] == pytest.approx(np.log(3), abs=1e-5)


def detector(policy, box_places=4, **options):
    inputs = keras.Input((4, 5))
    dense = keras.layers.Dense
    outputs = {
        "kind": dense(3, "softmax", kernel_initializer="zeros", name="kind")(inputs),
        "box": dense(4, kernel_initializer="zeros", name="box")(inputs[:, :box_places]),
    }
    model = RSFTModel(keras.Model(inputs, outputs), policy)
    losses = {"kind": SCORES, "box": keras.losses.Huber(delta=2.0)}
    model.compile(
        keras.optimizers.SGD(RATE), losses, {"kind": 1.0, "box": 0.25}, **options
    )
    return model


class TestSeveralOutputs:
    def targets(self, places):
        boxes = np.random.default_rng(3).uniform(-1, 1, (3, 4, 4)).astype("float32")
        return {"kind": places[1], "box": boxes}

    def test_losses_add_up_box_by_box(self, places):
        y = self.targets(places)
        model = detector(AcceptPlaces(MASK))
        logs = model.train_on_batch(places[0], y, return_dict=True)
        each = np.log(3) + 0.25 * np.mean(y["box"] ** 2 / 2, axis=-1)
        assert logs["accepted_loss"] == pytest.approx(each[MASK].mean(), rel=1e-5)
        error = np.where(MASK[..., None], -y["box"], 0) / 4 * 0.25
        kernel = -RATE * np.einsum("bpi,bpo->io", places[0], error) / 4
        found = model.model.get_layer("box").get_weights()[0]
        np.testing.assert_allclose(found, kernel, atol=1e-6)

    def test_a_bad_box_leaves_the_others_alone(self, places):
        y = self.targets(places)
        y["box"][1, 2, 0] = np.nan
        model = detector(LossThreshold(9.0, level="element"))
        logs = model.train_on_batch(places[0], y, return_dict=True)
        assert logs["acceptance_rate"] == pytest.approx(11 / 12)
        assert all(np.isfinite(weight).all() for weight in model.get_weights())

    def test_other_shapes_are_refused(self, places):
        y = self.targets(places)
        y["box"] = y["box"][:, :2]
        model = detector(AcceptPlaces(MASK), box_places=2)
        with pytest.raises(InvalidArgument, match="same shape from all outputs"):
            model.train_on_batch(places[0], y)

    def test_a_sample_is_the_mean_over_its_boxes(self, places):
        y = self.targets(places)
        each = np.log(3) + 0.25 * np.mean(y["box"] ** 2 / 2, axis=(1, 2))
        model = detector(LossThreshold(float(np.median(each)) + 1e-5))
        logs = model.train_on_batch(places[0], y, return_dict=True)
        assert logs["acceptance_rate"] == pytest.approx(2 / 3)
        assert logs["accepted_loss"] == pytest.approx(np.sort(each)[:2].mean())


@pytest.mark.parametrize("level", ["sample", "element"])
def test_accepting_everything_trains_as_stock_keras(level, places):
    outcomes = []
    for wrap in (lambda m: m, lambda m: RSFTModel(m, LossThreshold(1e9, level=level))):
        keras.utils.set_random_seed(0)
        inner = keras.Sequential(
            [keras.Input((4, 5)), keras.layers.Dense(3, activation="softmax")]
        )
        model = wrap(inner)
        model.compile(keras.optimizers.SGD(0.05), SCORES)
        history = model.fit(*places, epochs=3, verbose=0, shuffle=False).history
        outcomes.append((inner.get_weights(), history["loss"]))
    for one, other in zip(*(weights for weights, _ in outcomes), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(outcomes[0][1], outcomes[1][1], rtol=1e-5)


class TestPolicies:
    def test_a_fraction_is_of_the_whole_batch(self):
        losses = np.array([[1.0, 9.0, 2.0], [8.0, 7.0, 3.0]], "float32")
        mask = KeepFraction(0.5, level="element")(losses)
        np.testing.assert_array_equal(mask, losses <= 3)

    def test_classes_have_their_own_threshold(self):
        losses = np.array([[1.0, 10.0], [3.0, 30.0]], "float32")
        labels = np.array([[0, 1], [0, 1]])
        mask = RunningThreshold(num_classes=2, level="element")(losses, labels)
        np.testing.assert_array_equal(mask, [[True, True], [False, False]])

    @pytest.mark.parametrize("kind", ["integers", "one column", "one-hot"])
    def test_the_classes_are_those_of_the_targets(self, kind, places):
        y = places[1]
        loss = "categorical_crossentropy" if kind == "one-hot" else SCORES
        if kind != "integers":
            y = y[..., None] if kind == "one column" else np.eye(3)[y]
        policy = RunningThreshold(1.0, num_classes=3, level="element")
        model = linear(policy, loss=loss)
        model.train_on_batch(places[0], y)
        _, mean, _ = policy.statistics.numpy().T
        np.testing.assert_allclose(mean, np.log(3), rtol=1e-5)

    @pytest.mark.parametrize(
        "policy",
        [
            LossThreshold(2.0, level="element", warmup_steps=1),
            KeepFraction(0.7, level="element"),
            SelfPaced(2.0, growth_steps=3, level="element"),
            RunningThreshold(1.0, num_classes=3, warmup_steps=1, level="element"),
        ],
        ids=lambda policy: type(policy).__name__,
    )
    def test_a_saved_model_goes_on_alike(self, policy, places, tmp_path):
        model = linear(policy)
        model.fit(*places, epochs=2, verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.policy.level == "element"
        for one in (model, loaded):
            one.fit(*places, epochs=1, verbose=0)
        np.testing.assert_array_equal(kernel_of(loaded), kernel_of(model))

    @pytest.mark.parametrize(
        "make",
        [
            AcceptAll,
            LossMixture,
            lambda level: AcceptListed(np.ones(3, bool), level=level),
        ],
        ids=["AcceptAll", "LossMixture", "AcceptListed"],
    )
    def test_others_refuse(self, make):
        with pytest.raises(InvalidArgument, match="judged by LossThreshold"):
            make(level="element")

    def test_a_class_floor_is_refused(self):
        with pytest.raises(InvalidArgument, match="RunningThreshold"):
            LossThreshold(1.0, level="element", class_floor=0.1)


def test_a_ledger_notes_means_and_majorities(places):
    x, y = places[0], places[1][..., None].astype("float32")
    y[2] = np.nan
    y[0, 1] = np.nan
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
    ledger = RejectionLedger(np.array(["a", "b", "c"]), np.zeros(3, int))
    model = linear(AcceptPlaces(mask), units=1, activation=None, loss="mse")
    data = tf.data.Dataset.from_tensors((x, y, np.arange(3, dtype="int32")))
    data = data.map(lambda x, y, index: (x, y, None, index))
    with pytest.warns(UserWarning, match="5 of 12 elements"):
        model.fit(data, verbose=0, callbacks=[ledger])
    losses, accepted = ledger.last_epoch
    assert accepted.tolist() == [1, 0, 0]
    squares = y[..., 0] ** 2
    expected = [squares[0, [0, 2, 3]].mean(), squares[1].mean(), np.nan]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
