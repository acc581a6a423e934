"""Pretrained bases by name, each with its preprocessing inside.

Owns turning a name and some weights into a frozen model from images in [0, 255] to
features, and joining it to a new head. Running it over a data set is left to
`features/`.
"""

from keras_rsft.backbones.classifier import build_classifier, build_head
from keras_rsft.backbones.load import available_backbones, load_backbone

__all__ = [
    "available_backbones",
    "build_classifier",
    "build_head",
    "load_backbone",
]
