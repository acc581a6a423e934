"""`fit` of arrays, a `PyDataset` and `tf.data`: which sample each row is; `auto`."""

from __future__ import annotations

import math
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft._ledger import RejectionLedger
from keras_rsft.config import PolicyConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.label_quality._audit import audit_labels
from keras_rsft.model._data import Samples, class_labels, with_ids
from keras_rsft.model._metrics import AcceptanceGuard
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AcceptListed, AutoPolicy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
)

pytestmark = pytest.mark.usefixtures("eager")

COUNT, WRONG = 90, np.arange(12)
SPARSE = "sparse_categorical_crossentropy"


@pytest.fixture(scope="module")
def made():
    """Three far-off groups of 90 rows in all, the first 12 of them mislabelled."""
    right = np.arange(COUNT) % 3
    noise = np.random.default_rng(0).normal(size=(COUNT, 4))
    x = (noise + 8 * np.eye(4)[right]).astype("float32")
    given = right.copy()
    given[WRONG] = (given[WRONG] + 1) % 3
    return x, given


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, **options):
        super().__init__(**options)
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, number):
        rows = [slice(0, 40), slice(40, 70), slice(70, 90)][number]
        return self.x[rows], self.y[rows]


def a_model(**options):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    hidden = keras.layers.Dense(16, activation="relu", name="hidden")(x)
    scores = keras.layers.Dense(3, activation="softmax", **options)(hidden)
    return keras.Model(x, scores)


def fitted(policy, data, ledger=None, loss=SPARSE, **options):
    model = RSFTModel(a_model(), policy)
    model.compile(keras.optimizers.SGD(0.05), loss)
    ledger = RejectionLedger() if ledger is None else ledger
    options = {"epochs": 2, "verbose": 0} | options
    model.fit(*data, callbacks=[ledger], **options)
    return model, ledger.ledger


