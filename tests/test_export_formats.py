"""LiteRT and ONNX files say what the SavedModel says, of the same images."""

from __future__ import annotations

import errno
import os
import random
import re
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from made_bases import classifier_of, spread_head
from made_damage import damage

from keras_rsft._storage import write_new_file
from keras_rsft.backbones._build import build_classifier
from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._formats import export_litert, export_onnx
from keras_rsft.export._runtimes import load_exported
from keras_rsft.export._saved_model import export_saved_model

NAMES = ("blue", "green", "réd")


@pytest.fixture(scope="module")
def classifier(tiny_base_file):
    keras.utils.set_random_seed(0)
    return classifier_of(load_backbone(str(tiny_base_file)), 3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (5, 16, 16, 3)).astype("float32")


@pytest.fixture(scope="module")
def expected(classifier, images, tmp_path_factory):
    """What the SavedModel says."""
    directory = tmp_path_factory.mktemp("served") / "photos"
    version = export_saved_model(classifier, directory, class_names=NAMES)
    return load_exported(version).probabilities(images)


def export_as(suffix, model, folder, **options):
    if suffix == "tflite":
        pytest.importorskip("ai_edge_litert")
        return export_litert(model, folder / "model-1.tflite", **options)
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    return export_onnx(model, folder / "model-1.onnx", **options)


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_any_batch_gives_the_saved_models_probabilities(
    suffix, classifier, images, expected, tmp_path
):
    path = export_as(suffix, classifier, tmp_path / "new", class_names=NAMES)
    exported = load_exported(path)
    assert exported.class_names == NAMES
    assert exported.image_size == (16, 16)
    for count in (5, 1, 3):
        np.testing.assert_allclose(
            exported.probabilities(images[:count]), expected[:count], atol=1e-3
        )
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_a_damaged_file_is_told_by_its_name(suffix, classifier, tmp_path):
    path = export_as(suffix, classifier, tmp_path, class_names=NAMES)
    whole, said = path.read_bytes(), []
    for seed in range(60):
        path.write_bytes(whole)
        damage(path, random.Random(seed))
        try:
            exported = load_exported(path)
        except DataError as error:
            said.append(str(error))
        else:
            assert len(exported.class_names) == 3
    assert len(said) > 20
    assert all(str(path) in one for one in said)


@pytest.mark.parametrize("content", [b"", b"blue\n", b"\xff\n\n\n"])
def test_class_names_that_do_not_fit_are_told(classifier, tmp_path, content):
    version = export_saved_model(classifier, tmp_path / "m", class_names=NAMES)
    (version / "assets" / "labels.txt").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(version))):
        load_exported(version)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_a_real_base_gives_the_saved_models_probabilities(suffix, tmp_path):
    keras.utils.set_random_seed(0)
    base = load_backbone("efficientnet_lite0", image_size=64)
    rng = np.random.default_rng(0)
    dim = base.output_shape[-1]
    moments = rng.normal(size=dim), rng.uniform(1, 2, dim)  # As a trained head has.
    model = build_classifier(base, 3, head=spread_head(dim, 3, moments=moments))
    images = rng.uniform(0, 255, (4, 64, 64, 3)).astype("float32")
    version = export_saved_model(model, tmp_path / "photos", class_names=NAMES)
    path = export_as(suffix, model, tmp_path, class_names=NAMES)
    np.testing.assert_allclose(
        load_exported(path).probabilities(images),
        load_exported(version).probabilities(images),
        atol=1e-3,
    )


def test_narrow_weights_make_smaller_litert_files(images, tmp_path):
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input((16, 16, 3))
    values = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    values = keras.layers.Dense(64, activation="relu")(values)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(values))
    sizes = {}
    for weight_dtype in ("float32", "float16", "int8"):
        path = export_litert(
            model,
            tmp_path / f"{weight_dtype}.tflite",
            class_names=NAMES,
            weight_dtype=weight_dtype,
        )
        sizes[weight_dtype] = path.stat().st_size
        received = load_exported(path).probabilities(images)
        np.testing.assert_allclose(received, model(images), atol=0.05)
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.35 * sizes["float32"]


@pytest.mark.parametrize("export", [export_litert, export_onnx])
def test_nothing_is_overwritten_and_nothing_half_written(export, classifier, tmp_path):
    suffix = "tflite" if export is export_litert else "onnx"
    path = tmp_path / f"mine.{suffix}"
    path.write_text("mine")
    with pytest.raises(InvalidArgument, match="nothing is overwritten"):
        export(classifier, path, class_names=NAMES)
    assert path.read_text() == "mine"
    with pytest.raises(InvalidArgument, match="3 classes"):
        export(classifier, tmp_path / f"other.{suffix}", class_names=NAMES[:1])
    with pytest.raises(InvalidArgument, match="must end in"):
        export(classifier, tmp_path / "model.bin", class_names=NAMES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InvalidArgument, match="nothing is overwritten"):
        write_new_file(tmp_path / "mine", b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "mine"


def test_files_are_written_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_new_file(tmp_path / "mine", b"first")
    with pytest.raises(InvalidArgument, match="nothing is overwritten"):
        write_new_file(tmp_path / "mine", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_bytes() == b"first"


@pytest.mark.parametrize(
    "export, suffix, module, extra",
    [
        (load_exported, "tflite", "ai_edge_litert.interpreter", "litert"),
        (load_exported, "onnx", "onnxruntime", "onnx"),
        (export_onnx, "onnx", "tf2onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    export, suffix, module, extra, classifier, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"x.{suffix}"
    arguments = {}
    if export is load_exported:
        path.write_bytes(b"")
    else:
        arguments = {"class_names": NAMES}
    with pytest.raises(ImportError, match=rf"keras_rsft\[{extra}\]"):
        export(*([classifier] if arguments else []), path, **arguments)


def test_files_of_others_are_refused(tmp_path):
    pytest.importorskip("ai_edge_litert")
    for name, content in (("a.tflite", b"nothing"), ("b.txt", b"")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.txt"):
        load_exported(tmp_path / "a.tflite")
    with pytest.raises(InvalidArgument, match="An exported model"):
        load_exported(tmp_path / "b.txt")


@pytest.mark.slow
def test_exporting_imports_no_optional_package(tmp_path):
    program = textwrap.dedent("""
        import sys
        for name in ("onnx", "tf2onnx", "onnxruntime", "ai_edge_litert",
                     "tensorflow_serving"):
            sys.modules[name] = None  # Any import of it fails.
        import keras_rsft
        import keras_rsft.export._export_run, keras_rsft.export._verify
        print(keras_rsft.export_run.__name__)
    """)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "export_run", result.stderr
