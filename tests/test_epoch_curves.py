"""Curves of accepted and of all samples, and the validation samples a policy judges."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from made_features import CLASSES, feature_set, split_features

from keras_rsft.examination import examine_labels
from keras_rsft.finetuning import TrainingSettings, train_head
from keras_rsft.finetuning import epoch_curves as curves_module
from keras_rsft.finetuning.head_training import even_batch, head_probabilities
from keras_rsft.finetuning.judged_validation import validation_judge
from keras_rsft.policies import (
    AcceptAll,
    AcceptListed,
    AcceptReviewed,
    AutoPolicy,
    KeepFraction,
    LossThreshold,
    RunningThreshold,
)
from keras_rsft.policy_choice import PolicyChoice

pytestmark = pytest.mark.usefixtures("eager")

LABELS = np.arange(10, dtype="int32") % CLASSES
LOSSES = np.linspace(0.1, 1.0, 10).astype("float32")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


def trained(features, policy, **changes):
    options = {"epochs": 4, "batch_size": 16, "learning_rate": 0.02} | changes
    settings = TrainingSettings(policy=policy, **options)
    return train_head(features, settings, progress=False, curves=True)


def judged(policy, *, steps=1, **options):
    policy.steps_seen.assign(steps)
    return validation_judge(policy, LABELS, batch_size=4, **options)(LOSSES)


class TestCurves:
    def test_they_are_of_the_weights_at_the_end_of_the_epoch(self, features):
        run = trained(features, PolicyChoice(threshold=0.6, warmup_epochs=1))
        history = run.history
        for part, name in ((features.train, "train"), (features.validation, "val")):
            scores = head_probabilities(run.model, part)
            losses = keras.losses.sparse_categorical_crossentropy(part.labels, scores)
            hits = scores.argmax(axis=1) == part.labels
            chosen = losses.numpy() < 0.6
            if name == "train":
                chosen = run.recorder.last_epoch[1] > 0
                found = history["train_loss"][-1], history["train_accuracy"][-1]
                assert found == pytest.approx((losses.numpy().mean(), hits.mean()))
            else:
                assert history["val_acceptance_rate"][-1] == pytest.approx(
                    chosen.mean()
                )
                error = np.std(losses) / np.sqrt(len(part))
                assert history["val_loss_error"][-1] == pytest.approx(error, rel=1e-5)
            of_accepted = (
                history[f"{name}_accepted_loss"][-1],
                history[f"{name}_accepted_accuracy"][-1],
            )
            expected = losses.numpy()[chosen].mean(), hits[chosen].mean()
            assert of_accepted == pytest.approx(expected, rel=1e-5)
            assert 0 < chosen.mean() < 1

    def test_during_the_warm_up_everything_is_accepted(self, features):
        choice = PolicyChoice(threshold=0.3, warmup_epochs=2)
        rates = trained(features, choice).history["val_acceptance_rate"]
        assert rates[:2] == [1.0, 1.0]
        assert rates[2] < 1

    def test_where_everything_is_accepted_both_are_equal(self, features):
        history = trained(features, PolicyChoice("accept-all")).history
        for name in ("accuracy", "loss"):
            assert history[f"train_{name}"] == history[f"train_accepted_{name}"]
            assert history[f"val_{name}"] == pytest.approx(
                history[f"val_accepted_{name}"]
            )

    @pytest.mark.parametrize(
        "count, rows", [(1, 1), (256, 256), (257, 129), (269, 135), (1000, 250)]
    )
    def test_no_validation_sample_counts_for_much_more_than_another(self, count, rows):
        assert even_batch(count) == rows

    def test_training_is_the_same_with_and_without_them(self, features):
        policy = PolicyChoice("running-threshold", warmup_epochs=1)
        with_them = trained(features, policy)
        settings = TrainingSettings(
            policy=policy, epochs=4, batch_size=16, learning_rate=0.02
        )
        without = train_head(features, settings, progress=False)
        for a, b in zip(
            with_them.model.variables, without.model.variables, strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert "train_loss" not in without.history

    def test_a_policy_of_batches_judges_no_single_sample(self, features):
        history = trained(features, PolicyChoice(threshold=2.0, level="batch")).history
        assert "train_accepted_loss" in history
        assert "val_accepted_loss" not in history

    def test_without_validation_there_are_those_of_training(self, features):
        none = features.validation.take(np.arange(0))
        history = trained(
            dataclasses.replace(features, validation=none), PolicyChoice(threshold=0.8)
        ).history
        assert "train_accepted_loss" in history
        assert not any(name.startswith("val_") for name in history)

    def test_of_many_samples_some_are_asked(self, features, monkeypatch):
        whole = trained(features, PolicyChoice("auto")).history
        monkeypatch.setattr(curves_module, "MOST_SAMPLES", 20)
        some = trained(features, PolicyChoice("auto")).history
        assert some["val_loss"] == whole["val_loss"]
        for name in ("train_loss", "val_accepted_loss"):
            assert some[name] != whole[name]
            assert some[name] == pytest.approx(whole[name], abs=0.3)


class TestJudge:
    def test_below_the_threshold(self):
        policy = LossThreshold(0.55)
        np.testing.assert_array_equal(judged(policy), LOSSES < 0.55)
        assert policy.steps_seen.numpy() == 1

    def test_reviewed_training_samples_say_nothing_of_others(self):
        policy = AcceptReviewed(LossThreshold(0.55), np.ones(10, bool))
        policy.policy.steps_seen.assign(1)
        np.testing.assert_array_equal(judged(policy), LOSSES < 0.55)

    def test_the_smallest_of_each_batch(self):
        # Batches of 4, 4 and 2: of each half, rounded up from .5.
        assert judged(KeepFraction(0.5)).sum() == 5

    def test_running_statistics_stay_as_they_were(self):
        policy = RunningThreshold(0.0)
        before = policy.statistics.numpy()
        assert 0 < judged(policy).sum() < 10
        np.testing.assert_array_equal(policy.statistics.numpy(), before)

    def test_everything(self):
        assert judged(AcceptAll()).all()

    def test_where_there_is_no_judgement(self):
        for policy in (
            LossThreshold(0.5, level="batch"),
            AcceptListed(np.ones(10, bool)),
            AutoPolicy(10),
        ):
            assert validation_judge(policy, LABELS, batch_size=4) is None


class TestAuto:
    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("held-out")
        train = feature_set(folder, "train", 300, seed=0, wrong=0.3)
        return train, feature_set(folder, "held_out", 120, seed=1, wrong=0.3)

    def test_held_out_samples_are_judged_like_the_others(self, data):
        train, held_out = data
        found = examine_labels(train, CLASSES, progress=False, held_out=held_out)
        wrong = held_out.labels != held_out.clean_labels
        mask = found.held_out_mask()
        assert mask[~wrong].mean() > 0.9
        assert mask[wrong].mean() < 0.1
        # They say nothing themselves.
        alone = examine_labels(train, CLASSES, progress=False)
        assert not alone.judges_held_out
        np.testing.assert_array_equal(found.right_probability, alone.right_probability)
        np.testing.assert_array_equal(found.noise, alone.noise)

    def test_the_list_and_the_loss_limit(self, data):
        train, held_out = data
        found = examine_labels(train, CLASSES, progress=False, held_out=held_out)
        policy = AutoPolicy(found, loss_limit=found.loss_limit)
        policy.steps_seen.assign(1)
        judge = validation_judge(
            policy, held_out.labels, batch_size=32, examination=found
        )
        easy, hard = np.full(120, 0.1, "float32"), np.full(120, 5.0, "float32")
        np.testing.assert_array_equal(judge(easy), found.held_out_mask())
        # Beyond the limit only the floor of each class in a batch is left.
        assert 0 < judge(hard).sum() <= 3 * 4

    def test_where_nothing_looks_wrong_everything_is_accepted(self, tmp_path):
        train = feature_set(tmp_path, "train", 300, seed=0)
        held_out = feature_set(tmp_path, "held_out", 30, seed=1, wrong=0.5)
        found = examine_labels(train, CLASSES, progress=False, held_out=held_out)
        assert found.reason is not None
        assert found.held_out_mask().all()