class TestTheIndexTravelsWithTheRow:
    @pytest.fixture(scope="class")
    def accept(self):
        return np.random.default_rng(1).random(COUNT) < 0.5

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"batch_size": 7},
            {"shuffle": False},
            {"shuffle": "batch"},
            {"class_weight": {0: 1.0, 1: 2.0, 2: 1.0}},
            {"sample_weight": np.linspace(0.5, 1.5, COUNT)},
            {"steps_per_epoch": 9},
            {"validation_data": (np.zeros((3, 4)), np.arange(3))},
        ],
        ids=str,
    )
    def test_in_arrays(self, made, accept, options):
        _, ledger = fitted(AcceptListed(accept), made, **options)
        np.testing.assert_array_equal(ledger.labels, made[1])
        np.testing.assert_array_equal(ledger.seen, 2)
        np.testing.assert_array_equal(ledger.accepted, 2 * accept)
        assert ledger.ids[[0, 89]].tolist() == ["0", "89"]

    def test_and_so_does_its_loss(self, made):
        x, y = made
        model = RSFTModel(a_model(), AcceptAll())
        model.compile(keras.optimizers.SGD(0.0), SPARSE)
        ledger = RejectionLedger()
        model.fit(x, y, verbose=0, callbacks=[ledger])
        expected = keras.losses.sparse_categorical_crossentropy(y, model(x))
        np.testing.assert_allclose(ledger.ledger.loss_last, expected, rtol=1e-5)

    def test_of_a_part_that_is_left_for_training(self, made, accept):
        first = accept[:72]
        _, ledger = fitted(AcceptListed(first), made, validation_split=0.2)
        np.testing.assert_array_equal(ledger.labels, made[1][:72])
        np.testing.assert_array_equal(ledger.accepted, 2 * first)

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_with_several_inputs(self, made, accept, as_dict):
        x, y = made
        inputs = {name: keras.Input((4,), name=name) for name in "ab"}
        both = keras.layers.Concatenate()(list(inputs.values()))
        net = keras.Model(
            inputs if as_dict else list(inputs.values()), keras.layers.Dense(3)(both)
        )
        model = RSFTModel(net, AcceptListed(accept))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        ledger = RejectionLedger()
        given = {"a": x, "b": x} if as_dict else [x, x]
        model.fit(given, y, verbose=0, callbacks=[ledger])
        np.testing.assert_array_equal(ledger.ledger.accepted, accept)

    def test_with_one_hot_labels(self, made, accept):
        x, y = made
        data = (x, np.eye(3, dtype="float32")[y])
        _, ledger = fitted(AcceptListed(accept), data, loss="categorical_crossentropy")
        np.testing.assert_array_equal(ledger.labels, y)

    @pytest.mark.parametrize("options", [{}, {"workers": 2}])
    def test_in_a_py_dataset(self, made, accept, options):
        data = (Batches(*made, **options),)
        _, ledger = fitted(AcceptListed(accept), data, shuffle=True)
        np.testing.assert_array_equal(ledger.labels, made[1])
        np.testing.assert_array_equal(ledger.accepted, 2 * accept)

    def test_in_a_py_dataset_with_class_weights(self, made, accept):
        weights = {0: 1.0, 1: 5.0, 2: 1.0}
        models = [
            fitted(AcceptListed(accept), data, class_weight=weights, shuffle=False)[0]
            for data in ((Batches(*made),), (Batches(*made, workers=2),))
        ]
        plain = fitted(AcceptListed(accept), (Batches(*made),), shuffle=False)[0]
        kernels = [one.model.get_weights()[0] for one in (*models, plain)]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        assert not np.array_equal(kernels[0], kernels[2])

    @pytest.mark.parametrize("batched", [False, True])
    def test_in_tf_data(self, made, accept, batched):
        dataset = tf.data.Dataset.from_tensor_slices(made)
        if batched:
            data = with_ids(dataset.batch(16)).shuffle(6)
        else:
            data = with_ids(dataset).shuffle(90).batch(16)
        _, ledger = fitted(AcceptListed(accept), (data,))
        np.testing.assert_array_equal(ledger.labels, made[1])
        np.testing.assert_array_equal(ledger.accepted, 2 * accept)

    def test_a_user_given_callback_list(self, made):
        model = RSFTModel(a_model(), AcceptAll())
        model.compile("sgd", SPARSE)
        ledger = RejectionLedger()
        callbacks = keras.callbacks.CallbackList(
            [ledger], add_history=True, model=model
        )
        model.fit(*made, verbose=0, callbacks=callbacks)
        np.testing.assert_array_equal(ledger.ledger.seen, 1)

    def test_a_mixture_learns_from_it(self, made):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Too few epochs to tell two groups apart.
            _, ledger = fitted(LossMixture(warmup_steps=1), made, epochs=3)
        assert ledger.seen.min() == 3


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_accepting_everything_equals_stock_keras_in_the_same_order(made, shuffle):
    kernels = []
    for wrap in (lambda net: net, lambda net: RSFTModel(net, AcceptAll())):
        model = wrap(a_model())
        model.compile(keras.optimizers.Adam(0.01), SPARSE)
        keras.utils.set_random_seed(1)
        model.fit(*made, epochs=2, batch_size=16, verbose=0, shuffle=shuffle)
        kernels.append(model.get_weights()[0])
    np.testing.assert_array_equal(*kernels)


class TestWithIds:
    def test_keeps_weights_and_the_number_of_batches(self):
        rows = (np.zeros((5, 1)), np.arange(5), np.linspace(0, 1, 5))
        data = with_ids(tf.data.Dataset.from_tensor_slices(rows).batch(2))
        assert int(data.cardinality()) == 3
        (*_, weight, index) = list(data)[-1]
        assert (weight.numpy().tolist(), index.numpy().tolist()) == ([1.0], [4])
        assert index.dtype == tf.int32

    def test_numbers_single_samples_with_one_hot_labels(self):
        rows = (np.zeros((6, 8, 8, 3)), np.eye(3)[np.arange(6) % 3])
        data = with_ids(tf.data.Dataset.from_tensor_slices(rows))
        assert [int(index) for *_, index in data] == list(range(6))

    def test_refuses_an_order_that_changes(self, made):
        shuffled = tf.data.Dataset.from_tensor_slices(made).shuffle(90).batch(16)
        with pytest.raises(DataError, match="before `shuffle`"):
            with_ids(shuffled)

    @pytest.mark.parametrize("given", [np.zeros(3), tf.data.Dataset.range(3)])
    def test_refuses_what_has_no_targets(self, given):
        with pytest.raises(InvalidArgument, match="with_ids"):
            with_ids(given)


