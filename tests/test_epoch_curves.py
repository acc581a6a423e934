"""Curves of training and validation by the weights at the end of each epoch."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from made_features import split_features

from keras_rsft.config import PolicyConfig, TrainConfig
from keras_rsft.training import _curves as curves_module
from keras_rsft.training._head import (
    audit_splits,
    even_batch,
    head_probabilities,
    predicted_classes,
    train_head,
)

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


def trained(features, policy, **changes):
    options = {"epochs": 4, "batch_size": 16, "learning_rate": 0.02} | changes
    settings = TrainConfig(policy=policy, **options)
    return train_head(features, settings, progress=False, curves=True)


class TestCurves:
    def test_they_are_of_the_weights_at_the_end_of_the_epoch(self, features):
        run = trained(features, PolicyConfig(threshold=0.95, warmup_epochs=1))
        history = run.history
        scores = head_probabilities(run.model, features.train)
        labels = features.train.labels
        losses = keras.losses.sparse_categorical_crossentropy(labels, scores).numpy()
        hits = scores.argmax(axis=1) == labels
        chosen = run.recorder.last_epoch[1] > 0
        assert 0 < chosen.mean() < 1
        expected = {
            "train_loss": losses.mean(),
            "train_accuracy": hits.mean(),
            "train_accepted_loss": losses[chosen].mean(),
            "train_accepted_accuracy": hits[chosen].mean(),
        }
        validation = features.validation
        losses = keras.losses.sparse_categorical_crossentropy(
            validation.labels, head_probabilities(run.model, validation)
        )
        expected["val_loss_error"] = np.std(losses) / np.sqrt(len(validation))
        for name, value in expected.items():
            assert history[name][-1] == pytest.approx(value, rel=1e-5), name

    def test_validation_accuracy_by_known_right_labels(self, features):
        given = (features.validation.clean_labels + 1) % 3
        validation = dataclasses.replace(features.validation, labels=given)
        run = trained(
            dataclasses.replace(features, validation=validation),
            PolicyConfig("accept-all"),
        )
        right = predicted_classes(run.model, validation) == validation.clean_labels
        assert run.history["val_accuracy_estimated"][-1] == pytest.approx(right.mean())
        losses = keras.losses.sparse_categorical_crossentropy(
            validation.clean_labels, head_probabilities(run.model, validation)
        )
        assert run.history["val_loss_estimated"][-1] == pytest.approx(
            np.mean(losses), rel=1e-5
        )
        for name, values in (("loss", losses), ("accuracy", right)):
            error = np.std(values) / np.sqrt(len(validation))
            assert run.history[f"val_{name}_error"][-1] == pytest.approx(error, 1e-5)
        assert right.mean() > run.history["val_accuracy"][-1]

    def test_validation_accuracy_by_estimated_right_labels(self, features):
        parts = {
            name: dataclasses.replace(getattr(features, name), clean_labels=None)
            for name in ("train", "validation", "test")
        }
        unknown = dataclasses.replace(features, **parts)
        quality = audit_splits(unknown, 0, progress=False)
        assert quality.reason is None
        run = trained(unknown, PolicyConfig("auto"))
        predicted = predicted_classes(run.model, unknown.validation)
        credits = quality.held_out[0].credits
        expected = credits[np.arange(len(predicted)), predicted].mean()
        assert run.history["val_accuracy_estimated"][-1] == pytest.approx(expected)
        logarithms = np.log(head_probabilities(run.model, unknown.validation))
        loss = -(credits * logarithms).sum(axis=1).mean()
        assert run.history["val_loss_estimated"][-1] == pytest.approx(loss, rel=1e-4)
        # Nobody has audited the labels here.
        plain = trained(unknown, PolicyConfig("accept-all"))
        assert "val_accuracy_estimated" not in plain.history

    def test_where_everything_is_accepted_both_are_equal(self, features):
        history = trained(features, PolicyConfig("accept-all")).history
        for name in ("accuracy", "loss"):
            assert history[f"train_{name}"] == history[f"train_accepted_{name}"]

    @pytest.mark.parametrize(
        "count, rows", [(1, 1), (256, 256), (257, 129), (269, 135), (1000, 250)]
    )
    def test_no_validation_sample_counts_for_much_more_than_another(self, count, rows):
        assert even_batch(count) == rows

    def test_training_is_the_same_with_and_without_them(self, features):
        policy = PolicyConfig("running-threshold", warmup_epochs=1)
        with_them = trained(features, policy)
        settings = TrainConfig(
            policy=policy, epochs=4, batch_size=16, learning_rate=0.02
        )
        without = train_head(features, settings, progress=False)
        for a, b in zip(
            with_them.model.variables, without.model.variables, strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert "train_loss" not in without.history

    def test_without_validation_there_are_those_of_training(self, features):
        none = features.validation.take(np.arange(0))
        history = trained(
            dataclasses.replace(features, validation=none), PolicyConfig(threshold=0.8)
        ).history
        assert "train_accepted_loss" in history
        assert not any(name.startswith("val_") for name in history)

    def test_of_many_samples_some_are_looked_at(self, features, monkeypatch):
        whole = trained(features, PolicyConfig("auto")).history
        monkeypatch.setattr(curves_module, "MOST_SAMPLES", 20)
        some = trained(features, PolicyConfig("auto")).history
        assert some["val_loss"] == whole["val_loss"]
        for name in ("train_loss", "val_loss_error"):
            assert some[name] != whole[name]
            assert some[name] == pytest.approx(whole[name], abs=0.3)
