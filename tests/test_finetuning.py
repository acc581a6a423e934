"""One run: repeatable, whole or not at all, with everything it needs to be used."""

from __future__ import annotations

import csv
import dataclasses
import json

import keras
import numpy as np
import pytest

from keras_rsft._predict import predict_files
from keras_rsft.config import POLICY_NAMES, FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._labels import add_label_noise
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.policies._threshold import KeepFraction, LossThreshold, build_policy
from keras_rsft.training._head import choose_steps_per_execution, make_optimizer
from keras_rsft.training._run import finetune

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def noisy(photo_folder):
    return add_label_noise(load_images(str(photo_folder)), "symmetric:0.25", seed=0)


@pytest.fixture(scope="module")
def settings():
    return TrainConfig(
        policy=PolicyConfig(threshold=0.8), epochs=12, batch_size=8, learning_rate=0.05
    )


@pytest.fixture(scope="module")
def fit_to(noisy, settings, tiny_base_file, tmp_path_factory):
    features = FeatureConfig(
        str(tiny_base_file), cache_dir=tmp_path_factory.mktemp("cache")
    )

    def run(output=None, data=noisy, augmentations=1, **changes):
        config = dataclasses.replace(features, augmentations=augmentations)
        options = {"features": config, "settings": settings} | changes
        return finetune(data, output=output, progress=False, **options)

    return run


@pytest.fixture(scope="module")
def run(fit_to, tmp_path_factory):
    return fit_to(tmp_path_factory.mktemp("runs") / "deep" / "first")