class TestWhatCannotBeNumbered:
    def test_unnumbered_tf_data(self, made):
        data = (tf.data.Dataset.from_tensor_slices(made).batch(16),)
        for policy in ("auto", "accept-all"):
            with pytest.raises(InvalidArgument, match=r"rsft.with_ids\(dataset\)"):
                fitted(policy, data)

    def test_tf_data_without_an_end(self, made):
        data = with_ids(tf.data.Dataset.from_tensor_slices(made).batch(16)).repeat()
        with pytest.raises(InvalidArgument, match="no end"):
            fitted("auto", (data,), steps_per_epoch=6)

    @pytest.mark.parametrize(
        "spoiled, said",
        [
            (lambda data: data.batch(16, drop_remainder=True), "drop_remainder"),
            (lambda data: data.repeat(2).batch(16), "90 that come more than once"),
        ],
    )
    def test_tf_data_that_leaves_samples_out(self, made, spoiled, said):
        data = with_ids(tf.data.Dataset.from_tensor_slices(made)).shuffle(90, seed=0)
        with pytest.raises(DataError, match=said):
            fitted(AcceptAll(), (spoiled(data),))

    def test_a_py_dataset_that_shuffles_its_rows(self, made):
        class Shuffled(Batches):
            def on_epoch_end(self):
                order = np.random.default_rng(0).permutation(COUNT)
                self.x, self.y = self.x[order], self.y[order]

        with pytest.raises(DataError, match="other samples than before"):
            fitted(AcceptAll(), (Shuffled(*made),))

    @pytest.mark.parametrize(
        "targets",
        [np.linspace(0, 1, COUNT), -np.arange(COUNT), np.ones((COUNT, 2))],
        ids=["regression", "negative", "several labels"],
    )
    def test_targets_that_are_no_classes(self, made, targets):
        with pytest.raises(InvalidArgument, match="one class a sample"):
            class_labels(targets)
        model = RSFTModel(keras.Sequential([keras.layers.Dense(1)]), AcceptAll())
        model.compile("sgd", "mse")
        with pytest.raises(InvalidArgument, match=r"RejectionLedger\(ids, labels\)"):
            model.fit(made[0], targets, verbose=0, callbacks=[RejectionLedger()])

    def test_empty_arrays(self, made):
        with pytest.raises(DataError, match="no sample to train on"):
            fitted("auto", (made[0][:0], made[1][:0]))

    def test_a_ledger_before_fit(self):
        with pytest.raises(InvalidArgument, match="takes its labels from `fit`"):
            RejectionLedger().ledger.seen.sum()

    def test_a_ledger_of_other_data(self, made):
        ledger = RejectionLedger()
        fitted(AcceptAll(), made, ledger)
        with pytest.raises(InvalidArgument, match="of 90 samples"):
            fitted(AcceptAll(), (made[0][:50], made[1][:50]), ledger)


@pytest.mark.parametrize(
    "given, classes",
    [
        (np.array([[0.9, 0.1], [0.2, 0.8]]), [0, 1]),
        (np.array([[2], [0]]), [2, 0]),
        (np.array([1.0, 0.0], "float32"), [1, 0]),
        (np.array([True, False]), [1, 0]),
    ],
)
def test_classes_of_targets(given, classes):
    assert class_labels(given).tolist() == classes


