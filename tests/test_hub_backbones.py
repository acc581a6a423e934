"""Presets of KerasHub as bases; the tests write the preset's folder themselves."""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import pytest

from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

SIDE = 32
IMAGES = (
    np.random.default_rng(0).integers(0, 256, size=(3, SIDE, SIDE, 3)).astype("float32")
)
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.5])


@pytest.fixture(scope="module")
def network():
    """The smallest residual network that KerasHub builds."""
    models = pytest.importorskip("keras_hub").models
    keras.utils.set_random_seed(0)
    return models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(None, None, 3),
    )


@pytest.fixture(scope="module")
def preset(network, tmp_path_factory):
    """Its preset with an image converter that standardises."""
    import keras_hub

    folder = tmp_path_factory.mktemp("preset")
    network.save_to_preset(folder)
    keras_hub.layers.ResNetImageConverter(
        image_size=(SIDE, SIDE),
        scale=(1 / 255 / STD).tolist(),
        offset=(-MEAN / STD).tolist(),
    ).save_to_preset(folder)
    return folder


def test_a_preset_scales_pixels_as_its_converter_says(preset, network):
    base = load_backbone(f"hub:{preset}")
    assert base.input_shape == (None, SIDE, SIDE, 3)
    assert base.output_shape == (None, 64)
    assert not base.trainable_variables
    maps = np.asarray(network((IMAGES / 255 - MEAN) / STD, training=False))
    np.testing.assert_allclose(base(IMAGES), maps.mean(axis=(1, 2)), rtol=0, atol=1e-4)
    other = load_backbone(f"hub:{preset}@0:1", image_size=48)
    assert other.input_shape == (None, 48, 48, 3)
    maps = np.asarray(network(IMAGES / 255, training=False))
    other = load_backbone(f"hub:{preset}@0:1")
    np.testing.assert_allclose(other(IMAGES), maps.mean(axis=(1, 2)), rtol=0, atol=1e-4)


def test_bfloat16_is_near_float32(preset):
    exact = np.asarray(load_backbone(f"hub:{preset}")(IMAGES))
    base = load_backbone(f"hub:{preset}", dtype="bfloat16")
    features = np.asarray(base(IMAGES))
    assert features.dtype == np.float32
    assert 0 < np.abs(features - exact).max() < 0.05 * np.abs(exact).max()


def test_it_saves_to_a_keras_file(preset, tmp_path):
    base = load_backbone(f"hub:{preset}")
    base.save(tmp_path / "base.keras")
    loaded = keras.saving.load_model(tmp_path / "base.keras")
    np.testing.assert_allclose(loaded(IMAGES), base(IMAGES), rtol=0, atol=1e-6)


def test_random_weights(preset):
    base = load_backbone(f"hub:{preset}", weights="none")
    assert not np.allclose(base(IMAGES), load_backbone(f"hub:{preset}")(IMAGES))
    with pytest.raises(InvalidArgument, match="weights"):
        load_backbone(f"hub:{preset}", weights="mine.weights.h5")


def test_a_preset_without_a_converter_must_be_told_the_scale(network, tmp_path):
    network.save_to_preset(tmp_path / "bare")
    with pytest.raises(InvalidArgument, match="no image converter"):
        load_backbone(f"hub:{tmp_path / 'bare'}")
    base = load_backbone(f"hub:{tmp_path / 'bare'}@0:255", image_size=SIDE)
    assert base.output_shape == (None, 64)


def test_a_preset_that_is_none(preset, tmp_path):
    pytest.importorskip("keras_hub")
    for name in ("resnet_5000", str(tmp_path / "missing")):
        with pytest.raises(InvalidArgument, match="no KerasHub preset"):
            load_backbone(f"hub:{name}")
    (tmp_path / "config.json").write_text(json.dumps({"class_name": "None"}))
    with pytest.raises(WeightsUnavailable, match="is damaged"):
        load_backbone(f"hub:{tmp_path}")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"keras_rsft\[hub\]"):
        load_backbone("hub:resnet_50_imagenet")
