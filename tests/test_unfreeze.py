"""A run in which a part of the base learns: what changes and what does not."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from made_bases import changed_layers, save_three_blocks
from same_run import assert_same_run

from keras_rsft._predict import predict_files
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig, UnfreezeConfig
from keras_rsft.data._samples import FileReader
from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled
from keras_rsft.features._batches import ImageBatches
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.training import _resume as resume
from keras_rsft.training import _unfreeze as unfreezing
from keras_rsft.training._features import open_features
from keras_rsft.training._head import train_head
from keras_rsft.training._run import finetune
from keras_rsft.training._unfreeze import cut_backbone, train_unfrozen

pytestmark = pytest.mark.usefixtures("eager")

HEAD_EPOCHS, BASE_EPOCHS = 2, 2
# Shares of the free disk that activations may take.
CACHED, ANEW = 1.0, 0.0


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """Three convolutions, each followed by a BatchNorm with statistics of its own."""
    return save_three_blocks(tmp_path_factory.mktemp("base") / "three.keras")


@pytest.fixture(scope="module")
def settings():
    return TrainConfig(
        policy=PolicyConfig("keep-fraction", keep_fraction=0.6, warmup_epochs=1),
        epochs=HEAD_EPOCHS,
        batch_size=8,
        learning_rate=0.05,
        unfreeze=UnfreezeConfig(1, epochs=BASE_EPOCHS),
    )


@pytest.fixture(scope="module")
def source(noisy_photos, base_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    config = FeatureConfig(str(base_file), dtype="float32", cache_dir=cache)
    return open_features(noisy_photos, config, progress=False)


@pytest.fixture(scope="module")
def train(source, settings):
    """Trains a head and then the part, from kept activations or from images."""

    @functools.cache
    def run(
        *, keep=True, optimizer="sgd", learning_rate=0.05, base_rate=None, **changes
    ):
        how = dataclasses.replace(
            settings, optimizer=optimizer, learning_rate=learning_rate,
            unfreeze=dataclasses.replace(
                settings.unfreeze, learning_rate=base_rate, **changes
            ),
        )  # fmt: skip
        trained = train_head(source.features, how, progress=False)
        part = cut_backbone(source.backbone, how.unfreeze)
        classifier, whole = train_unfrozen(
            part, trained, source, source.features, how, cached=keep
        )
        return part, trained, (classifier, whole)

    return run


@pytest.fixture(scope="module")
def fit(noisy_photos, base_file, settings, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def run(output, **options):
        changes = options.pop("changes", {})
        if how := options.pop("how", None):
            how = dataclasses.replace(settings.unfreeze, **how)
            changes = changes | {"unfreeze": how}
        return finetune(
            noisy_photos, output=output,
            features=FeatureConfig(str(base_file), cache_dir=cache),
            settings=dataclasses.replace(settings, **changes), with_plain=False,
            progress=False, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def choose(monkeypatch):
    """Has a run keep activations, or not."""

    def chosen(choice):
        monkeypatch.setattr(unfreezing, "LARGEST_SHARE_OF_DISK", choice)

    return chosen


class TestWhatLearns:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            (1, {"block3_conv"}),
            (2, {"block2_conv", "block3_conv"}),
            (("block2_conv",), {"block2_conv"}),
            pytest.param(
                "all",
                {"block1_conv", "block2_conv", "block3_conv"},
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_the_chosen_layers_alone(self, train, source, layers, expected):
        changes = {"layers": layers, "keep": layers != "all"}
        if layers == 2:
            changes |= {"optimizer": "adam", "learning_rate": 0.01}
        part, trained, tuned = train(**changes)
        assert changed_layers(source.backbone, part.backbone) == expected
        own_backbone, own_head = tuned[0].layers[1:]
        assert own_backbone is part.backbone
        assert changed_layers(trained.model.model, own_head) == {"scores"}
        assert not any(v.trainable for v in own_backbone.variables)

    def test_batch_norm_where_it_is_asked_for(self, train, source):
        part, _, _ = train(train_batch_norm=True, epochs=1)
        assert changed_layers(source.backbone, part.backbone) == {
            "block3_conv",
            "block3_bn",
        }
        norm = part.backbone.layers[1].get_layer("block3_bn")
        assert not np.allclose(norm.moving_mean.numpy(), 0.1)

    @pytest.mark.slow
    def test_a_slow_base_moves_less_and_the_head_as_before(self, train, source):
        def movement(rate):
            part, trained, tuned = train(epochs=1, base_rate=rate)
            own, given = part.backbone.get_weights(), source.backbone.get_weights()
            base = sum(
                np.abs(one - other).sum() for one, other in zip(own, given, strict=True)
            )
            head = tuned[0].layers[2].get_weights()
            before = trained.model.model.get_weights()
            return base, np.abs(head[-1] - before[-1]).sum()

        (slow, head), (fast, other_head) = movement(1e-5), movement(1e-3)
        assert fast / slow == pytest.approx(100, rel=0.2)
        assert head == pytest.approx(other_head, rel=0.2)

    @pytest.mark.slow
    def test_from_images_as_from_kept_activations(self, train):
        changes = {"layers": 2, "optimizer": "adam", "learning_rate": 0.01}
        _, _, kept = train(**changes, keep=True)
        _, _, anew = train(**changes, keep=False)
        for own, other in zip(
            kept[0].get_weights(), anew[0].get_weights(), strict=True
        ):
            np.testing.assert_allclose(own, other, atol=1e-4)
        for name, values in kept[1].history.items():
            np.testing.assert_allclose(anew[1].history[name], values, atol=1e-4)

    def test_the_ledger_goes_on(self, train, source):
        _, trained, tuned = train(layers=1, keep=True)
        epochs = HEAD_EPOCHS + BASE_EPOCHS
        assert tuned[1].ledger is trained.ledger
        assert (trained.ledger.seen == epochs).all()
        whole = tuned[1]
        assert np.shape(whole.recorder.acceptance_by_class) == (epochs, 3)
        assert len(whole.recorder.loss_histograms) == epochs
        assert {len(values) for values in whole.history.values()} == {epochs}
        assert whole.accepted.sum() == pytest.approx(
            whole.history["acceptance_rate"][-1] * len(source.features.train)
        )


class TestRun:
    def test_a_base_that_accepts_nothing_is_an_error(self, fit, tmp_path, choose):
        choose(CACHED)  # The head's epochs are the warm-up, which does not begin again.
        policy = PolicyConfig(threshold=1e-9, warmup_epochs=HEAD_EPOCHS)
        with (
            pytest.warns(UserWarning, match="accepted no sample"),
            pytest.raises(TrainingStalled, match="in which the backbone learns"),
        ):
            fit(tmp_path / "run", changes={"policy": policy})

    @pytest.mark.slow
    def test_the_whole_way(self, fit, noisy_photos, photo_folder, tmp_path, choose):
        notes = []
        choose(CACHED)
        # A learning rate at which the base changes and validation is not worse.
        done = fit(tmp_path / "run", on_note=notes.append,
                   how={"learning_rate": 1e-6})  # fmt: skip
        (note,) = notes
        assert "are cached: " in note
        results = json.loads((done.folder / "results.json").read_text())
        assert results["unfrozen_kept"] == 1.0
        for name in ("validation_accuracy", "test_accuracy"):
            assert results[name] == results[f"unfrozen_{name}"]
            assert f"head_{name}" in results
            assert results[f"{name}_clean"] == results[f"unfrozen_{name}_clean"]
        # By right labels in the epochs that train the backbone too.
        whole = done.history["val_accuracy_estimated"]
        assert whole[-1] == pytest.approx(results["validation_accuracy_clean"])
        config = json.loads((done.folder / "config.json").read_text())
        assert config["unfreeze"]["layers"] == 1
        rows = (done.folder / "metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + HEAD_EPOCHS + BASE_EPOCHS
        (prediction,) = predict_files(done.folder, [photo_folder / "green" / "05.png"])
        assert prediction.label in ("blue", "green", "red")
        kept = keras.models.load_model(done.folder / "model.keras")
        for own, other in zip(
            kept.get_weights(), done.model.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(own, other)

    def test_what_cannot_be_done_is_refused_before_the_pass(
        self, fit, noisy_photos, settings, monkeypatch, tmp_path
    ):
        def no_pass(*_, **__):
            raise AssertionError("The base was run.")

        monkeypatch.setattr("keras_rsft.training._features.feature_passes", no_pass)
        with pytest.raises(InvalidArgument, match="Near it: block2_conv"):
            fit(None, how={"layers": ("block2_cnv",)})
        with pytest.raises(InvalidArgument, match="has 3 blocks"):
            fit(None, how={"layers": 7})
        for base in ("onnx:some.onnx@imagenet", "savedmodel:some@0:1"):
            with pytest.raises(InvalidArgument, match="no Keras layers"):
                finetune(noisy_photos, features=base, settings=settings)

    def test_settings_that_do_not_fit(self, settings):
        for changes, message in (
            ({"learning_rate": 0.0}, "positive"),
            ({"epochs": 0}, "at least 1"),
            ({"batch_size": 0}, "at least 1"),
            ({"layers": -1}, "at least 1"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                dataclasses.replace(settings.unfreeze, **changes)
        assert settings.unfreeze_rate == pytest.approx(0.005)

    def test_options_without_unfreeze(self, call, photo_folder):
        status, _, error = call("fit", photo_folder, "--set", "unfreeze_epochs=2")
        assert status == 2
        assert "--unfreeze" in error
        status, _, error = call("fit", photo_folder, "--unfreeze", "0")
        assert status == 2
        assert "at least 1" in error


class TestWhichIsKept:
    @pytest.fixture
    def judged(self, source, monkeypatch):
        head_only, tuned = object(), object()

        def judge(predicted, by_head, part, quality=None):
            monkeypatch.setattr(
                unfreezing,
                "predicted_on_images",
                lambda model, split: (
                    None,
                    by_head if model is head_only else predicted,
                ),
            )
            results = {"validation_accuracy": 0.6, "test_accuracy": 0.7}
            results |= {"test_accuracy_estimated": 0.9}
            trained = SimpleNamespace(results=results, label_quality=quality)
            features = dataclasses.replace(source.features, validation=part, test=part)
            kept = unfreezing.better_model(
                head_only,
                tuned,
                dataclasses.replace(source, features=features),
                trained,
                name="unfrozen",
            )
            return kept is tuned, results

        return judge

    @pytest.fixture
    def part(self, source):
        """200 labels, of which 60 of the first class are wrong."""
        right = np.arange(200) % 2
        wrong = (right == 0) & (np.arange(200) < 120)
        labels = np.where(wrong, 1, right)
        return dataclasses.replace(
            source.features.validation,
            labels=labels,
            ids=np.arange(200).astype(str),
            clean_labels=right,
        )

    def test_what_is_not_worse_by_the_given_labels(self, judged, part):
        unknown = dataclasses.replace(part, clean_labels=None)
        half = np.where(np.arange(200) < 100, part.labels, 2)
        kept, results = judged(half, half, unknown)
        assert kept
        assert results["unfrozen_kept"] == 1.0
        assert results["test_accuracy"] == results["unfrozen_test_accuracy"] == 0.5
        assert results["head_validation_accuracy"] == 0.6
        assert results["head_test_accuracy_estimated"] == 0.9
        assert "test_accuracy_estimated" not in results
        worse = np.where(np.arange(200) < 80, part.labels, 2)
        kept, results = judged(worse, half, unknown)
        assert not kept
        assert results["unfrozen_kept"] == 0.0
        assert results["unfrozen_validation_accuracy"] == 0.4
        assert results["test_accuracy"] == 0.7
        assert "head_test_accuracy" not in results

    @pytest.mark.parametrize("known", [True, False])
    def test_what_is_not_worse_by_right_labels(self, judged, part, known):
        """The head repeats the common mistake, and the given labels say it is right."""
        right, ones = part.clean_labels, np.ones(200, int)
        noise = np.array([[0.4, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        beliefs = np.full((200, 3), 0.01, np.float32)
        beliefs[np.arange(200), right] = 0.98
        sure = np.full(200, 0.7, np.float32)
        found = LabelQuality(beliefs, sure, 0.3, noise, part.labels)
        quality = dataclasses.replace(found, held_out=(found, found))
        if not known:
            part = dataclasses.replace(part, clean_labels=None)
        assert np.mean(right == part.labels) < np.mean(ones == part.labels)
        kept, results = judged(right, ones, part, quality)
        assert kept
        key = f"test_accuracy_{'clean' if known else 'estimated'}"
        assert results[key] == results[f"unfrozen_{key}"] > 0.9
        assert results["test_accuracy"] == 0.7
        assert not judged(ones, right, part, quality)[0]
        if not known:  # Nothing was found out about the labels.
            assert judged(ones, right, part)[0]

    def test_what_was_asked_for_where_nothing_can_judge(self, judged, part):
        nothing = part.take(np.zeros(0, np.int64))
        assert judged(np.ones(0), np.zeros(0), nothing)[0]


class Killed(BaseException):
    """Nothing catches it: a stand-in for `kill -9`."""


class TestGoesOn:
    @pytest.mark.slow
    def test_stopped_politely(self, fit, tmp_path, stop_at, choose):
        choose(ANEW)
        whole = fit(tmp_path / "whole")
        stop_at(HEAD_EPOCHS + 1)
        with pytest.raises(KeyboardInterrupt) as stop:
            fit(tmp_path / "stopped")
        assert "3 of 4 epochs are kept" in stop.value.__notes__[0]
        choose(CACHED)  # Would be chosen now, and is not.
        assert_same_run(fit(tmp_path / "stopped"), whole)

    @pytest.mark.slow
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_killed(self, fit, tmp_path, stop_at, choose, monkeypatch, on_disk):
        changes = {"optimizer": "adam"}
        if on_disk:  # The state of each epoch, not only every ten seconds.
            monkeypatch.setattr(resume, "TIMES_ITS_COST", 0.0)
            monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
        choose(CACHED)
        whole = fit(tmp_path / "whole", changes=changes)
        stop_at(HEAD_EPOCHS + 1, Killed)
        with pytest.raises(Killed):
            fit(tmp_path / "killed", changes=changes)
        unfinished = tmp_path / "killed.unfinished"
        assert (unfinished / "training.npz").exists()  # The head need not learn again.
        if on_disk:
            assert (unfinished / "base_training.npz").exists()
        choose(ANEW)  # Would be chosen now, and is not.
        assert_same_run(fit(tmp_path / "killed", changes=changes), whole)

    @pytest.mark.slow
    def test_on_accepted_samples_alone(self, fit, tmp_path, stop_at):
        how = {"layers": "last-block", "epochs": 4, "learning_rate": 1e-4}
        whole = fit(tmp_path / "whole", how=how)
        stop_at(3)  # The head has two epochs, and the unfrozen layers count anew.
        with pytest.raises(KeyboardInterrupt) as stop:
            fit(tmp_path / "stopped", how=how)
        assert "5 of 6 epochs are kept" in stop.value.__notes__[0]
        assert (tmp_path / "stopped.unfinished" / "base_training.npz").exists()
        assert_same_run(fit(tmp_path / "stopped", how=how), whole)


class TestImageBatches:
    @pytest.mark.parametrize("any_order", [True, False])
    @pytest.mark.slow
    def test_order_of_kept_features(self, source, monkeypatch, any_order):
        monkeypatch.setattr(
            "keras_rsft.features._batches.IMAGE_WINDOW_BYTES", 16 * 16 * 16 * 3 * 4
        )
        monkeypatch.setattr(FileReader, "any_order", any_order)
        kept, split = source.features.train, source.data.train
        batches = ImageBatches(split, kept, (16, 16), batch_size=7, seed=3)
        images = {
            str(split.ids[int(at)]): image.numpy() for at, image in split.images(16)
        }
        seen = []
        for epoch in (0, 1):
            batches.callback.on_epoch_begin(epoch)
            order = []
            for x, y, _, index in batches.dataset:
                for one, label, at in zip(x, y, index, strict=True):
                    assert label == kept.labels[at]
                    np.testing.assert_array_equal(one, images[str(kept.ids[at])])
                order += index.numpy().tolist()
            assert sorted(order) == list(range(len(kept)))
            seen.append(order)
        assert seen[0] != seen[1]
        assert seen[0] == batches._order_of.order(0)[0].numpy().tolist()

    @pytest.mark.parametrize("any_order", [True, False])
    def test_an_image_that_is_gone(self, source, monkeypatch, any_order):
        kept, split = source.features.train, source.data.train
        ids = split.ids.copy()
        ids[3] = "red/gone.png"
        gone = dataclasses.replace(split, reader=FileReader(split.reader._root, ids))
        monkeypatch.setattr(FileReader, "any_order", any_order)
        batches = ImageBatches(gone, kept, (16, 16), batch_size=7, seed=3)
        with pytest.raises(DataError, match="cannot: The file"):
            list(batches._parts())
        assert str(split.ids[3]) in str(batches.failure)


@pytest.mark.slow
def test_export_with_verification(fit, call, tmp_path, choose):
    choose(CACHED)
    done = fit(tmp_path / "run", how={"learning_rate": 1e-6})
    assert done.results["unfrozen_kept"] == 1.0
    status, output, error = call("export", done.folder, "--verify")
    assert (status, error) == (0, "")
    assert "same as the run" in output
    (card,) = tmp_path.glob("saved_models/*/1/README.md")
    assert "A part of the backbone was trained too." in card.read_text()
