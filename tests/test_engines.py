"""Engines: the same features, at another speed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from keras_rsft import config
from keras_rsft.config import FeatureConfig
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.features import _engines
from keras_rsft.features._extract import FrozenBackbone, extract_features
from keras_rsft.training._features import open_features

pytest.importorskip("tf2onnx")

ENGINES = [
    pytest.param(one, marks=pytest.mark.skipif(bool(config.missing_packages(one)),
                                               reason=f"needs {one}"))
    for one in ("onnxruntime", "openvino")
]  # fmt: skip


@pytest.fixture(scope="module")
def data(photo_folder):
    return load_images(str(photo_folder))


@pytest.fixture
def extract(data, tiny_base, tmp_path):
    """Returns the features by an engine, the notes, and the folder of its file."""

    def extract(engine, cache="cache", **options):
        notes = []
        frozen = FrozenBackbone(
            tiny_base, num_images=len(data.train), engine=engine, on_note=notes.append
        )
        found = extract_features(
            frozen, data.train, cache_dir=tmp_path / cache, progress=False
        )
        return found, notes, frozen.engine

    return extract


@pytest.mark.parametrize("engine", ENGINES)
def test_the_features_are_those_of_tensorflow(extract, engine, tmp_path):
    expected, _, _ = extract("tensorflow", "other")
    found, notes, used = extract(engine)
    assert (used, notes) == (engine, [])
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)
    # They have one identity: neither engine computes what the other has cached.
    assert found.path.parent.name == expected.path.parent.name
    meta = json.loads((found.path.parent / "meta.json").read_text())
    assert meta["engine"] == engine


def test_a_run_says_which_engine_it_was(data, tiny_base_file, tmp_path):
    settings = FeatureConfig(
        str(tiny_base_file), cache_dir=tmp_path, engine="onnxruntime"
    )
    assert open_features(data, settings, progress=False).origin["engine"] == (
        "onnxruntime"
    )


class TestFallBack:
    def test_where_features_differ(self, extract, monkeypatch):
        load = _engines._LOADERS["onnxruntime"]

        def wrong(content):
            run = load(content)
            return lambda images: run(images) * 1.001

        monkeypatch.setitem(_engines._LOADERS, "onnxruntime", wrong)
        expected, _, _ = extract("tensorflow", "other")
        found, notes, used = extract("onnxruntime")
        assert used == "tensorflow"
        assert "differ from TensorFlow's by" in notes[0]
        np.testing.assert_array_equal(found.features, expected.features)

    def test_where_a_feature_is_no_number(self):
        with pytest.raises(_engines.EngineError):
            _engines._require_equal(np.array([1.0, np.nan]), np.ones(2))

    def test_where_an_operation_is_not_known(self, extract, monkeypatch):
        def unknown(*_):
            raise ValueError("Tensorflow op [x: Odd] is not supported\nmore")

        monkeypatch.setattr(_engines, "to_onnx", unknown)
        _, notes, used = extract("onnxruntime")
        assert used == "tensorflow"
        assert notes == [
            "onnxruntime is not used for this backbone: it cannot be converted to ONNX "
            "(Tensorflow op [x: Odd] is not supported)."
        ]

    def test_where_the_disk_is_full(self, extract, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(_engines, "replaced", full)
        _, notes, used = extract("onnxruntime")
        assert used == "tensorflow"
        assert "No space left on device" in notes[0]

    def test_texts_stay_with_tensorflow(self, text_encoder, tmp_path):
        notes = []
        frozen = FrozenBackbone(
            text_encoder, engine="onnxruntime", on_note=notes.append
        )
        texts = np.array(["one cat", "two dogs", "no bird"])
        options = {"cache_dir": tmp_path, "progress": False}
        found = extract_features(frozen, (texts, [0, 1, 0]), **options)
        assert frozen.engine == "tensorflow"
        assert "cannot be converted" in notes[0]
        assert found.features.shape == (3, 384)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "record", "link"])
def test_a_damaged_file_is_made_anew(extract, tmp_path, damage):
    found, _, _ = extract("onnxruntime", "one")
    (path,) = (tmp_path / "one" / "engines").glob("*.onnx")
    content = bytearray(path.read_bytes())
    if damage == "record":
        path.with_suffix(".json").write_text("[1")
    elif damage == "gone":
        path.unlink()
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    for folder in (tmp_path / "one").glob("*/features.bin"):
        folder.unlink()
    again, notes, used = extract("onnxruntime", "one")
    assert (used, notes) == ("onnxruntime", [])
    np.testing.assert_array_equal(again.features, found.features)
    assert not path.is_symlink()


class TestAuto:
    @pytest.fixture
    def seconds(self, monkeypatch):
        """Replaces the measurement: TensorFlow first, then the engines in order."""
        measured = []
        monkeypatch.setattr(_engines, "_seconds", lambda run: measured.pop(0))
        monkeypatch.setattr(_engines, "_installed", lambda: ["onnxruntime"])
        return measured

    def test_a_short_pass_converts_nothing(self, extract, seconds, tmp_path):
        seconds[:] = [0.1]
        assert extract("auto")[1:] == ([], "tensorflow")
        assert not list((tmp_path / "cache" / "engines").glob("*.onnx"))

    def test_a_long_pass_takes_the_fastest_and_remembers_it(self, extract, seconds):
        seconds[:] = [1000.0, 500.0]
        _, notes, used = extract("auto")
        assert used == "onnxruntime"
        assert notes == ["onnxruntime runs the backbone: 2.0 times as fast here."]

    @pytest.mark.parametrize(
        "other, used",
        [(900.0, "onnxruntime"), (2e3, "tensorflow"), (990, "tensorflow")],
    )
    def test_what_was_measured_is_not_measured_again(
        self, extract, seconds, tmp_path, other, used
    ):
        seconds[:] = [1000.0, other]
        assert extract("auto")[2] == used
        for path in (tmp_path / "cache").glob("*/features.bin"):
            path.unlink()
        assert seconds == []  # Another measurement would find nothing to take.
        assert extract("auto")[1:] == ([], used)


class TestChoice:
    def test_one_that_is_not_installed(self, monkeypatch):
        find = config.importlib.util.find_spec
        monkeypatch.setattr(
            config.importlib.util,
            "find_spec",
            lambda name: None if name == "openvino" else find(name),
        )
        with pytest.raises(InvalidArgument, match=r"keras_rsft\[openvino\]"):
            FeatureConfig(engine="openvino")

    def test_one_that_is_not_known(self):
        with pytest.raises(InvalidArgument, match="Did you mean 'onnxruntime'"):
            FeatureConfig(engine="onnxruntim")

    def test_one_that_computes_in_float32(self):
        with pytest.raises(InvalidArgument, match="computes in float32"):
            FeatureConfig(engine="onnxruntime", dtype="bfloat16")
