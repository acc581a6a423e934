"""Bases by name: preprocessing, freezing, precision, wrong options."""

from __future__ import annotations

import inspect
import json
import zipfile

import keras
import numpy as np
import pytest

from keras_rsft.backbones._build import (
    _declared_image_size,
    applications,
    default_image_size,
    preprocessing_of,
)
from keras_rsft.backbones._load import available_backbones, load_backbone
from keras_rsft.errors import InvalidArgument

SLOW = pytest.mark.slow
IMAGES = (
    np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3)).astype("float32")
)


def random_base(name="mobilenetv2", *, image_size=32, seed=0, **options):
    keras.utils.set_random_seed(seed)
    return load_backbone(name, weights="none", image_size=image_size, **options)


def body_of(backbone):
    return next(part for part in backbone.layers if isinstance(part, keras.Model))


def assert_close(actual, expected):
    """Equal within 0.1 % of the spread: random weights make tiny features."""
    expected = np.asarray(expected)
    assert expected.std() > 0
    tolerance = 1e-3 * expected.std()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def mobilenet():
    """MobileNetV2 with random weights, for tests that do not change it."""
    return random_base()


@pytest.fixture(scope="module")
def efficientnet():
    """EfficientNetB0 in bfloat16 with random weights, likewise."""
    return random_base("efficientnetb0", dtype="bfloat16")


# Names


def test_names_are_those_of_keras_applications():
    names = available_backbones()
    functions = [
        name.lower()
        for name, member in vars(keras.applications).items()
        if inspect.isfunction(member)
    ]
    assert names == tuple(sorted([*functions, "efficientnet_lite0"]))
    assert {"resnet50", "mobilenetv2", "efficientnetb0", "convnexttiny"} < set(names)


def test_each_name_has_the_preprocessing_of_its_own_module():
    pixel = np.array([[[[10.0, 20.0, 30.0]]]], "float32")
    for name, application in applications().items():
        assert application.__name__.lower() == name
        home = application.__module__.rpartition(".")[2]
        module = getattr(keras.applications, home)
        preprocess = preprocessing_of(application)
        assert preprocess is module.preprocess_input
        images = keras.Input((1, 1, 3))
        # Through one more layer: an identity alone is no model.
        outputs = keras.layers.Identity()(preprocess(images))
        symbolic = keras.Model(images, outputs)
        expected = module.preprocess_input(pixel.copy())
        np.testing.assert_allclose(symbolic(pixel), expected, atol=1e-5)


def test_any_spelling_of_a_name(mobilenet):
    other = random_base("Mobile-Net_V2")
    assert body_of(other).name == body_of(mobilenet).name == "mobilenetv2_1.00_32"


