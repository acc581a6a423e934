"""Runs on bases that are no Keras models: trained, used and exported."""

from __future__ import annotations

import numpy as np
import pytest
from made_bases import classifier_of, save_onnx, save_signature

from keras_rsft import cli
from keras_rsft._predict import predict_files
from keras_rsft.config import (
    ExportConfig,
    FeatureConfig,
    PolicyConfig,
    TrainConfig,
    UnfreezeConfig,
)
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.export._export_run import export_run
from keras_rsft.export._formats import export_onnx
from keras_rsft.export._runtimes import load_exported
from keras_rsft.training._run import finetune

pytestmark = pytest.mark.usefixtures("eager")

SETTINGS = TrainConfig(policy=PolicyConfig("accept-all"), epochs=3, learning_rate=0.05)


@pytest.fixture(scope="module")
def run_on(photo_folder, tmp_path_factory):
    def run(name):
        root = tmp_path_factory.mktemp("run")
        return finetune(
            load_images(photo_folder),
            features=FeatureConfig(name, cache_dir=root / "kept"),
            settings=SETTINGS,
            output=root / "run",
            progress=False,
        )

    return run


@pytest.fixture(scope="module")
def onnx_run(run_on, tmp_path_factory):
    pytest.importorskip("tf2onnx")
    path = save_onnx(tmp_path_factory.mktemp("onnx") / "tiny.onnx")
    return run_on(f"onnx:{path}@imagenet")


@pytest.fixture(scope="module")
def saved_model_run(run_on, tmp_path_factory):
    path = save_signature(tmp_path_factory.mktemp("saved") / "tiny")
    return run_on(f"savedmodel:{path}@0:1")


def assert_same_answers(one, other, files):
    answers = [list(predict_files(model, files)) for model in (one, other)]
    labels = [[answer.label for answer in each] for each in answers]
    scores = [[answer.score for answer in each] for each in answers]
    assert labels[0] == labels[1]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-4)
    assert len(set(labels[0])) > 1


@pytest.fixture(scope="module")
def files(photo_folder):
    return sorted(photo_folder.glob("*/0*.png"))


def test_a_run_on_an_onnx_base_answers_and_becomes_one_onnx_file(
    onnx_run, files, tmp_path
):
    settings = ExportConfig(file_format="onnx")
    exported = export_run(onnx_run.folder, directory=tmp_path, settings=settings)
    assert_same_answers(onnx_run.folder, exported.path, files)


def test_a_run_on_an_onnx_base_cannot_be_a_saved_model(onnx_run, tmp_path, capsys):
    for file_format in ("saved-model", "litert"):
        command = ["export", str(onnx_run.folder), "--format", file_format]
        assert cli.main([*command, "--directory", str(tmp_path / "out")]) == 2
        assert "`--format onnx`" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.slow
def test_a_run_on_a_saved_model_is_exported_as_any_other(
    saved_model_run, files, tmp_path
):
    pytest.importorskip("tf2onnx")
    for file_format in ("saved-model", "onnx"):
        settings = ExportConfig(file_format=file_format)
        exported = export_run(
            saved_model_run.folder, directory=tmp_path, settings=settings
        )
        assert_same_answers(saved_model_run.folder, exported.path, files)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": True},
        {"channels_first": False, "feature_map": True},
        {"half": True},
        {"opset": 20, "feature_map": True},
    ],
    ids=str,
)
def test_the_joined_file_computes_as_the_model(options, tmp_path):
    pytest.importorskip("tf2onnx")
    from keras_rsft.backbones._load import load_backbone

    path = save_onnx(tmp_path / "a.onnx", **options)
    model = classifier_of(load_backbone(f"onnx:{path}@-1:1"), 3)
    exported = export_onnx(model, tmp_path / "b.onnx", class_names=("a", "b", "c"))
    images = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    found = load_exported(exported).probabilities(images)
    tolerance = 1e-3 if options.get("half") else 1e-5
    np.testing.assert_allclose(found, model(images), rtol=0, atol=tolerance)


def test_a_fixed_number_of_images_is_not_joined(tmp_path):
    pytest.importorskip("tf2onnx")
    from keras_rsft.backbones._load import load_backbone

    path = save_onnx(tmp_path / "a.onnx", batch=2)
    model = classifier_of(load_backbone(f"onnx:{path}@0:1"), 3)
    with pytest.raises(InvalidArgument, match="number of images open"):
        export_onnx(model, tmp_path / "b.onnx", class_names=("a", "b", "c"))


def test_stage_two_is_refused_before_the_work(photo_folder):
    settings = TrainConfig(unfreeze=UnfreezeConfig())
    with pytest.raises(InvalidArgument, match="no Keras layers"):
        finetune(photo_folder, features="onnx:missing.onnx@0:1", settings=settings)
