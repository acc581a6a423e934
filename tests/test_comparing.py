"""Comparing methods: statistics by hand, each baseline, stalls, repeatability."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import pytest

from keras_rsft import config
from keras_rsft.comparison import _methods as methods
from keras_rsft.comparison._compare import compare, compare_features, relabelled
from keras_rsft.comparison._methods import Outcome
from keras_rsft.config import METHOD_NAMES, PolicyConfig, TrainConfig, check_methods
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._batches import TrainingBatches
from keras_rsft.features._store import FeatureSet
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import head_probabilities, train_head

pytestmark = pytest.mark.usefixtures("eager")

CLASSES = 3
DIM = 6


def make_part(folder, name, count, rng, wrong=0.0, known=True):
    """Three clusters; a share of the labels moves to the next class."""
    clean = (np.arange(count) % CLASSES).astype(np.int32)
    values = rng.normal(size=(count, DIM)).astype(np.float32)
    values[np.arange(count), clean] += 3
    path = folder / f"{name}.bin"
    values.tofile(path)
    labels = clean.copy()
    moved = rng.choice(count, round(wrong * count), replace=False)
    labels[moved] = (labels[moved] + 1) % CLASSES
    ids = np.array([f"{name}/{number}" for number in range(count)])
    return FeatureSet(path, labels, ids, DIM, 1, clean if known else None)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("features")
    return SplitFeatures(
        train=make_part(folder, "train", 90, rng, wrong=0.3),
        validation=make_part(folder, "validation", 30, rng, wrong=0.3),
        test=make_part(folder, "test", 60, rng),
        class_names=("a", "b", "c"),
    )


@pytest.fixture(scope="module")
def settings():
    return TrainConfig(
        policy=PolicyConfig(threshold=0.9, warmup_epochs=1),
        epochs=4,
        batch_size=16,
        learning_rate=0.05,
    )


@pytest.fixture
def trial(noisy, settings):
    return methods.Trial(noisy, settings)


class TestBaselines:
    @pytest.mark.slow
    def test_early_stopping_restores_the_best_epoch(self, trial, monkeypatch):
        """Epoch by epoch the same as plain; then the weights of the best one."""
        settings = dataclasses.replace(
            trial.settings, policy=PolicyConfig("accept-all"), epochs=6
        )
        weights, seen = [], []

        class Note(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                weights.append(self.model.model.get_weights())
                seen.append(logs["val_accuracy_estimated"])

        # A step too large and labels too wrong for the last epoch to be the best.
        settings = dataclasses.replace(settings, learning_rate=0.5)
        train_head(
            trial.features,
            settings,
            callbacks=[Note()],
            label_quality=trial.audit[0],
            progress=False,
        )
        best = int(np.argmax(seen))
        assert best < len(seen) - 1
        heads = []
        real = methods._head.train_head
        monkeypatch.setattr(
            methods._head,
            "train_head",
            lambda *a, **k: heads.append(real(*a, **k)) or heads[-1],
        )
        methods.run_method(
            "early-stopping", dataclasses.replace(trial, settings=settings)
        )
        restored = heads[0].model.model.get_weights()
        for one, other in zip(restored, weights[best], strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("policy", ["accept-all", "auto"])
    def test_weight_decay_changes_one_setting_and_nothing_else(
        self, trial, monkeypatch, policy
    ):
        seen = []
        real = methods._head.train_head
        monkeypatch.setattr(
            methods._head,
            "train_head",
            lambda *a, **k: seen.append(a[1]) or real(*a, **k),
        )
        prefix = "" if policy == "accept-all" else "auto+"
        outcome = methods.run_method(f"{prefix}weight-decay", trial)
        assert outcome.stalled is None
        assert trial.settings.weight_decay is None
        choice = dataclasses.replace(trial.settings.policy, name=policy)
        assert seen == [
            dataclasses.replace(trial.settings, policy=choice, weight_decay=3.0)
        ]

    def test_gce_is_the_published_loss(self):
        """(1 - 0.5**0.7) / 0.7 and (1 - 0.25**0.7) / 0.7, for integer labels."""
        loss = keras.losses.CategoricalGeneralizedCrossEntropy(
            q=methods.GCE_Q, reduction="none"
        )
        values = loss(np.array([0, 1]), np.array([[0.5, 0.5], [0.75, 0.25]]))
        expected = [(1 - p**0.7) / 0.7 for p in (0.5, 0.25)]
        np.testing.assert_allclose(values, expected, rtol=1e-5)

    def test_gce_lets_a_wrong_label_pull_less(self):
        """The gradient at a logit is cross-entropy's times p**0.7."""
        import tensorflow as tf

        logits = tf.constant([[4.0, 0.0], [0.0, 4.0]])
        labels = tf.constant([1, 1])  # The first is wrong for the model.
        norms = []
        for loss in (
            keras.losses.SparseCategoricalCrossentropy(reduction="sum"),
            keras.losses.CategoricalGeneralizedCrossEntropy(q=0.7, reduction="sum"),
        ):
            with tf.GradientTape() as tape:
                tape.watch(logits)
                value = loss(labels, tf.nn.softmax(logits))
            norms.append(np.abs(tape.gradient(value, logits)[:, 0]))
        p = np.exp([0, 4]) / (1 + np.exp(4))
        np.testing.assert_allclose(norms[1] / norms[0], p**0.7, rtol=1e-4)

    def test_gce_first_step_is_the_one_by_hand(self, trial):
        """One step of plain SGD on one batch moves the bias by -rate x gradient."""
        settings = dataclasses.replace(
            trial.settings, epochs=1, batch_size=90, learning_rate=0.1
        )
        train = trial.features.train
        start = methods.build_head(DIM, CLASSES, moments=train.moments())
        p = head_probabilities(start, train)
        given = np.eye(CLASSES)[train.labels]
        weight = (p * given).sum(axis=1, keepdims=True) ** 0.7
        gradient = (weight * (p - given)).mean(axis=0)
        loss = keras.losses.CategoricalGeneralizedCrossEntropy(q=methods.GCE_Q)
        head = methods.train_stock(trial.features, settings, loss)
        np.testing.assert_allclose(head.get_weights()[-1], -0.1 * gradient, atol=1e-5)

    def test_co_teaching_heads_exchange_what_they_choose(self):
        """Two samples, heads that trust one each: each learns the other's choice."""

        def head(bias):
            inputs = keras.Input((1,))
            layer = keras.layers.Dense(2, activation="softmax")
            model = keras.Model(inputs, layer(inputs))
            layer.set_weights([np.zeros((1, 2)), np.array(bias, np.float32)])
            return model

        # The first head finds label 0 easy, the second label 1.
        heads = [head([1.0, 0.0]), head([0.0, 1.0])]
        optimizers = [keras.optimizers.SGD(1.0) for _ in heads]
        for model, optimizer in zip(heads, optimizers, strict=True):
            optimizer.build(model.trainable_variables)
        inputs, labels = np.zeros((2, 1), np.float32), np.array([0, 1])
        methods.co_teaching_step(heads, optimizers, inputs, labels, 0.5)
        p = 1 / (1 + math.exp(-1))  # Of the class with the larger bias.
        # The first learns the sample with label 1: gradient (p, -p).
        np.testing.assert_allclose(heads[0].get_weights()[1], [1 - p, p], atol=1e-6)
        # The second learns the sample with label 0: gradient (-p, p).
        np.testing.assert_allclose(heads[1].get_weights()[1], [p, 1 - p], atol=1e-6)

    def test_co_teaching_keeps_the_estimated_share_after_the_ramp(self, trial):
        settings = dataclasses.replace(trial.settings, epochs=11, batch_size=30)
        _, chosen = methods.train_co_teaching(trial.features, settings, noise_rate=0.3)
        assert chosen.sum() == 3 * 21
        wrong = trial.features.train.labels != trial.features.train.clean_labels
        assert chosen[wrong].mean() < 0.5 < chosen[~wrong].mean()

    def test_the_estimated_rate_by_hand(self):
        """Class thresholds 0.7 and 0.6; the third sample is a confident 1."""
        labels = np.array([0, 0, 0, 1, 1])
        p1 = np.array([0.05, 0.05, 0.8, 0.6, 0.6])
        probabilities = np.stack([1 - p1, p1], axis=1)
        assert methods.estimated_noise_rate(labels, probabilities) == 1 / 5
        probabilities[3] = [0.5, 0.5]  # Threshold 0.55; it no longer counts.
        assert methods.estimated_noise_rate(labels, probabilities) == 1 / 4

    def test_out_of_fold_heads_have_not_seen_the_sample(self, trial, monkeypatch):
        seen = []

        class Note(TrainingBatches):
            def __init__(self, features, **options):
                seen.append(set(features.ids))
                super().__init__(features, **options)

        monkeypatch.setattr(methods, "TrainingBatches", Note)
        settings = dataclasses.replace(trial.settings, epochs=1)
        probabilities = methods.out_of_fold_probabilities(trial.features, settings)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        everyone = set(trial.features.train.ids)
        held_out = [everyone - fold for fold in seen]
        assert [len(fold) for fold in held_out] == [18] * 5
        assert set.union(*held_out) == everyone

    def test_the_clean_subset_is_all_right_labels_and_no_wrong_one(self, trial):
        outcome = methods.run_method("clean-subset", trial)
        assert outcome.acceptance_rate == pytest.approx(0.7)
        assert outcome.wrong_labels_rejected == 1
        assert outcome.right_labels_rejected == 0

    def test_cleanlab_filters_and_retrains(self, trial):
        pytest.importorskip("cleanlab")
        outcome = methods.run_method("cleanlab", trial)
        assert 0 < outcome.acceptance_rate < 1
        assert outcome.wrong_labels_rejected > outcome.right_labels_rejected


