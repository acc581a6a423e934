"""Options against overfitting in a whole run: kept, resumed, refused, and warned of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from eagerly import eagerly
from made_features import feature_set, split_features
from same_run import assert_same_run

from keras_rsft.config import PolicyConfig, TrainConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import predicted_classes, train_head

pytestmark = pytest.mark.usefixtures("eager")

REGULARISED = {
    "weight decay": {"weight_decay": 0.5},
    "early stopping": {"early_stopping": 1},
    "all of them": {
        "weight_decay": 0.5,
        "early_stopping": 2,
        "policy": PolicyConfig("auto"),
        "optimizer": "adam",
    },
}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


def train(features, **changes):
    options = {"policy": PolicyConfig("accept-all"), "epochs": 6, "batch_size": 16}
    settings = TrainConfig(**options | {"learning_rate": 0.05} | changes)
    return train_head(features, settings, progress=False, curves=True)


class TestResumed:
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name == "all of them" else pytest.mark.slow)
            for name in REGULARISED
        ],
    )
    def test_equal_to_the_run_that_was_never_stopped(
        self, fit_photos, tmp_path, stop_at, name
    ):
        changes = REGULARISED[name]
        whole = fit_photos(tmp_path / "whole", **changes)
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", **changes)
        if name != "all of them":  # Another setting is another run.
            with pytest.raises(InvalidArgument, match="with other settings"):
                fit_photos(tmp_path / "stopped")
        assert_same_run(fit_photos(tmp_path / "stopped", **changes), whole)

    @pytest.mark.slow
    def test_stopped_in_the_epoch_that_ends_it(self, fit_photos, tmp_path, stop_at):
        changes = {"early_stopping": 1, "epochs": 12}
        whole = fit_photos(tmp_path / "whole", **changes)
        trained = whole.results["epochs_trained"]
        assert trained < 12
        stop_at(trained)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", **changes)
        assert_same_run(fit_photos(tmp_path / "stopped", **changes), whole)

    def test_settings_are_part_of_the_record(self, fit_photos, tmp_path):
        fit_photos(tmp_path / "run", **REGULARISED["all of them"])
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        for name in ("weight_decay", "early_stopping"):
            assert config[name] == REGULARISED["all of them"][name]


class TestWeightDecay:
    def test_of_the_kernel_and_not_of_the_bias(self, features):
        """One step without a gradient: the learning rate times the decay."""
        from keras_rsft.training._head import untrained_head

        settings = TrainConfig(
            policy=PolicyConfig("accept-all"), learning_rate=0.1, weight_decay=0.5
        )
        model = untrained_head(features, settings)
        kernel, bias = model.trainable_variables
        bias.assign(np.ones(3))
        model.optimizer.build([kernel, bias])
        before = kernel.numpy()
        model.optimizer.apply([np.zeros_like(before), np.zeros(3, "float32")])
        np.testing.assert_allclose(kernel.numpy(), 0.95 * before, rtol=1e-6)
        np.testing.assert_array_equal(bias.numpy(), np.ones(3))

    @pytest.mark.slow
    def test_the_kernel_gets_smaller(self, features):
        models = (train(features, weight_decay=one).model for one in (None, 2.0))
        plain, decayed = (np.linalg.norm(one.trainable_weights[0]) for one in models)
        assert decayed < 0.9 * plain


class TestEarlyStopping:
    @pytest.mark.slow
    def test_keeps_the_first_best_epoch(self, features):
        whole = train(features, epochs=12)
        run = train(features, epochs=12, early_stopping=2)
        accuracies = run.history["val_accuracy"]
        best = int(np.argmax(accuracies))
        assert run.results["best_epoch"] == best + 1
        assert run.results["epochs_trained"] == len(accuracies) == best + 3
        assert accuracies == whole.history["val_accuracy"][: len(accuracies)]
        assert run.results["validation_accuracy"] == pytest.approx(accuracies[best])
        again = train(features, epochs=best + 1)
        for a, b in zip(
            run.model.trainable_weights, again.model.trainable_weights, strict=True
        ):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("known", [True, False])
    def test_goes_by_right_labels(self, features, monkeypatch, known):
        """The given labels of the validation split get worse the longer it trains."""
        right = features.validation.clean_labels
        wrong = dataclasses.replace(
            features.validation,
            labels=(right + 1) % 3,
            clean_labels=right if known else None,
        )
        if not known:
            monkeypatch.setattr(
                LabelQuality,
                "credits",
                np.equal.outer(right, np.arange(3)).astype("float32"),
            )
        mixed = dataclasses.replace(features, validation=wrong)
        run = train(mixed, epochs=6, early_stopping=6, learning_rate=0.1)
        given = run.history["val_accuracy"]
        estimated = run.history["val_accuracy_estimated"]
        assert np.argmax(given) != np.argmax(estimated)
        assert run.results["best_epoch"] == np.argmax(estimated) + 1
        predicted = predicted_classes(run.model, wrong)
        assert np.mean(predicted == right) == pytest.approx(max(estimated))

    def test_needs_a_validation_split(self, features):
        none = features.validation.take(np.arange(0))
        with pytest.raises(InvalidArgument, match="--validation-fraction"):
            train(dataclasses.replace(features, validation=none), early_stopping=2)


class TestWarning:
    @pytest.fixture(scope="class")
    def learnt_by_heart(self, tmp_path_factory):
        """Few samples, many of them labelled wrongly, and far too long a training."""
        folder = tmp_path_factory.mktemp("by-heart")
        return SplitFeatures(
            feature_set(folder, "train", 40, seed=0, wrong=0.4, noise=60),
            feature_set(folder, "validation", 300, seed=1, noise=60),
            feature_set(folder, "test", 300, seed=2, noise=60),
            ("a", "b", "c"),
        )

    @pytest.fixture(scope="class")
    def overfitted(self, learnt_by_heart):
        with eagerly(False):  # So many epochs are worth tracing.
            return train(learnt_by_heart, epochs=60)

    def test_a_run_that_overfits_warns(self, overfitted):
        run = overfitted
        assert run.history["train_accuracy"][-1] == 1.0
        assert run.overfitting is not None
        assert run.overfitting.best_epoch < 30

    def test_early_stopping_has_dealt_with_it(self, learnt_by_heart, overfitted):
        run = train(learnt_by_heart, epochs=60, early_stopping=5)
        assert run.overfitting is None
        name = "validation_accuracy"
        assert run.results[name] > overfitted.results[name]

    @pytest.mark.slow
    def test_a_run_that_does_not_overfit_does_not_warn(self, features):
        with eagerly(False):
            run = train(features, epochs=20, policy=PolicyConfig("auto"))
        assert run.overfitting is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight_decay": -1.0}, "at least 0"),
        ({"early_stopping": 0}, "at least 1"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(**options)


class TestCommand:
    @pytest.fixture
    def fit(self, call, photo_folder, tiny_base_file, tmp_path):
        def fit(*arguments):
            return call(
                "fit", photo_folder, "--backbone", tiny_base_file, "--epochs", 4,
                "--cache-dir", tmp_path / "kept", *arguments,
            )  # fmt: skip

        return fit

    def test_all_options(self, fit, tmp_path):
        status, out, err = fit(
            "--weight-decay", 0.1, "--early-stopping", 1, "--json",
        )  # fmt: skip
        assert status == 0, err
        document = json.loads(out)
        assert document["results"]["overfitting"] is None
        assert document["results"]["best_epoch"] >= 1
        assert "Epoch that was kept" in err
        page = (tmp_path / document["folder"] / "report.html").read_text()
        assert "training, all samples" in page

    @pytest.mark.slow
    def test_what_is_found_is_said_once(self, fit, tmp_path, monkeypatch):
        from keras_rsft.training import _head as head_training
        from keras_rsft.training._curves import Overfitting

        found = Overfitting("accuracy", 2, 4, (0.9, 0.7), (0.8, 0.95), 0.02)
        monkeypatch.setattr(head_training, "find_overfitting", lambda *_: found)
        status, out, err = fit("--policy", "accept-all")
        assert status == 0, err
        assert out.count("Overfitting from epoch 3 on") == 1
        folder = next((tmp_path / "runs").iterdir())
        results = json.loads((folder / "results.json").read_text())
        assert results["overfitting"]["best_epoch"] == 2
        assert results["overfitting"]["sentence"] == found.sentence
        assert "Overfitting from epoch 3 on" in (folder / "report.html").read_text()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--weight-decay", "-2"], "at least 0"),
            (["--early-stopping", "0"], "at least 1"),
        ],
    )
    def test_mistakes(self, fit, arguments, message):
        status, _, err = fit(*arguments)
        assert status == 2
        assert message in err
