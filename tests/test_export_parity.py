"""A served model answers as the trained one does, and weighs what its weights weigh."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_bases import spread_head
from PIL import Image

from keras_rsft.backbones._build import build_classifier
from keras_rsft.backbones._load import load_backbone
from keras_rsft.data._sources import load_images
from keras_rsft.export._export_run import size_on_disk
from keras_rsft.export._saved_model import export_saved_model
from keras_rsft.features._extract import extract_features

CLASSES = 10
NAMES = tuple(f"class {number}" for number in range(CLASSES))
KINDS = {
    "rgb.jpg": ("RGB", {"quality": 90}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "rgb.png": ("RGB", {}),
    "palette.png": ("P", {}),
    "transparent.png": ("RGBA", {}),
    "one.gif": ("P", {}),
    "plain.bmp": ("RGB", {}),
    "lossy.webp": ("RGB", {"quality": 80}),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A hundred images in ten kinds of file, 1 to 700 pixels wide, some very long."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("mixed")
    for number in range(100):
        name, (mode, options) = list(KINDS.items())[number % len(KINDS)]
        height, width = (int(side) for side in np.exp(rng.uniform(0, 6.5, 2)))
        small = rng.integers(0, 256, (4, 5, 3)).astype("uint8")
        image = Image.fromarray(small).resize((width, height)).convert(mode)
        folder = root / NAMES[number // CLASSES]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03}-{name}", **options)
    return load_images(str(root), validation_fraction=0, test_fraction=0)


@pytest.fixture(scope="module")
def base():
    return load_backbone("efficientnet_lite0", image_size=96)


@pytest.fixture(scope="module")
def classifier(base):
    """A real base under a head with spread-out answers: an even one hides skew."""
    head = spread_head(base.output_shape[-1], CLASSES)
    head.set_weights([3 * weight for weight in head.get_weights()])
    return build_classifier(base, CLASSES, head=head)


@pytest.fixture(scope="module")
def encoded(photos):
    return [photos.train.encoded(at) for at in range(len(photos.train))]


@pytest.fixture(scope="module")
def expected(photos, classifier):
    """What the model in this process says of the images that training would see."""
    images = [image for _, image in photos.train.images((96, 96))]
    assert len(images) == 100
    return np.concatenate(
        [classifier.predict_on_batch(np.stack(images[at : at + 25]))
         for at in range(0, len(images), 25)]
    )  # fmt: skip


def served(version, encoded):
    serve = tf.saved_model.load(str(version)).signatures["serving_default"]
    batches = [encoded[at : at + 17] for at in range(0, len(encoded), 17)]
    outputs = [serve(image_bytes=tf.constant(batch)) for batch in batches]
    assert all(output["valid"].numpy().all() for output in outputs)
    return np.concatenate([output["probabilities"] for output in outputs])


@pytest.mark.slow
def test_bytes_give_the_trained_models_probabilities(
    photos, base, classifier, encoded, expected, tmp_path
):
    version = export_saved_model(classifier, tmp_path / "mixed", class_names=NAMES)
    probabilities = served(version, encoded)
    assert len(set(expected.argmax(axis=-1))) > 3  # They do tell apart.
    np.testing.assert_allclose(probabilities, expected, atol=1e-5, rtol=0)
    kept = extract_features(
        base, photos.train, cache_dir=tmp_path / "cache", progress=False
    )
    by_features = classifier.layers[-1].predict(np.array(kept.features), verbose=0)
    np.testing.assert_allclose(probabilities, by_features, atol=1e-3, rtol=0)
    weights = sum(np.asarray(weight).nbytes for weight in classifier.weights)
    assert size_on_disk(version) < 1.05 * weights


@pytest.mark.slow
def test_float16_halves_the_artifact(classifier, encoded, expected, tmp_path):
    version = export_saved_model(
        classifier, tmp_path / "mixed", class_names=NAMES, weight_dtype="float16"
    )
    weights = sum(np.asarray(weight).nbytes for weight in classifier.weights)
    assert size_on_disk(version) < 0.65 * weights
    probabilities = served(version, encoded)
    assert np.abs(probabilities - expected).max() < 0.02
    assert not np.array_equal(probabilities, expected)


def test_float16_leaves_what_it_cannot_hold(tmp_path):
    images = keras.Input((4, 4, 3))
    scaled = keras.layers.Conv2D(2, 1, kernel_initializer="ones")(images)
    pooled = keras.layers.GlobalAveragePooling2D()(scaled)
    scores = keras.layers.Dense(2, activation="softmax")(pooled)
    model = keras.Model(images, scores)
    model.layers[1].set_weights([np.full((1, 1, 3, 2), 1e-3), np.full(2, 1e-12)])
    model.layers[-1].set_weights([np.array([[1e5, 0.0], [0.0, 1.0]]), np.zeros(2)])
    version = export_saved_model(
        model, tmp_path / "x", class_names=["a", "b"], weight_dtype="float16"
    )
    stored = tf.train.load_checkpoint(str(version / "variables" / "variables"))
    types = sorted(
        dtype.name
        for name, dtype in stored.get_variable_to_dtype_map().items()
        if "OBJECT_GRAPH" not in name
    )
    # The kernel of the convolution; a kernel over 65,504 and the two biases stay, end
    # to end in one variable.
    assert types == ["float16", "float32"]
    loaded = tf.saved_model.load(str(version)).signatures["serving_images"]
    dark = tf.fill((1, 4, 4, 3), 1e-3)
    np.testing.assert_allclose(
        loaded(images=dark)["probabilities"], model(dark), atol=1e-3
    )
