"""Stage two changes the last block and the head, by the accepted samples alone."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from made_bases import last_block, spread_head

from keras_rsft._predict import predict_files
from keras_rsft.backbones._build import leaf_layers
from keras_rsft.backbones._load import load_backbone
from keras_rsft.cli import main
from keras_rsft.config import FeatureConfig, TrainConfig, UnfreezeConfig
from keras_rsft.data._labels import add_label_noise
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, TrainingStalled
from keras_rsft.features._extract import FrozenBackbone, extract_features
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import AcceptAll
from keras_rsft.training import _unfreeze as unfreezing
from keras_rsft.training._features import (
    FeatureSource,
    SplitFeatures,
    open_features,
)
from keras_rsft.training._run import finetune
from keras_rsft.training._unfreeze import begun_from, predicted_on_images

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def split(photo_folder):
    return load_images(str(photo_folder)).train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Normalisation with kept moments, two convolutions, each with BatchNorm."""
    keras.utils.set_random_seed(2)
    images = keras.Input((16, 16, 3))
    normalise = keras.layers.Normalization()
    normalise.adapt(np.random.default_rng(0).uniform(0, 255, (8, 16, 16, 3)))
    x = normalise(images)
    for _ in range(2):
        x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(x)
        x = keras.layers.BatchNormalization()(x)
    path = tmp_path_factory.mktemp("base") / "two.keras"
    keras.Model(images, keras.layers.GlobalAveragePooling2D()(x)).save(path)
    return load_backbone(str(path))


@pytest.fixture(scope="module")
def head():
    return spread_head(6, 3, moments=(np.zeros(6), np.ones(6)))