class TestAuto:
    @pytest.mark.parametrize("kind", ["arrays", "batches", "tf.data"])
    def test_leaves_out_the_wrong_labels(self, made, kind, capsys):
        data = {
            "arrays": made,
            "batches": (Batches(*made),),
            "tf.data": (
                with_ids(tf.data.Dataset.from_tensor_slices(made)).shuffle(90).batch(9),
            ),
        }[kind]
        model, ledger = fitted("auto", data, verbose=2)
        assert isinstance(model.policy, AutoPolicy)
        assert "12 look wrong. 12 are left out." in capsys.readouterr().out
        np.testing.assert_array_equal(np.flatnonzero(ledger.looks_wrong), WRONG)
        np.testing.assert_array_equal(ledger.rejected, 2 * ledger.looks_wrong)
        right = np.arange(COUNT)[WRONG] % 3
        np.testing.assert_array_equal(ledger.predicted[WRONG], right)

    def test_says_nothing_if_verbose_says_so(self, made, capsys):
        fitted("auto", made)
        assert capsys.readouterr().out == ""

    def test_the_list_is_kept_in_the_file_and_decided_once(self, made, tmp_path):
        model, _ = fitted("auto", made)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        expected = np.arange(COUNT) >= 12
        np.testing.assert_array_equal(loaded.policy.listed, expected)
        # Other labels, of which other ones would look wrong.
        loaded.fit(made[0], np.roll(made[1], 1), verbose=0)
        np.testing.assert_array_equal(loaded.policy.listed, expected)
        with pytest.raises(InvalidArgument, match="a list of 90 training samples"):
            loaded.fit(made[0][:50], made[1][:50], verbose=0)

    def test_a_model_that_is_saved_before_it_is_fitted(self, made, tmp_path):
        model = RSFTModel(a_model(), PolicyConfig(threshold=0.9), features_from=None)
        model = RSFTModel(a_model(), PolicyConfig("auto", threshold=0.9))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.policy == model.policy

    def test_features_of_a_layer_by_name(self, made):
        x, y = made
        net = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Rescaling(1.0, name="good"),
                keras.layers.Rescaling(0.0, name="constant"),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )
        found = {}
        for name in ("good", "constant", None):
            model = RSFTModel(net, "auto", features_from=name)
            model.compile("sgd", SPARSE)
            model.fit(x, y, verbose=0)
            found[name] = int(np.sum(~np.asarray(model.policy.listed)))
        assert found == {"good": 12, "constant": 0, None: 0}

    def test_features_are_averaged_over_their_inner_axes(self, made):
        x, y = made
        pictures = np.repeat(np.repeat(x[:, None, None], 3, 1), 2, 2)
        spots = np.random.default_rng(0).normal(size=x.shape) * 50
        pictures[:, 0, 0] += spots  # Gone in the mean.
        pictures[:, 1, 0] -= spots
        net = keras.Sequential(
            [
                keras.Input((3, 2, 4)),
                keras.layers.Rescaling(1.0, name="map"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.EinsumDense("ab,bc->ac", 3, activation="softmax"),
            ]
        )
        model = RSFTModel(net, "auto", features_from="map")
        model.compile("sgd", SPARSE)
        model.fit(pictures, y, verbose=0)
        assert int(np.sum(~np.asarray(model.policy.listed))) == 12

    def test_a_subclassed_model_that_is_not_built(self, made, monkeypatch):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.scores = keras.layers.Dense(3)  # Called last, and made first.
                self.hidden = keras.layers.Dense(64, activation="relu")

            def call(self, inputs):
                return self.scores(self.hidden(inputs))

        model = RSFTModel(Own(), "auto")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        widths = []

        def audited(features, *rest, **options):
            widths.append(features.dim)
            return audit_labels(features, *rest, **options)

        monkeypatch.setattr("keras_rsft.model._auto.audit_labels", audited)
        model.fit(*made, verbose=0)
        assert widths == [64]
        assert "call" not in vars(model.model.hidden)

    def test_features_that_say_too_little_are_not_trusted(self, made, capsys):
        rng = np.random.default_rng(0)
        right = np.arange(600) % 6
        x = (rng.normal(size=(600, 4)) + 0.8 * np.eye(6)[right][:, :4]).astype(
            "float32"
        )
        net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6)])
        model = RSFTModel(net, "auto")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        model.fit(x.astype("float32"), right, verbose=2)
        assert "too few to say which given ones are wrong" in capsys.readouterr().out
        assert np.asarray(model.policy.listed).all()

    @pytest.mark.parametrize(
        "layers, options, said",
        [
            ([keras.layers.EinsumDense("ab,bc->ac", 3)], {}, "without one"),
            ([keras.layers.Dense(3, name="scores")], {"features_from": "score"},
             "Did you mean 'scores'"),
        ],
    )  # fmt: skip
    def test_a_model_without_features(self, made, layers, options, said):
        net = keras.Sequential([keras.Input((4,)), *layers])
        model = RSFTModel(net, "auto", **options)
        model.compile("sgd", SPARSE)
        with pytest.raises(InvalidArgument, match=said):
            model.fit(*made, verbose=0)

    def test_features_from_is_for_auto(self):
        with pytest.raises(InvalidArgument, match="for another policy"):
            RSFTModel(a_model(), AcceptAll(), features_from="hidden")