class TestRun:
    def test_the_folder_has_all_that_is_needed(self, run, settings):
        names = {path.name for path in run.folder.iterdir()}
        assert names == {
            "model.keras", "head.keras", "config.json", "results.json",
            "classes.json", "metrics.csv", "samples.csv", "ledger.csv",
            "acceptance_by_class.csv", "loss_histograms.csv", "near_duplicates.csv",
            "thumbnails.bin", "thumbnails.csv", "previews.bin", "previews.csv",
            "predictions.csv", "cached_features.json",
        }  # fmt: skip
        config = json.loads((run.folder / "config.json").read_text())
        assert config["epochs"] == settings.epochs
        assert config["policy"]["threshold"] == 0.8
        assert config["image_size"] == [16, 16]
        assert set(config["versions"]) >= {"keras", "tensorflow", "keras_rsft"}
        with (run.folder / "metrics.csv").open() as file:
            epochs = list(csv.DictReader(file))
        assert len(epochs) == settings.epochs
        assert float(epochs[-1]["loss"]) == pytest.approx(run.history["loss"][-1])
        assert [path.name for path in run.folder.parent.iterdir()] == ["first"]

    def test_the_ledger_has_a_row_for_each_sample(self, run, noisy, settings):
        with (run.folder / "ledger.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for split in (noisy.train, noisy.validation, noisy.test):
            of_split = [row for row in rows if row["split"] == split.name]
            assert [row["id"] for row in of_split] == split.ids.tolist()
        held_out = [row for row in rows if row["split"] != "train"]
        assert {row["seen"] for row in held_out} == {"0"}
        assert all(0 <= float(row["suspicion"]) <= 1 for row in held_out)
        rows = [row for row in rows if row["split"] == "train"]
        assert {row["seen"] for row in rows} == {str(settings.epochs)}
        accepted = sum(int(row["accepted"]) for row in rows)
        rates = np.mean(run.history["acceptance_rate"])
        assert accepted == pytest.approx(rates * len(rows) * settings.epochs)
        assert all(0 <= float(row["suspicion"]) <= 1 for row in rows)
        recall = run.history["rejection_recall"][-1]
        assert 0 <= recall <= 1

    def test_auto_examines_first_and_says_what_it_found(self, fit_to, noisy):
        settings = TrainConfig(epochs=4, batch_size=8, learning_rate=0.05)
        run = fit_to(settings=settings)
        label_quality = run.trained.label_quality
        assert run.finding == label_quality.describe()
        policy = run.head.policy
        listed = policy.listed.numpy()
        np.testing.assert_array_equal(listed, label_quality.accept_mask())
        assert float(policy.loss_limit) == pytest.approx(label_quality.loss_limit)
        assert policy.warmup_steps == 2 * -(-len(noisy.train) // settings.batch_size)
        assert run.history["acceptance_rate"][0] == pytest.approx(listed.mean())
        assert not np.any(run.trained.accepted & ~listed)

    def test_the_losses_of_each_epoch_are_kept(self, run, noisy, settings):
        with (run.folder / "loss_histograms.csv").open() as file:
            rows = list(csv.DictReader(file))
        for epoch in range(1, settings.epochs + 1):
            own = [row for row in rows if row["epoch"] == str(epoch)]
            accepted, rejected = (
                sum(int(row[name]) for row in own) for name in ("accepted", "rejected")
            )
            assert accepted + rejected == len(noisy.train)
            rate = run.history["acceptance_rate"][epoch - 1]
            assert accepted / len(noisy.train) == pytest.approx(rate)
            shown = "" if epoch <= settings.policy.warmup_epochs else "0.8"
            assert {row["threshold"] for row in own} == {shown}

    def test_a_plain_head_is_trained_beside_it(self, run, fit_to, noisy, settings):
        paired = run.against_plain
        assert paired.split == "test"
        right = paired.both_right + paired.only_rejection_right
        images = len(noisy.test)
        assert right / images == pytest.approx(run.results["test_accuracy"])
        alone = dataclasses.replace(settings, policy=PolicyConfig("accept-all"))
        plain = fit_to(settings=alone)
        assert paired.results["test_accuracy"] == plain.results["test_accuracy"]
        assert paired.history == plain.history
        kept = json.loads((run.folder / "results.json").read_text())["against_plain"]
        assert kept["both_right"] == paired.both_right

    def test_no_plain_head_where_none_is_wanted(self, fit_to, settings, tmp_path):
        short = dataclasses.replace(settings, epochs=1)
        assert fit_to(settings=short).against_plain is None
        run = fit_to(tmp_path / "one", settings=short, with_plain=False)
        assert run.against_plain is None
        every = dataclasses.replace(short, policy=PolicyConfig("accept-all"))
        assert fit_to(tmp_path / "other", settings=every).against_plain is None

    def test_samples_say_which_labels_are_wrong(self, run, noisy):
        with (run.folder / "samples.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        train = [row for row in rows if row["split"] == "train"]
        wrong = sum(row["given_label"] != row["clean_label"] for row in train)
        assert wrong == np.sum(noisy.train.labels != noisy.train.clean_labels) > 0
        assert {row["id"] for row in train} == set(noisy.train.ids)

    def test_results_are_those_of_the_joined_model(self, run, noisy):
        images = np.stack([image for _, image in noisy.test.images((16, 16))])
        loaded = keras.saving.load_model(run.folder / "model.keras")
        predicted = loaded.predict(images, verbose=0)
        np.testing.assert_allclose(
            predicted, run.model.predict(images, verbose=0), atol=1e-6
        )
        accuracy = np.mean(predicted.argmax(axis=-1) == noisy.test.labels)
        assert run.results["test_accuracy"] == pytest.approx(accuracy)

    def test_wrong_labels_are_rejected_more_often_than_right_ones(self, run):
        results = run.results
        assert results["wrong_labels"] == pytest.approx(6 / 24, abs=0.05)
        assert results["wrong_labels_rejected"] > results["right_labels_rejected"]
        assert results["acceptance_rate"] == run.history["acceptance_rate"][-1]

    def test_the_same_seed_gives_the_same_numbers(self, run, fit_to, settings):
        again = fit_to()
        assert again.history == run.history
        for one, other in zip(
            again.model.get_weights(), run.model.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        other_seed = fit_to(settings=TrainConfig(epochs=1, seed=1))
        assert other_seed.history["loss"][0] != run.history["loss"][0]

    def test_the_head_is_saved_with_its_policy(self, run, noisy, settings):
        head = keras.saving.load_model(run.folder / "head.keras")
        steps = settings.epochs * -(-len(noisy.train) // settings.batch_size)
        assert int(head.policy.steps_seen) == int(run.head.policy.steps_seen) == steps
        np.testing.assert_array_equal(head.get_weights()[0], run.head.get_weights()[0])

    def test_predict_uses_the_folder(self, run, photo_folder):
        file = photo_folder / "green" / "05.png"
        for model in (run.folder, run.folder / "model.keras"):
            (prediction,) = predict_files(model, [file])
            assert prediction.label in ("blue", "green", "red")

    def test_nothing_is_overwritten(self, run, fit_to):
        before = (run.folder / "results.json").read_bytes()
        with pytest.raises(InvalidArgument, match="Nothing is overwritten"):
            fit_to(run.folder)
        assert (run.folder / "results.json").read_bytes() == before

    def test_a_file_in_the_way(self, fit_to, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InvalidArgument, match="is a file"):
            fit_to(tmp_path / "file" / "run")

    def test_a_run_that_accepts_nothing_is_an_error(self, fit_to):
        hopeless = TrainConfig(
            policy=PolicyConfig(threshold=1e-6, warmup_epochs=0), epochs=2
        )
        with (
            pytest.warns(UserWarning, match="accepted no sample"),
            pytest.raises(TrainingStalled, match="--threshold"),
        ):
            fit_to(settings=hopeless)

    def test_a_users_callback_runs(self, fit_to):
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(sorted(logs))
        )
        fit_to(settings=TrainConfig(epochs=2), callbacks=[note])
        assert len(seen) == 2
        assert {"acceptance_rate", "loss", "val_accuracy"} <= set(seen[0])

    def test_views_train(self, fit_to):
        assert len(fit_to(augmentations=2, settings=TrainConfig(epochs=1)).history) > 0


class TestSettings:
    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"epochs": 0}, "epochs"),
            ({"batch_size": 0}, "batch_size"),
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"learning_rate": float("nan")}, "learning_rate"),
            ({"optimizer": "sdg"}, "sdg"),
        ],
    )
    def test_refused(self, wrong, message):
        with pytest.raises(InvalidArgument, match=message):
            TrainConfig(**wrong)

    def test_sgd_has_momentum_and_the_others_their_defaults(self):
        assert make_optimizer(TrainConfig()).momentum == 0.9
        adam = make_optimizer(TrainConfig(optimizer="Adam", learning_rate=0.5))
        assert isinstance(adam, keras.optimizers.Adam)
        assert float(adam.learning_rate) == 0.5