@pytest.fixture(scope="module")
def kept(base, split, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    frozen = FrozenBackbone(base, num_images=len(split))
    return extract_features(frozen, split, cache_dir=cache, progress=False)


@pytest.fixture(scope="module")
def accepted(kept):
    return np.arange(len(kept)) % 3 != 1


@pytest.fixture(scope="module")
def tune(base, head, split, kept, accepted):
    def run(**changes):
        given = {"split": split, "kept": kept, "accepted": accepted, "head": head}
        given |= {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "seed": 0}
        given |= changes
        how = dataclasses.replace(
            UnfreezeConfig(),
            epochs=given["epochs"],
            learning_rate=given["learning_rate"],
        )
        settings = TrainConfig(
            batch_size=given["batch_size"], seed=given["seed"], unfreeze=how
        )
        nothing = given["split"].take(np.zeros(0, np.int64))
        data = types.SimpleNamespace(train=given["split"], validation=nothing)
        config = FeatureConfig(cache_dir=kept.path.parent.parent, dtype="float32")
        empty = given["kept"].take(np.zeros(0, np.int64))
        features = SplitFeatures(given["kept"], empty, empty, ("a", "b", "c"))
        source = FeatureSource(data, base, features, config, progress=False)
        model = RSFTModel(given["head"], AcceptAll())
        trained = dataclasses.replace(
            begun_from(model, features), accepted=given["accepted"]
        )
        return unfreezing.tune(base, source, trained, settings)[0]

    return run


@pytest.fixture(scope="module")
def tuned(tune):
    return tune()


def changed(before, after):
    pairs = zip(before, after, strict=True)
    return [not np.array_equal(one, other) for one, other in pairs]


class TestWhatChanges:
    def test_only_the_last_block_and_the_head(self, base, head, tuned):
        block = [v.path for layer in last_block(base) for v in layer.weights]
        learnt = [v.path for v in base.weights if "conv2d" in v.path]
        expected = [v.path in block and v.path in learnt for v in base.weights]
        assert sum(expected) == 2  # Kernel and bias of the second convolution.
        own_base, own_head = tuned.layers[1:]
        assert changed(base.get_weights(), own_base.get_weights()) == expected
        assert all(changed(head.get_weights(), own_head.get_weights()))

    def test_batch_norm_stays_bit_identical(self, base, tuned):
        def moving(model):
            return [v.numpy() for v in model.weights if "moving" in v.path]

        assert len(moving(base)) == 4
        assert not any(changed(moving(base), moving(tuned.layers[1])))

    def test_the_given_models_stay_as_they_are(self, tune, base, head, values_of):
        before = values_of(base, head)
        tune(epochs=1)
        assert not any(changed(before, values_of(base, head)))
        assert not any(v.trainable for v in base.variables)
        assert len(head.trainable_variables) == 2

    def test_a_huge_gradient_is_clipped(self, tune, base):
        # Features scaled up a thousand times: so are the gradients.
        head = spread_head(6, 3, moments=(np.zeros(6), np.full(6, 1e-6)))
        one_step = {"epochs": 1, "batch_size": 100, "learning_rate": 1.0}
        tuned = tune(head=head, **one_step)
        before = [*base.get_weights(), *head.get_weights()]
        moved = [
            np.sum(np.square(after - start))
            for after, start in zip(tuned.get_weights(), before, strict=True)
        ]
        assert np.sqrt(sum(moved)) == pytest.approx(1.0, rel=1e-3)

    def test_training_starts_from_what_is_given(self, tune, base, head, split):
        images = np.stack([image for _, image in split.images(16)])
        still = tune(learning_rate=1e-12, epochs=1)
        np.testing.assert_allclose(
            still.predict(images, verbose=0),
            head.predict(base.predict(images, verbose=0), verbose=0),
            atol=1e-6,
        )

    def test_the_loss_on_the_accepted_falls(self, tune, split, kept, accepted):
        images = np.stack([image for _, image in split.images(16)])[accepted]

        def loss(model):
            probabilities = model.predict(images, verbose=0)
            own = probabilities[np.arange(len(images)), kept.labels[accepted]]
            return -np.mean(np.log(own))

        assert loss(tune(epochs=5)) < loss(tune(learning_rate=1e-12, epochs=1))


class TestWhatItLearnsFrom:
    def test_labels_of_rejected_samples_play_no_part(
        self, tune, tuned, split, kept, accepted
    ):
        other = np.where(accepted, kept.labels, (kept.labels + 1) % 3).astype(np.int32)
        again = tune(split=split.with_labels(other), kept=kept.with_labels(other))
        assert not any(changed(tuned.get_weights(), again.get_weights()))

    def test_labels_of_accepted_samples_do(self, tune, tuned, split, kept, accepted):
        other = kept.labels.copy()
        other[np.flatnonzero(accepted)[0]] = (
            other[np.flatnonzero(accepted)[0]] + 1
        ) % 3
        again = tune(split=split.with_labels(other), kept=kept.with_labels(other))
        assert any(changed(tuned.get_weights(), again.get_weights()))

    def test_the_seed_decides_the_order_and_repeats_it(self, tune, tuned):
        assert not any(changed(tuned.get_weights(), tune().get_weights()))
        assert any(changed(tuned.get_weights(), tune(seed=1).get_weights()))


def _features_of(split):
    from keras_rsft.features._store import FeatureSet

    return FeatureSet(Path("unused"), split.labels, split.ids, dim=6)


class TestRefused:
    def test_nothing_accepted(self, tune, accepted):
        with pytest.raises(TrainingStalled, match="leave out `--unfreeze`"):
            tune(accepted=np.zeros_like(accepted))

    def test_features_of_other_images(self, tune, kept):
        other = dataclasses.replace(kept, ids=np.char.add("x", kept.ids))
        with pytest.raises(DataError, match="not in it"):
            tune(kept=other)


class TestTheModel:
    def test_it_is_frozen_saves_and_loads(self, tuned, split, tmp_path):
        assert len(tuned.trainable_variables) == 2  # The head's, as in any run.
        assert not any(layer.trainable for layer in leaf_layers(tuned.layers[1]))
        assert {v.dtype for v in tuned.trainable_variables} == {"float32"}
        assert tuned.dtype == "float32"
        tuned.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        images = np.stack([image for _, image in split.images(16)])
        np.testing.assert_allclose(
            loaded.predict(images, verbose=0),
            tuned.predict(images, verbose=0),
            atol=1e-6,
        )
        assert "keras_rsft" not in json.dumps(loaded.get_config(), default=str)

    def test_it_is_float32_whatever_the_global_policy(self, tune, dtype_policy):
        dtype_policy("mixed_bfloat16")
        model = tune(epochs=1)
        assert model.output.dtype == "float32"
        assert {layer.compute_dtype for layer in model.layers} == {"float32"}

    def test_predictions_on_images_are_those_of_the_model(self, tuned, split):
        images = np.stack([image for _, image in split.images(16)])
        index, predicted = predicted_on_images(tuned, split, batch_size=5)
        expected = tuned.predict(images, verbose=0).argmax(axis=-1)
        np.testing.assert_array_equal(predicted, expected[index])
        np.testing.assert_array_equal(np.sort(index), np.arange(len(split)))


class TestRun:
    @pytest.fixture(scope="class")
    def cache(self, tmp_path_factory):
        return tmp_path_factory.mktemp("cache")

    @pytest.fixture
    def fit(self, photo_folder, tiny_base_file, tmp_path, cache):
        def call(**changes):
            settings = TrainConfig(
                epochs=3, batch_size=8, learning_rate=0.05,
                unfreeze=UnfreezeConfig(epochs=2),
            )  # fmt: skip
            data = load_images(str(photo_folder), **changes)
            return finetune(
                add_label_noise(data, "symmetric:0.25", seed=0),
                features=FeatureConfig(str(tiny_base_file), cache_dir=cache),
                settings=settings,
                output=tmp_path / "run",
                with_plain=False,
                progress=False,
            )

        return call

    def test_it_writes_a_model_that_predicts(self, fit, photo_folder):
        done = fit()
        results = json.loads((done.folder / "results.json").read_text())
        assert results["stage2_kept"] in (0.0, 1.0)
        assert 0 <= results["stage2_validation_accuracy"] <= 1
        assert 0 <= results["stage2_test_accuracy"] <= 1
        config = json.loads((done.folder / "config.json").read_text())
        assert config["unfreeze"]["layers"] == "last-block"
        (prediction,) = predict_files(done.folder, [photo_folder / "green" / "05.png"])
        assert prediction.label in ("blue", "green", "red")

    @pytest.mark.parametrize("mistakes, kept", [(1, 1.0), (2, 0.0)])
    def test_kept_where_validation_is_not_lower(
        self, fit, monkeypatch, mistakes, kept, tiny_base
    ):
        def predicted(model, split):
            same = np.array_equal(model.get_weights()[0], tiny_base.get_weights()[0])
            answers = np.array(split.labels)
            wrong = slice(1 if same else mistakes)
            answers[wrong] = (answers[wrong] + 1) % 3
            return np.arange(len(split)), answers

        monkeypatch.setattr(unfreezing, "predicted_on_images", predicted)
        done = fit()
        results, count = done.results, len(done.features.validation)
        assert results["stage2_kept"] == kept
        assert results["stage2_validation_accuracy"] == (count - mistakes) / count
        untouched = np.array_equal(
            done.model.get_weights()[0], tiny_base.get_weights()[0]
        )
        assert untouched == (kept == 0.0)
        for name in ("validation_accuracy", "test_accuracy"):
            assert (f"head_{name}" in results) == (kept == 1.0)
            assert (results[name] == results[f"stage2_{name}"]) == (kept == 1.0)

    def test_without_validation_the_head_stays(self, fit, monkeypatch, tiny_base):
        measured = []
        monkeypatch.setattr(
            unfreezing,
            "predicted_on_images",
            lambda model, split: (
                measured.append(split.name),
                np.array(split.labels),
            ),
        )

        def without_validation(*data, **options):
            source = open_features(*data, **options)
            empty = _features_of(source.data.validation.take(np.zeros(0, np.int64)))
            features = dataclasses.replace(source.features, validation=empty)
            return dataclasses.replace(source, features=features)

        monkeypatch.setattr(
            "keras_rsft.training._run.open_features", without_validation
        )
        results = fit().results
        assert measured == ["test"]
        assert results["stage2_kept"] == 0.0
        assert "stage2_validation_accuracy" not in results


def test_the_flag_belongs_to_fit_alone(photo_folder, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(photo_folder), "--unfreeze", "last-block"])
    assert "--unfreeze" in capsys.readouterr().err