class TestPoliciesByName:
    @pytest.mark.parametrize(
        "given, kind, values",
        [
            ("accept-all", AcceptAll, {}),
            ("loss-threshold", LossThreshold,
             {"threshold": 0.65 * math.log(3), "warmup_steps": 12}),
            (PolicyConfig(threshold=1.5, warmup_epochs=1), LossThreshold,
             {"threshold": 1.5, "warmup_steps": 6}),
            ("keep-fraction", KeepFraction, {"keep_fraction": 0.7, "ramp_steps": 12}),
            ("running-threshold", RunningThreshold, {"num_classes": 3}),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("numbered", [True, False])
    def test_is_made_by_the_first_fit(self, made, given, kind, values, numbered):
        data = made
        if not numbered:
            data = (tf.data.Dataset.from_tensor_slices(made).batch(15),)
        model = RSFTModel(a_model(), given)
        model.compile("sgd", SPARSE)
        model.fit(*data, verbose=0, batch_size=15 if numbered else None)
        assert type(model.policy) is kind
        config = model.policy.get_config()
        for name, value in values.items():
            assert config[name] == pytest.approx(value)
        first = model.policy
        model.fit(*data, verbose=0)
        assert model.policy is first

    def test_a_name_that_is_none(self):
        with pytest.raises(InvalidArgument, match="Did you mean 'auto'"):
            RSFTModel(a_model(), "atuo")

    def test_a_step_before_the_first_fit(self, made):
        model = RSFTModel(a_model(), "loss-threshold")
        model.compile("sgd", SPARSE)
        assert math.isfinite(model.evaluate(*made, verbose=0))
        with pytest.raises(InvalidArgument, match="Call `fit` first"):
            model.train_on_batch(*made)

    def test_judges_class_by_class_where_the_policy_does(self, made):
        net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "sigmoid")])
        model = RSFTModel(net, "running-threshold")
        model.compile("sgd", "binary_crossentropy")
        with pytest.raises(InvalidArgument, match="needs samples of one class"):
            model.fit(made[0], np.ones((COUNT, 2)), verbose=0)

    def test_a_model_that_was_built_by_a_call(self, made):
        net = keras.Sequential([keras.layers.Dense(3, activation="softmax")])
        model = RSFTModel(net, "loss-threshold")
        model.compile("sgd", SPARSE)
        model.predict(made[0], verbose=0)
        model.fit(*made, verbose=0)
        assert isinstance(model.policy, LossThreshold)

    def test_needs_to_know_how_long_an_epoch_is(self, made):
        rows = tf.data.Dataset.from_tensor_slices(made).filter(lambda x, y: True)
        model = RSFTModel(a_model(), "loss-threshold")
        model.compile("sgd", SPARSE)
        with pytest.raises(InvalidArgument, match="steps_per_epoch"):
            model.fit(rows.batch(15), verbose=0)
        model.fit(rows.batch(15), verbose=0, steps_per_epoch=6)
        assert model.policy.warmup_steps == 12


