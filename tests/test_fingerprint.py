"""A backbone's fingerprint, whatever its layers are called, and the cache folder."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_rsft.data._sources import load_images
from keras_rsft.features._extract import (
    FrozenBackbone,
    default_cache_dir,
    extract_features,
)


def fingerprint(base):
    return FrozenBackbone(base).fingerprint


def dense(units, **options):
    """A layer whose weights are equal whenever it is made."""
    values = keras.initializers.Constant(0.1)
    return keras.layers.Dense(units, kernel_initializer=values, **options)


def activated(kind, name):
    """A base whose last layer, perhaps called like its function, has no weights."""
    inputs = keras.Input((8, 8, 3), name="images")
    features = keras.layers.Flatten(name="flat")(inputs)
    features = dense(4, name="dense")(features)
    outputs = keras.layers.Activation(kind, name=name)(features - 1.0)
    return keras.Model(inputs, outputs, name="base")


def padded(padding, name):
    inputs = keras.Input((4, 4, 3), name="images")
    pool = keras.layers.MaxPooling2D(3, 1, padding=padding, name=name)
    whole = keras.layers.GlobalAveragePooling2D(name="mean")
    return keras.Model(inputs, whole(pool(inputs)), name="base")


def in_precision(dtype, name):
    layers = [keras.layers.Flatten(name=name, dtype=dtype)]
    return keras.Sequential([keras.Input((4, 4, 3), dtype="float16"), *layers])


def in_a_sequential(kind, name):
    layers = [keras.layers.Flatten(), keras.layers.Activation(kind, name=name)]
    return keras.Sequential([keras.Input((4, 4, 3)), *layers])


@pytest.mark.parametrize(
    "base, one, other",
    [
        (activated, "relu", "tanh"),
        (in_a_sequential, "relu", "tanh"),
        (padded, "same", "valid"),
        (in_precision, "float32", "float16"),
    ],
)
def test_a_layer_called_like_a_setting_leaves_the_setting(base, one, other):
    assert fingerprint(base(one, one)) != fingerprint(base(other, other))
    assert fingerprint(base(one, one)) == fingerprint(base(one, "other"))


@pytest.mark.parametrize("which", range(4))
def test_each_weight_counts(which):
    base = keras.Sequential([keras.Input((8,)), dense(4), dense(2)])
    before = fingerprint(base)
    base.weights[which].assign(base.weights[which] + 0.001)
    assert fingerprint(base) != before


def test_the_features_of_another_base_are_not_served(tmp_path):
    split = load_images("digits").test.take(range(10))
    for kind in ("relu", "tanh"):
        base = activated(kind, kind)
        cached = extract_features(base, split, cache_dir=tmp_path, progress=False)
        images = np.stack([image for _, image in split.images((8, 8))])
        wanted = base.predict(images, verbose=0)
        np.testing.assert_allclose(cached.features, wanted, atol=1e-5)


def sequential():
    return keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            dense(3),
        ]
    )


def functional():
    inputs = keras.Input((4, 4, 3))
    flat = keras.layers.Flatten()(inputs / 255.0)
    one = dense(3)(flat)
    other = dense(3)(flat)
    return keras.Model(inputs, keras.layers.Subtract()([one, 2 * other]))


def nested():
    """Models within a model, one twice, and a layer within a layer."""
    inputs = keras.Input((4, 4, 3), name="images")
    part = functional()
    features = part(inputs) + part(2 * inputs) + sequential()(inputs)
    rows = keras.layers.Reshape((1, 3))(features)
    rows = keras.layers.TimeDistributed(dense(2))(rows)
    return keras.Model({"images": inputs}, keras.layers.Flatten()(rows))


@pytest.mark.parametrize("base", [sequential, functional, nested])
def test_the_same_base_made_again_has_the_same_fingerprint(base):
    one, again = base(), base()
    assert [layer.name for layer in one.layers] != [
        layer.name for layer in again.layers
    ]
    assert fingerprint(one) == fingerprint(again)


def test_a_name_within_and_one_outside_are_two_names():
    """An inner model's layer may be called as one outside, or may not."""

    def base(inner, outer):
        part = [keras.Input((4, 4, 3)), keras.layers.Flatten(name=inner)]
        layers = [keras.Sequential(part), keras.layers.ReLU(name=outer)]
        return keras.Sequential([keras.Input((4, 4, 3)), *layers])

    assert fingerprint(base("same", "same")) == fingerprint(base("one", "other"))


def test_which_layers_are_taken_is_told():
    def base(*taken):
        inputs = keras.Input((4, 4, 3))
        flat = keras.layers.Flatten()(inputs)
        made = keras.layers.ReLU()(flat), keras.layers.Softmax()(flat)
        joined = keras.layers.Subtract()(made)
        ends = [*made, joined]
        return keras.Model(inputs, keras.layers.Subtract()([ends[at] for at in taken]))

    bases = [base(0, 1), base(1, 0), base(2, 0), base(0, 2)]
    assert len({fingerprint(base) for base in bases}) == len(bases)


@pytest.mark.parametrize(
    "value, folder", [("/x", "/x"), ("", "~/.cache"), (None, "~/.cache")]
)
def test_features_are_cached_in_the_users_cache_folder(monkeypatch, value, folder):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    wanted = Path(folder).expanduser() / "keras_rsft" / "features"
    assert default_cache_dir() == wanted