class TestComparison:
    @pytest.mark.slow
    def test_a_stall_is_a_result(self, noisy, settings):
        """A threshold far below ln(3) rejects every batch of the article's rule."""
        hopeless = dataclasses.replace(settings, policy=PolicyConfig(threshold=1e-6))
        result = compare_features(
            noisy, methods=["article"], seeds=2, settings=hopeless, progress=False
        )
        article = result.summaries["article"]
        assert article.stalled == 2
        assert article.test_accuracy is None
        assert article.acceptance_rate == 0
        stalled = [o.stalled for o in result.outcomes if o.method == "article"]
        assert all("accepted no sample" in reason for reason in stalled)
        assert result.summaries["plain"].test_accuracy is not None

    def test_a_head_that_diverged_is_no_accuracy(self, trial, monkeypatch):
        def diverged(features, settings, loss):
            head = methods.build_head(DIM, CLASSES)
            head.set_weights([w * np.nan for w in head.get_weights()])
            return head

        monkeypatch.setattr(methods, "train_stock", diverged)
        outcome = methods.run_method("gce", trial)
        assert outcome.test_accuracy is None
        assert "NaN" in outcome.stalled

    @pytest.mark.slow
    def test_all_methods_the_same_again_and_each_seed_its_own(self, noisy, settings):
        short = dataclasses.replace(settings, epochs=1)
        options = {"settings": short, "progress": False}
        one = compare_features(noisy, seeds=1, **options)
        some = ["early-stopping", "gce", "article", "keep-fraction", "clean-subset"]
        two = compare_features(noisy, methods=some, seeds=1, **options)
        first = {outcome.method: outcome for outcome in one.outcomes}
        assert {outcome.method for outcome in two.outcomes} == {"plain", *some}
        for again in two.outcomes:
            same = dataclasses.replace(first[again.method], seconds=again.seconds)
            assert again == same
            np.testing.assert_array_equal(again.test_right, same.test_right)
        expected = [name for name in METHOD_NAMES if name not in ("cleanlab",)]
        assert set(expected) <= set(one.summaries)
        plain = {"methods": ["plain"], "progress": False}
        losses = [
            train_head(
                noisy, dataclasses.replace(short, seed=seed), progress=False
            ).history["loss"]
            for seed in (0, 1)
        ]
        assert losses[0] != losses[1]
        seeds = compare_features(noisy, seeds=2, settings=short, **plain).outcomes
        assert [outcome.seed for outcome in seeds] == [0, 1]

    def test_the_test_split_is_judged_by_its_right_labels(self, noisy, settings):
        test = noisy.test
        wrong = test.with_labels((test.labels + 1) % CLASSES, test.clean_labels)
        options = {"methods": ["gce"], "seeds": 1, "settings": settings}
        results = [
            compare_features(
                dataclasses.replace(noisy, test=part), progress=False, **options
            )
            for part in (test, wrong)
        ]
        for name in ("plain", "gce"):
            one, other = (result.summaries[name] for result in results)
            assert one.test_accuracy == other.test_accuracy

    @pytest.fixture(scope="class")
    def all_noisy(self, tmp_path_factory):
        """A third of the labels of every split is wrong, and nobody knows which."""
        rng = np.random.default_rng(1)
        folder = tmp_path_factory.mktemp("all-noisy")
        sizes = {"train": 300, "validation": 60, "test": 600}
        return SplitFeatures(
            *(make_part(folder, *part, rng, wrong=1 / 3) for part in sizes.items()),
            ("a", "b", "c"),
        )

    @pytest.mark.slow
    def test_wrong_test_labels_are_seen_through(self, all_noisy, settings):
        clean = all_noisy.test.clean_labels
        parts = {
            name: dataclasses.replace(getattr(all_noisy, name), clean_labels=None)
            for name in ("train", "validation", "test")
        }
        unknown = dataclasses.replace(all_noisy, **parts)
        options = {"methods": ["auto"], "seeds": 2, "settings": settings}
        known, found = (
            compare_features(one, progress=False, **options)
            for one in (all_noisy, unknown)
        )
        assert (known.judged_by, found.judged_by) == ("known", "estimated")
        for name in ("plain", "auto"):
            really, guess = known.summaries[name], found.summaries[name]
            assert guess.test_accuracy_given == really.test_accuracy_given < 0.75
            assert guess.test_accuracy.low < really.test_accuracy.mean
            assert really.test_accuracy.mean < guess.test_accuracy.high
            assert guess.test_accuracy.mean - guess.test_accuracy_given > 0.1
        gain = found.summaries["auto"].difference_to_plain.mean
        accuracies = [found.summaries[n].test_accuracy.mean for n in ("auto", "plain")]
        assert gain == pytest.approx(accuracies[0] - accuracies[1])
        outcome = known.outcomes[0]
        assert outcome.test_right.mean() == outcome.test_accuracy
        assert len(outcome.test_right) == len(clean)

    def test_an_estimate_widens_the_interval(self):
        one = Outcome("plain", 0, 1.0, np.array([1.0, 0.6]), test_error=0.03)
        other = dataclasses.replace(one, seed=1, test_right=np.array([1.0, 0.8]))
        alone, both = (
            methods.summarize(some)["plain"].test_accuracy
            for some in ([one], [one, other])
        )
        assert (alone.mean, alone.half_width) == pytest.approx((0.8, 0.03))
        over_seeds = 12.7062 * 0.05
        assert both.half_width == pytest.approx(math.hypot(over_seeds, 0.03), rel=1e-4)

    def test_labels_that_cannot_be_judged_count_as_given(self, noisy, settings):
        unknown = {
            name: dataclasses.replace(
                getattr(noisy, name),
                clean_labels=None,
                labels=np.random.default_rng(0).permutation(
                    getattr(noisy, name).labels
                ),
            )
            for name in ("train", "validation", "test")
        }
        result = compare_features(
            dataclasses.replace(noisy, **unknown),
            methods=["plain"], seeds=1, settings=settings, progress=False,
        )  # fmt: skip
        assert result.judged_by == "given"
        plain = result.summaries["plain"]
        assert plain.test_accuracy.mean == plain.test_accuracy_given

    def test_no_method_sees_a_right_label_of_the_validation_split(
        self, noisy, settings, monkeypatch
    ):
        seen = []

        def look(name, trial):
            seen.append(trial.features.validation.clean_labels)
            return fake_run(name, trial)

        monkeypatch.setattr(methods, "run_method", look)
        compare_features(noisy, settings=settings, seeds=1, progress=False)
        assert noisy.validation.clean_labels is not None
        assert seen
        assert all(one is None for one in seen)

    def test_what_cannot_run_is_left_out_with_a_note(
        self, noisy, settings, monkeypatch
    ):
        monkeypatch.setattr(methods, "run_method", fake_run)
        monkeypatch.setattr(config, "has_cleanlab", lambda: False)
        unknown = noisy.train.with_labels(noisy.train.labels)
        features = dataclasses.replace(
            noisy,
            train=unknown,
            validation=dataclasses.replace(
                noisy.validation, labels=noisy.validation.labels[:0]
            ),
        )
        result = compare_features(features, settings=settings, progress=False)
        assert not {"cleanlab", "clean-subset", "early-stopping"} & set(
            result.summaries
        )
        notes = " ".join(result.notes)
        assert "keras_rsft[compare]" in notes
        assert "clean-subset was left out: the right labels are not known" in notes
        assert "early-stopping was left out: it needs a validation split" in notes
        with pytest.raises(DataError, match="clean-subset cannot run"):
            compare_features(features, methods=["clean-subset"], progress=False)

    def test_a_weight_decay_of_all_methods_is_no_method(
        self, noisy, settings, monkeypatch
    ):
        monkeypatch.setattr(methods, "run_method", fake_run)
        decayed = dataclasses.replace(settings, weight_decay=0.1)
        result = compare_features(noisy, settings=decayed, progress=False)
        assert not any("weight-decay" in name for name in result.summaries)
        assert "auto+weight-decay was left out" in " ".join(result.notes)

    def test_what_is_a_method_is_no_setting(self, settings):
        changed = dataclasses.replace(settings, early_stopping=3)
        with pytest.raises(InvalidArgument, match="a method of its own"):
            compare("digits", settings=changed, progress=False)

    def test_cleanlab_by_name_needs_the_extra(self, monkeypatch):
        monkeypatch.setattr(config, "has_cleanlab", lambda: False)
        with pytest.raises(ImportError, match=r"keras_rsft\[compare\]"):
            check_methods(["cleanlab"])

    def test_methods_by_name(self):
        assert check_methods(["gce", "gce"]) == ("plain", "gce")
        assert check_methods(["gce", "plain"]) == ("plain", "gce")
        with pytest.raises(InvalidArgument, match="Did you mean 'co-teaching'"):
            check_methods(["coteaching"])
        for wrong in ([], "gce"):
            with pytest.raises(InvalidArgument, match="methods"):
                check_methods(wrong)
        with pytest.raises(InvalidArgument, match="seeds"):
            compare("digits", seeds=0)
        with pytest.raises(InvalidArgument, match=r"2\*\*31"):
            compare("digits", settings=TrainConfig(seed=2**31 - 4))

    def test_noise_reaches_the_features_by_id(self, noisy):
        class Data:
            pass

        data = Data()
        for name in ("train", "validation", "test"):
            part = getattr(noisy, name)
            split = Data()
            # One image more than was readable, and in the other order.
            split.ids = np.array([*part.ids[::-1], "unreadable"])
            split.labels = np.array([*((part.labels[::-1] + 1) % CLASSES), 0])
            split.clean_labels = None
            setattr(data, name, split)
        moved = relabelled(noisy, data)
        np.testing.assert_array_equal(
            moved.train.labels, (noisy.train.labels + 1) % CLASSES
        )
        assert moved.train.path == noisy.train.path


def fake_run(name, trial):
    return Outcome(name, trial.settings.seed, 1.0, np.array([True, False]))