@pytest.mark.parametrize(
    "name, nearest",
    [("resnet5", "resnet50"), ("EfficientNet-Lite", "efficientnet_lite0")],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(InvalidArgument, match=f"Did you mean '{nearest}") as caught:
        load_backbone(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", "nosuch"])
def test_an_unknown_name_that_is_like_none_suggests_none(name):
    with pytest.raises(InvalidArgument, match=f"Received: '{name}'.$"):
        load_backbone(name)


@pytest.mark.parametrize(
    "name, side",
    [
        ("resnet50", 224),
        ("xception", 299),
        ("nasnetlarge", 331),
        ("efficientnetb7", 600),
        ("convnexttiny", 224),
        ("mobilenetv3small", 224),
    ],
)
def test_default_image_size(name, side):
    assert default_image_size(applications()[name]) == (side, side)


def test_default_image_size_does_not_hang_on_the_words_of_an_error():
    application = applications()["mobilenetv2"]
    assert _declared_image_size(application) == default_image_size(application)


# The model


@pytest.mark.parametrize(
    "name, expected",
    [
        pytest.param("resnet50", [30 - 103.939, 20 - 116.779, 10 - 123.68], marks=SLOW),
        ("mobilenetv2", [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]),
        pytest.param(
            "densenet121",
            [
                (10 / 255 - 0.485) / 0.229,
                (20 / 255 - 0.456) / 0.224,
                (30 / 255 - 0.406) / 0.225,
            ],
            marks=SLOW,
        ),
        ("mobilenetv3small", [10.0, 20.0, 30.0]),
    ],
    ids=["caffe", "tf", "torch", "identity"],
)
def test_preprocessing_is_inside(name, expected):
    backbone = random_base(name)
    body = body_of(backbone)
    pixels = np.full((1, 32, 32, 3), [10.0, 20.0, 30.0], "float32")
    preprocessed = np.broadcast_to(np.float32(expected), pixels.shape)
    features = np.asarray(backbone(pixels))
    assert_close(features, body(preprocessed))
    module_says = preprocessing_of(applications()[name])(IMAGES.copy())
    assert_close(backbone(IMAGES), body(module_says))


def test_input_and_output(mobilenet):
    assert mobilenet.input_shape == (None, 32, 32, 3)
    assert mobilenet.output_shape == (None, 1280)
    assert mobilenet.inputs[0].dtype == mobilenet.outputs[0].dtype == "float32"


@pytest.mark.parametrize(
    "base", ["mobilenet", pytest.param("efficientnet", marks=SLOW)]
)
def test_frozen_even_when_called_for_training(base, request):
    # BatchNorm in the one, random depth by Dropout too in the other.
    backbone = request.getfixturevalue(base)
    before = backbone.get_weights()
    assert backbone.trainable_weights == []
    trained = backbone(IMAGES, training=True)
    assert np.array_equal(trained, backbone(IMAGES, training=False))
    after = backbone.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_frozen_inside_a_model_that_trains(mobilenet):
    before = mobilenet.get_weights()
    outer = keras.Sequential([mobilenet, keras.layers.Dense(2)])
    outer.compile("sgd", "mse")
    outer.fit(IMAGES, np.ones((2, 2)), verbose=0)
    after = mobilenet.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(outer.trainable_weights) == 2


@pytest.mark.parametrize(
    "base", ["mobilenet", pytest.param("efficientnet", marks=SLOW)]
)
def test_saved_file_is_stock_keras_and_equal_to_the_bit(base, request, tmp_path):
    backbone = request.getfixturevalue(base)
    path = tmp_path / "backbone.keras"
    backbone.save(path)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    assert {module.partition(".")[0] for module in modules_in(config)} == {"keras"}
    loaded = keras.saving.load_model(path, safe_mode=True)
    assert np.array_equal(loaded(IMAGES), backbone(IMAGES))
    assert np.array_equal(loaded(IMAGES, training=True), backbone(IMAGES))
    assert loaded.trainable_weights == []


def modules_in(config):
    if isinstance(config, dict):
        if isinstance(config.get("module"), str):
            yield config["module"]
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from modules_in(part)


@pytest.mark.slow
def test_exports_as_a_saved_model(mobilenet, tmp_path):
    import tensorflow as tf

    mobilenet.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    assert_close(loaded.serve(IMAGES), mobilenet(IMAGES))


def test_random_weights_are_random(mobilenet):
    other = random_base(seed=1)
    assert not np.array_equal(other(IMAGES), mobilenet(IMAGES))


# Precision


def test_bfloat16_is_inside_only(efficientnet):
    policies = {part.name: part.dtype_policy for part in body_of(efficientnet).layers}
    assert policies["stem_conv"].compute_dtype == "bfloat16"
    assert policies["stem_conv"].variable_dtype == "float32"
    kinds = (keras.layers.Normalization, keras.layers.Rescaling)
    for part in body_of(efficientnet).layers:
        assert not isinstance(part, kinds) or part.compute_dtype == "float32"
    assert efficientnet(IMAGES).dtype == "float32"


def test_bfloat16_features_point_the_same_way(mobilenet):
    low = np.asarray(random_base(dtype="bfloat16")(IMAGES))
    high = np.asarray(mobilenet(IMAGES))
    norms = np.linalg.norm(low, axis=1) * np.linalg.norm(high, axis=1)
    assert ((low * high).sum(axis=1) / norms > 0.99).all()
    assert not np.array_equal(low, high)


def test_float32_whatever_the_global_policy(dtype_policy):
    dtype_policy("mixed_float16")
    backbone = random_base("efficientnet_lite0")
    assert {part.compute_dtype for part in body_of(backbone).layers} == {"float32"}
    assert keras.config.dtype_policy().name == "mixed_float16"


def test_global_policy_survives_an_error(dtype_policy):
    dtype_policy("mixed_float16")
    with pytest.raises(InvalidArgument, match="does not suit mobilenetv2"):
        load_backbone("mobilenetv2", weights="none", image_size=16)
    assert keras.config.dtype_policy().name == "mixed_float16"


# Options


@pytest.mark.parametrize("image_size", [0, -1, 2.5, "96", True, (32,), (1, 2, 3)])
def test_wrong_image_size(image_size):
    with pytest.raises(InvalidArgument, match="must be a positive integer"):
        load_backbone("mobilenetv2", weights="none", image_size=image_size)


def test_wrong_precision():
    with pytest.raises(InvalidArgument, match=r"`dtype` must be.*'float16'"):
        load_backbone("mobilenetv2", weights="none", dtype="float16")


@pytest.mark.parametrize("weights", [None, "imagnet", "absent.weights.h5"])
def test_weights_that_are_no_file(weights):
    with pytest.raises(InvalidArgument, match=r"`weights` must be.*is not a file"):
        load_backbone("mobilenetv2", weights=weights)


def test_channels_first_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(InvalidArgument, match="channels_last"):
        load_backbone("mobilenetv2", weights="none")