class TestPolicyChoice:
    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"name": "keep-fractoin"}, "Did you mean 'keep-fraction'"),
            ({"threshold": 0.0}, "positive"),
            ({"threshold": float("nan")}, "positive"),
            ({"relative_threshold": -1.0}, "relative_threshold"),
            ({"keep_fraction": 1.5}, "keep_fraction"),
            ({"level": "epoch"}, "level"),
            ({"warmup_epochs": -1}, "warmup_epochs"),
        ],
    )
    def test_refused(self, wrong, message):
        with pytest.raises(InvalidArgument, match=message):
            PolicyConfig(**wrong)

    @pytest.mark.parametrize(
        "numbers, name",
        [
            ({}, "auto"),
            ({"threshold": 1.0}, "loss-threshold"),
            ({"level": "batch"}, "loss-threshold"),
            ({"keep_fraction": 0.7}, "keep-fraction"),
            ({"name": "self-paced", "threshold": 1.0}, "self-paced"),
        ],
    )
    def test_a_number_names_its_policy(self, numbers, name):
        assert PolicyConfig(**numbers).name == name

    @pytest.mark.parametrize("name", [n for n in POLICY_NAMES if n != "auto"])
    def test_every_name_makes_a_policy_with_the_floor(self, name):
        choice = PolicyConfig(name, class_floor=0.2)
        policy = build_policy(choice, num_classes=3, steps_per_epoch=5)
        floor = 0.0 if name == "accept-all" else 0.2
        assert policy.class_floor == floor

    def test_epochs_become_steps_and_the_threshold_follows_the_classes(self):
        choice = PolicyConfig("loss-threshold")
        policy = build_policy(choice, num_classes=10, steps_per_epoch=7)
        assert isinstance(policy, LossThreshold)
        assert policy.warmup_steps == 14
        assert float(policy.threshold) == pytest.approx(0.65 * np.log(10))
        kept = build_policy(
            PolicyConfig("keep-fraction", keep_fraction=0.6, warmup_epochs=1.5),
            num_classes=2,
            steps_per_epoch=4,
        )
        assert isinstance(kept, KeepFraction)
        assert kept.ramp_steps == 6
        assert float(kept.keep_fraction) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "steps, expected", [(1, 1), (64, 64), (65, 33), (128, 64), (1000, 63)]
)
def test_steps_per_execution_are_few_even_calls(steps, expected):
    assert choose_steps_per_execution(steps) == expected
