"""The licence of a base's weights is what is stated somewhere, and never a guess."""

from __future__ import annotations

import importlib.metadata
from email.message import Message

import pytest

from keras_rsft.backbones import _load as weights_licence
from keras_rsft.backbones._load import licence_of_weights, stated_licence


@pytest.mark.parametrize(
    "backbone, named",
    [
        ("resnet50", "MIT licence (Kaiming He"),
        ("ResNet50", "MIT licence (Kaiming He"),
        ("ResNet50V2", "BSD licence (Facebook"),
        ("vgg16", "CC BY 4.0"),
        ("mobilenet_v2", "Apache License 2.0"),
        ("DenseNet121", "BSD 3-clause"),
    ],
)
def test_what_keras_documents(backbone, named):
    assert named in licence_of_weights(backbone, "imagenet")


@pytest.mark.parametrize(
    "backbone, weights",
    [
        ("efficientnetb0", "imagenet"),  # Keras names no licence.
        ("mobilenetv3small", "imagenet"),
        ("resnet50", "/home/me/own.weights.h5"),
        ("onnx:resnet50.onnx@imagenet", "imagenet"),
        ("unknown", "unknown"),
    ],
)
def test_the_others_are_not_guessed(backbone, weights):
    assert "not recorded" in licence_of_weights(backbone, weights)


def test_random_weights_have_none():
    assert "random weights" in licence_of_weights("resnet50", "none")


def made_metadata(*fields: tuple[str, str]) -> Message:
    metadata = Message()
    for name, value in (("Version", "1.0"), *fields):
        metadata[name] = value
    return metadata


@pytest.mark.parametrize(
    "fields, stated",
    [
        ([("License-Expression", "Apache-2.0")], "Apache-2.0"),
        ([("License", "MIT")], "MIT"),
        ([("License", "UNKNOWN")], None),
        ([("License", "UNKNOWN"), ("Classifier", "License :: OSI :: BSD")], "BSD"),
        ([], None),
    ],
)
def test_what_a_package_states(fields, stated):
    assert stated_licence(made_metadata(*fields)) == stated


def test_weights_of_a_package(monkeypatch):
    fields = [("License", "UNKNOWN")]
    monkeypatch.setattr(
        importlib.metadata, "metadata", lambda name: made_metadata(*fields)
    )
    text = licence_of_weights("efficientnet_lite0", "imagenet")
    assert f"{weights_licence.LITE0_DISTRIBUTION} 1.0" in text
    assert "states no licence" in text
    fields[:] = [("License-Expression", "Apache-2.0")]
    text = licence_of_weights("EfficientNet-Lite0", "imagenet")
    assert "Apache-2.0" in text


def test_weights_of_a_package_that_is_gone(monkeypatch):
    def gone(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", gone)
    assert "not installed" in licence_of_weights("efficientnet_lite0", "imagenet")
