"""What happened to each training sample, against a transcription in NumPy."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft._ledger import (
    Ledger,
    RejectionLedger,
    loss_histogram,
    rejection_quality,
)
from keras_rsft.errors import InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AcceptListed, AcceptReviewed, AutoPolicy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
)

NAN = float("nan")


def indexed(x, y, batch_size=16):
    """A data set that says which sample each row is."""
    index = np.arange(len(x), dtype=np.int32)
    dataset = tf.data.Dataset.from_tensor_slices((x, y, index)).batch(batch_size)
    return dataset.map(lambda x, y, index: (x, y, None, index))


def compiled(make_model, policy, **options):
    model = RSFTModel(make_model(), policy)
    model.compile(
        keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", **options
    )
    return model


def linear_model():
    """Without BatchNorm, through which a NaN reaches the rest of its batch."""
    keras.utils.set_random_seed(0)
    head = keras.layers.Dense(3, activation="softmax")
    return keras.Sequential([keras.Input((8,)), head])


def ledger_of(labels, clean_labels=None):
    ids = [f"{i}.jpg" for i in range(len(labels))]
    return RejectionLedger(ids, labels, clean_labels)


class TestCallback:
    @pytest.mark.parametrize(
        "options",
        [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}],
    )
    def test_losses_and_decisions_are_those_of_the_steps(
        self, small_data, options, compile_options
    ):
        x, y = small_data
        x = x.copy()
        x[5] = NAN
        options = compile_options(**options)
        model = compiled(linear_model, LossThreshold(1.1), **options)
        callback = ledger_of(y)
        seen = []

        class Spy(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append(logs["acceptance_rate"])

        model.fit(indexed(x, y), epochs=3, verbose=0, callbacks=[callback, Spy()])
        ledger = callback.ledger
        np.testing.assert_array_equal(ledger.seen, 3)
        assert 0 < ledger.accepted.sum() == pytest.approx(48 * sum(seen))
        assert ledger.accepted[5] == 0
        assert np.isnan(ledger.loss_last[5])
        assert np.isnan(ledger.loss_mean[5])
        assert ledger.suspicion[5] == 1.0  # Without a loss: the most suspicious.
        assert np.isfinite(ledger.loss_mean[np.arange(48) != 5]).all()

    def test_sums_over_epochs_by_hand(self):
        ledger = Ledger(["a", "b", "c"], [0, 1, 0])
        ledger.note_epoch(np.array([1.0, 4.0, 0.0]), np.array([1.0, 0.0, -1.0]))
        ledger.note_epoch(np.array([0.5, NAN, 3.0]), np.array([1.0, 0.0, 1.0]))
        np.testing.assert_array_equal(ledger.seen, [2, 2, 1])
        np.testing.assert_array_equal(ledger.accepted, [2, 0, 1])
        np.testing.assert_array_equal(ledger.rejected, [0, 2, 0])
        np.testing.assert_allclose(ledger.loss_mean, [0.75, 4.0, 3.0])
        np.testing.assert_allclose(ledger.loss_last, [0.5, NAN, 3.0])
        np.testing.assert_allclose(ledger.loss_trend, [-0.5, NAN, 0.0])
        np.testing.assert_allclose(ledger.suspicion, [0.0, 1.0, 0.5])

    def test_trains_like_a_fit_without_it(self, small_data, make_model, values_of):
        x, y = small_data
        plain = compiled(make_model, LossThreshold(1.1))
        plain.fit(indexed(x, y), epochs=2, verbose=0)
        recorded = compiled(make_model, LossThreshold(1.1))
        recorded.fit(indexed(x, y), epochs=2, verbose=0, callbacks=[ledger_of(y)])
        for one, other in zip(values_of(plain), values_of(recorded), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_quality_of_rejection_in_the_logs(self, small_data, make_model):
        x, y = small_data
        right = y.copy()
        right[:6] = (right[:6] + 1) % 3
        accept = np.ones(48, bool)
        accept[[0, 1, 2, 40]] = False  # Three wrong labels of six, and a right one.
        callback = ledger_of(y, right)
        model = compiled(make_model, AcceptListed(accept))
        history = model.fit(indexed(x, y), verbose=0, callbacks=[callback]).history
        assert history["rejection_precision"] == [0.75]
        assert history["rejection_recall"] == [0.5]
        by_class = [accept[y == label].mean() for label in range(3)]
        np.testing.assert_allclose(callback.acceptance_by_class, [by_class], rtol=1e-6)

    def test_needs_to_know_the_samples(self, small_data, make_model):
        x, y = small_data
        model = compiled(make_model, AcceptAll())
        unnumbered = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
        with pytest.raises(InvalidArgument, match="with_ids"):
            model.fit(unnumbered, verbose=0, callbacks=[ledger_of(y)])

    def test_fit_goes_on_without_it_afterwards(self, small_data, make_model):
        x, y = small_data
        model = compiled(make_model, AcceptAll())
        callback = ledger_of(y)
        model.fit(indexed(x, y), verbose=0, callbacks=[callback])
        model.fit(x, y, verbose=0)
        np.testing.assert_array_equal(callback.ledger.seen, 1)

    def test_a_fit_that_fails_leaves_no_ledger_attached(self, small_data, make_model):
        x, y = small_data
        model = compiled(make_model, AcceptAll())

        class Interrupt(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.fit(indexed(x, y), verbose=0, callbacks=[ledger_of(y), Interrupt()])
        model.fit(x, y, verbose=0)


class TestLedger:
    def test_memory(self):
        count = 1000
        ledger = Ledger(np.arange(count), np.zeros(count))
        arrays = [v for v in vars(ledger).values() if isinstance(v, np.ndarray)]
        own = sum(array.nbytes for array in arrays) - ledger.ids.nbytes
        assert own + 8 * count <= 100 * count  # 8: the variable on the device.

    def test_a_sample_that_was_never_seen_is_not_suspicious(self):
        ledger = Ledger(["a", "b", "c", "d"], [0, 1, 0, 1])
        ledger.note_epoch(np.array([2, 1, 0, NAN]), np.array([1.0, 0, -1, 1]))
        np.testing.assert_allclose(ledger.suspicion, [0.5, 0.0, 0.0, 1.0])
        assert Ledger(["a", "b"], [0, 1]).suspicion.tolist() == [0.0, 0.0]

    def test_probabilities_give_the_suspicion(self):
        ledger = Ledger(["a", "b"], [0, 1])
        ledger.note_probabilities(np.array([[0.9, 0.1], [0.7, 0.3]]))
        np.testing.assert_allclose(ledger.suspicion, [0.1, 0.7], rtol=1e-6)
        np.testing.assert_array_equal(ledger.predicted, [0, 0])

    def test_rows_leave_out_what_is_not_known(self):
        ledger = Ledger(["a"], [1], [0])
        (row,) = ledger.rows(("cat", "dog"))
        assert row == [
            "a",
            "train",
            "dog",
            "cat",
            "",
            "",
            "",
            "",
            "",
            "0",
            "0",
            "0",
            "0",
            "",
            "0",
        ]

    def test_lengths_must_agree(self):
        with pytest.raises(InvalidArgument, match="equally long"):
            Ledger(["a"], [1, 2])

    def test_quality_where_there_is_nothing_to_divide_by(self):
        none = np.zeros(3, bool)
        assert rejection_quality(none, none) == {
            "rejection_precision": 0.0,
            "rejection_recall": 0.0,
        }


class TestPoliciesThatKnowTheSamples:
    def test_only_listed_samples_change_the_weights(self, small_data, make_model):
        x, y = small_data
        accept = np.arange(48) % 3 == 0
        weights = []
        for labels in (y, np.where(accept, y, (y + 1) % 3)):
            model = compiled(make_model, AcceptListed(accept))
            model.fit(indexed(x, labels), epochs=2, verbose=0)
            weights.append(model.get_weights())
        for one, other in zip(*weights, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_auto_leaves_out_what_is_too_hard_but_no_class(self):
        policy = AutoPolicy(6, loss_limit=1.0, warmup_steps=1)
        policy.listed.assign([True, True, True, True, True, False])
        losses = np.array([0.5, 1.5, 1.0, 3.0, 2.0, 0.1], "float32")
        labels = np.array([0, 0, 0, 1, 1, 1], "int32")
        index = np.arange(6, dtype="int32")
        first = policy(losses, labels, index)  # The warm-up: the listed alone.
        assert np.array(first).tolist() == [True] * 5 + [False]
        # Of class 1 none is below the limit: the easiest of the listed is accepted.
        then = policy(losses, labels, index)
        assert np.array(then).tolist() == [True, False, False, False, True, False]
        without_labels = policy(losses, None, index)
        assert np.array(without_labels).tolist() == [True] + [False] * 5

    @pytest.mark.parametrize("reviewed", [False, True])
    def test_auto_weighs_what_it_accepts(self, small_data, tmp_path, reviewed):
        x, y = small_data
        accept, weights = np.arange(48) % 3 > 0, np.linspace(0, 1, 48)
        layers = [
            keras.layers.Dense(3, activation="softmax", kernel_initializer="zeros")
        ]
        policy = AutoPolicy(accept, weights=weights)
        if reviewed:
            policy = AcceptReviewed(policy, np.arange(48) == 3)
            accept = accept | (np.arange(48) == 3)
        model = RSFTModel(keras.Sequential([keras.Input((8,)), *layers]), policy)
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        first = model.fit(x, y, batch_size=48, epochs=1, verbose=0, shuffle=False)
        errors = (1 / 3 - np.eye(3)[y]) * (accept * weights / accept.sum())[:, None]
        kernel, bias = layers[0].get_weights()
        np.testing.assert_allclose(kernel, -0.5 * x.T @ errors, atol=1e-6)
        np.testing.assert_allclose(bias, -0.5 * errors.sum(axis=0), atol=1e-6)
        # Losses are shown as they are.
        assert first.history["accepted_loss"] == pytest.approx([np.log(3)])
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras").policy
        found = np.asarray(again.weights_of(np.arange(48)))
        np.testing.assert_allclose(found, weights, atol=1e-7)

    @pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0], [1.0, np.nan], [[1.0, 1.0]]])
    def test_auto_refuses_weights_that_are_none(self, wrong):
        with pytest.raises(InvalidArgument, match=r"`weights` must be a number in"):
            AutoPolicy(2, weights=wrong)

    @pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan])
    def test_auto_refuses_a_limit_that_is_not_positive(self, wrong):
        with pytest.raises(InvalidArgument, match="loss_limit"):
            AutoPolicy(6, loss_limit=wrong)

    def test_refuses_a_data_set_without_indices(self, small_data, make_model):
        unnumbered = tf.data.Dataset.from_tensor_slices(small_data).batch(16)
        with pytest.raises(InvalidArgument, match="AcceptListed must be told"):
            compiled(make_model, AcceptListed(48)).fit(unnumbered, verbose=0)

    @pytest.mark.parametrize("accept", [[], [False], [[True]], [1.0, 0.0], 0])
    def test_refuses_what_is_no_list(self, accept):
        with pytest.raises(InvalidArgument, match="accept"):
            AcceptListed(accept)

    def test_mixture_rejects_the_upper_group(self):
        policy = LossMixture()
        rng = np.random.default_rng(0)
        low, high = rng.normal(0.5, 0.1, 80), rng.normal(4.0, 0.2, 40)
        policy.note_losses(np.r_[low, high, NAN], epochs=2)
        threshold = float(policy.threshold)
        # What is equal to the threshold is rejected.
        assert low.max() < threshold <= np.float32(high.min())

    # Two epochs where nothing else is said.
    @pytest.mark.parametrize("warmup_steps, seen", [(None, 4), (8, 7)])
    def test_mixture_waits_and_keeps_all_where_there_is_one_group(
        self, warmup_steps, seen
    ):
        policy = LossMixture(warmup_steps=warmup_steps)
        policy.note_steps_seen(seen)
        losses = np.random.default_rng(0).normal(1.0, 0.1, 200)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # As a fit gives below.
            policy.note_losses(losses, epochs=1)
        assert np.isinf(policy.threshold)
        policy.note_steps_seen(8)
        with pytest.warns(UserWarning, match="do not fall into two groups"):
            policy.note_losses(losses, epochs=2)
        assert np.isinf(policy.threshold)

    @pytest.mark.parametrize("losses", [np.zeros(500), np.r_[np.zeros(500), 1, 2], []])
    def test_mixture_of_losses_that_hardly_differ(self, losses):
        policy = LossMixture()
        with pytest.warns(UserWarning, match="Too few different losses"):
            policy.note_losses(np.array(losses, float), epochs=2)
        assert np.isinf(policy.threshold)

    def test_mixture_needs_a_ledger(self, small_data, make_model):
        x, y = small_data
        model = compiled(make_model, LossMixture())
        with pytest.raises(InvalidArgument, match="learns from a ledger"):
            model.fit(indexed(x, y), verbose=0)
        model.fit(indexed(x, y), verbose=0, callbacks=[ledger_of(y)])

    @pytest.mark.parametrize(
        "policy",
        [
            lambda: AcceptListed(np.arange(48) % 2 == 0),
            lambda: AutoPolicy(48, loss_limit=1.0, warmup_steps=3),
            lambda: LossMixture(0.6, warmup_steps=0),
            *(
                pytest.param(policy, marks=pytest.mark.slow)
                for policy in (
                    lambda: AutoPolicy(48),
                    lambda: SelfPaced(1.0, growth_steps=3, class_floor=0.25),
                    lambda: RunningThreshold(0.5, num_classes=3),
                    lambda: LossMixture(0.6),
                )
            ),
        ],
    )
    def test_state_is_saved_and_training_goes_on_alike(
        self, small_data, make_model, tmp_path, policy
    ):
        x, y = small_data
        policy = policy()
        # One of them compiled.
        eagerly = not isinstance(policy, RunningThreshold)
        model = compiled(make_model, policy, run_eagerly=eagerly)
        model.fit(indexed(x, y), epochs=2, verbose=0, callbacks=[ledger_of(y)])
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for one, other in zip(
            model.policy.get_weights(), loaded.policy.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        assert loaded.policy.get_config() == model.policy.get_config()
        for trained in (model, loaded):
            trained.fit(indexed(x, y), verbose=0, callbacks=[ledger_of(y)])
        for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


class TestLossHistogram:
    def test_counts_by_hand(self):
        losses = np.array([0.0, 1e-3, 1.0, 1.0, 500.0, NAN, np.inf, 2.0])
        accepted = np.array([1, 1, 1, 0, 0, 0, 0, -1.0])
        histogram = loss_histogram(losses, accepted, 1.5)
        assert histogram.accepted.sum() == 3
        assert histogram.accepted[0] == 2  # What lies below counts as the lowest.
        assert histogram.rejected.sum() == 2
        assert histogram.rejected[-1] == 1
        rows = list(histogram.rows(7))
        assert len(rows) == 3
        assert rows[0] == [7, "1.5", "0.001", "0.00125893", 2, 0]
        assert sum(row[4] + row[5] for row in rows) == 5

    @pytest.mark.parametrize(
        "policy, during, after",
        [
            (LossThreshold(1.5, warmup_steps=1), None, 1.5),
            (SelfPaced(1.0, growth=2.0, growth_steps=1, warmup_steps=1), None, 1.0),
            (AutoPolicy(4, loss_limit=0.7, warmup_steps=1), None, 0.7),
            (KeepFraction(0.5), None, None),
            (AcceptAll(), None, None),
            (LossMixture(), None, None),
        ],
    )
    def test_the_threshold_in_use(self, policy, during, after):
        losses = np.ones(4, np.float32)
        index = np.arange(4, dtype=np.int32)
        for expected in (during, after):
            policy(losses, None, index)
            assert policy.threshold_in_use() == pytest.approx(expected)
