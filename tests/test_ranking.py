"""Ranking bases: on data where the right order is known, and where a base fails."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from keras_rsft import cli
from keras_rsft.comparison._rank import label_weights, rank_backbones, weighted_mean
from keras_rsft.config import FeatureConfig
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument, WeightsUnavailable
from keras_rsft.label_quality._audit import LabelQuality


@pytest.fixture(scope="module")
def blind_base_file(tmp_path_factory):
    """A base that sees the brightness of an image alone, which all classes share."""
    images = keras.Input((16, 16, 3))
    values = keras.layers.AveragePooling2D(8)(images)
    values = keras.layers.Conv2D(1, 1, kernel_initializer="ones")(values)
    path = tmp_path_factory.mktemp("blind") / "blind.keras"
    keras.Model(images, keras.layers.Flatten()(values)).save(path)
    return path


@pytest.fixture(scope="module")
def ranking(photo_folder, tiny_base_file, blind_base_file, tmp_path_factory):
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.keras"
    damaged.write_bytes(b"no model")
    return rank_backbones(
        load_images(photo_folder),
        [blind_base_file, damaged, tiny_base_file, blind_base_file],
        sample=20,
        features=FeatureConfig(cache_dir=tmp_path_factory.mktemp("kept")),
    )


def test_the_base_that_sees_more_comes_first(ranking, tiny_base_file, blind_base_file):
    names = [one.name for one in ranking.ranked]
    assert names == [str(tiny_base_file), str(blind_base_file)]
    first, last = ranking.ranked
    assert first.accuracy > last.accuracy
    assert (first.behind, first.behind_error) == (0, 0)
    assert last.behind == pytest.approx(first.accuracy - last.accuracy)
    assert (first.dim, last.dim) == (6, 4)
    assert first.image_size == (16, 16)
    assert first.seconds_per_image > 0
    assert last.weights_bytes == 4 * 4
    assert (ranking.num_images, ranking.num_classes) == (20, 3)


def test_a_base_that_fails_is_listed_with_its_reason(ranking):
    ((name, reason),) = ranking.failed
    assert name.endswith("damaged.keras")
    assert "damaged or not a `.keras` file" in reason


def test_another_engine_extracts_the_features(photo_folder, tiny_base_file, tmp_path):
    pytest.importorskip("tf2onnx")
    settings = FeatureConfig(cache_dir=tmp_path, engine="onnxruntime")
    rank_backbones(str(photo_folder), [tiny_base_file], features=settings)
    (meta,) = tmp_path.rglob("meta.json")
    assert json.loads(meta.read_text())["engine"] == "onnxruntime"


def test_where_no_base_can_be_used(photo_folder, tmp_path):
    (tmp_path / "a.keras").write_bytes(b"no model")
    with pytest.raises(
        WeightsUnavailable, match=r"(?s)None of the backbones.*a\.keras"
    ):
        rank_backbones(load_images(photo_folder), [tmp_path / "a.keras"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["resnet51"], "Did you mean 'resnet50'"),
        (["missing.keras"], "no backbone file"),
        (["onnx:missing.onnx@0:1"], "no backbone file"),
        ([], "at least one backbone"),
    ],
)
def test_a_name_that_is_none_is_refused_before_the_work(names, message):
    with pytest.raises(InvalidArgument, match=message):
        rank_backbones("no data is looked at", names)


def label_quality(right, rate, reason=None, *, can_judge=True):
    right = np.asarray(right, np.float32)
    labels = np.zeros(len(right), np.int32)
    return LabelQuality(
        np.ones((len(right), 1)), right, rate, np.eye(1), labels, reason, (), can_judge
    )


def test_labels_are_weighed_by_all_who_can_judge():
    one, two = label_quality([1.0, 0.2], 0.4), label_quality([0.8, 0.4], 0.4)
    blind = label_quality([0.0, 0.0], 1.0, "No better than chance", can_judge=False)
    sure = label_quality([1.0, 1.0], 0.0, "No sign of wrong labels")
    assert label_weights([one, two, blind]) == pytest.approx([0.9, 0.3])
    assert label_weights([one, sure]) == pytest.approx([1.0, 0.6])
    assert label_weights([blind]) == pytest.approx([1.0, 1.0])


def test_a_weighted_mean_by_hand():
    values, weights = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0])
    mean, half = weighted_mean(values, weights)
    assert mean == 0.5
    assert half == pytest.approx(1.959964 * np.sqrt(0.5) / 2)


def test_the_command(photo_folder, tiny_base_file, blind_base_file, tmp_path, capsys):
    kept = ["--cache-dir", str(tmp_path)]
    bases = f"{tiny_base_file},{blind_base_file}"
    arguments = ["rank", str(photo_folder), "--backbones", bases]
    assert cli.main([*arguments, "--noise", "symmetric:0.2", *kept]) == 0
    out = capsys.readouterr().out
    assert "Accuracy" in out
    assert "keras-rsft fit" in out
    assert "made wrong" in out
    assert cli.main(["rank", str(photo_folder), "--backbones", "resnet51"]) == 2
    assert "Did you mean 'resnet50'" in capsys.readouterr().err