def test_inputs_of_some_samples(made):
    x, y = made
    batches = Batches(x, y)

    def in_order():
        for number, start in enumerate((0, 40, 70)):
            rows, labels = batches[number]
            yield rows, labels, None, np.arange(start, start + len(rows))

    found = Samples(in_order, 3).inputs(np.array([3, 71]))
    assert set(found) == {3, 71}
    np.testing.assert_array_equal(found[71], x[71])


class TestHarm:
    """What the guard says of epochs, given as judged and accepted of three classes."""

    LEARNT = ([40, 40, 40], [40, 40, 40], 1.0)

    def said(self, *epochs, warmup_steps=1):
        model = mock.Mock()
        model.policy.warmup_steps = warmup_steps
        model.optimizer = keras.optimizers.SGD()
        guard = AcceptanceGuard()
        guard.set_model(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number, (judged, accepted, loss) in enumerate(epochs):
                model.policy.steps_seen.numpy.return_value = number + 1
                samples = float(sum(judged))
                model.selection_totals.return_value = {
                    "samples": samples,
                    "accepted": float(sum(accepted)),
                    "loss_sum": loss * samples,
                    "nonfinite": 0.0,
                    "steps_not_finite": 0.0,
                    "lowest_loss_rejected": 1.0,
                }
                counted = np.array([judged, accepted], float).T
                model.selection.classes.numpy.return_value = counted
                guard.on_epoch_begin(number)
                guard.on_epoch_end(number, {})
        return [str(one.message) for one in caught]

    def test_a_class_that_is_not_learnt_any_more(self):
        late = ([40, 40, 40], [36, 27, 3], 1.5)
        (said,) = self.said(self.LEARNT, late, (*late[:2], 2.0))
        assert said == (
            "Epoch 2: the policy rejects what the model still has to learn: it accepts "
            "55 % of the samples (100 % in epoch 1) and hardly any of 1 of 3 classes, "
            'while the loss of all samples rises, from 1 to 1.5. Use policy="auto", '
            "a longer warm-up or a higher threshold."
        )

    @pytest.mark.parametrize(
        "late, warmup_steps",
        [
            (([40, 40, 40], [36, 27, 4], 1.5), 1),  # Exactly a tenth.
            (([40, 40, 40], [20, 20, 20], 1.5), 1),  # Noisy labels in all classes.
            (([40, 40, 40], [36, 27, 3], 0.9), 1),  # The loss falls.
            (([40, 40, 40], [36, 27, 3], 1.5), 2),  # The warm-up.
            (([40, 40, 9], [40, 40, 0], 1.5), 1),  # A class of a few samples.
        ],
    )
    def test_what_is_none(self, late, warmup_steps):
        assert not self.said(self.LEARNT, late, warmup_steps=warmup_steps)

    def test_classes_are_counted_by_their_labels(self, made):
        x, y = made
        model = RSFTModel(a_model(), AcceptListed(y != 2))
        model.compile("sgd", SPARSE)
        model.fit(x, y, verbose=0)
        judged, accepted = model.selection.classes.numpy().T
        np.testing.assert_array_equal(judged[:4], [*np.bincount(y), 0])
        np.testing.assert_array_equal(accepted[:3], [*np.bincount(y)[:2], 0])

    def test_of_a_network_from_scratch(self, made):
        """The same network and labels, at two thresholds."""
        x, y = made
        said = {}
        for threshold in (1.0, 1e9):
            model = RSFTModel(a_model(), LossThreshold(threshold, warmup_steps=2))
            model.compile(keras.optimizers.SGD(0.02), SPARSE)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.fit(x, y, epochs=8, verbose=0, shuffle=False)
            said[threshold] = [str(one.message) for one in caught]
        assert sum("still has to learn" in one for one in said[1.0]) == 1
        assert not said[1e9]
