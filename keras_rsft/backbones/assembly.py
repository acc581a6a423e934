"""Turns a pretrained network into a backbone: images in, frozen features out.

Owns what all backbones have in common: preprocessing inside the model, pooling,
freezing, and the precision of the arithmetic. Where the network and its weights
come from is left to the other modules of this room.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import keras
from keras import layers

from keras_rsft.backbones.base_name import PixelScale

PRECISIONS = ("float32", "bfloat16")

_IMAGE_CHANNELS = 3
_POOLING = {3: layers.GlobalAveragePooling1D, 4: layers.GlobalAveragePooling2D}
_PREPROCESSING = (layers.Rescaling, layers.Normalization)
_DROPOUT = (layers.Dropout, layers.AlphaDropout, layers.GaussianDropout)


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained network and what it needs to become a backbone."""

    body: keras.Model
    preprocess: Callable[[keras.KerasTensor], keras.KerasTensor]
    image_size: tuple[int, int]


def scaled(images: keras.KerasTensor, scale: PixelScale) -> keras.KerasTensor:
    """Returns images in [0, 255] as a network wants them, by one stock layer."""
    if scale.changes_nothing:
        return images
    rescale = layers.Rescaling(
        list(scale.factor), list(scale.offset), dtype="float32", name="scale"
    )
    return rescale(images)


@contextlib.contextmanager
def built_in_float32() -> Iterator[None]:
    """Builds layers in float32, whatever the user's global dtype policy is."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def assemble(base: Base, *, name: str, precision: str) -> keras.Model:
    """Puts preprocessing before a network, pooling behind it, and freezes it."""
    # The `training=False` that a call bakes into a functional model gives way when the
    # model around it is called with `training=True`, so the layers themselves have to
    # hold still. BatchNorm does so where it is not trainable.
    for layer in _leaves(base.body):
        if isinstance(layer, _DROPOUT):
            layer.rate = 0.0
    if precision == "bfloat16":
        compute_in_bfloat16(base.body)
    shape = (*base.image_size, _IMAGE_CHANNELS)
    images = keras.Input(shape, dtype="float32", name="images")
    x = base.body(base.preprocess(images), training=False)
    if len(x.shape) in _POOLING:
        x = _POOLING[len(x.shape)](dtype="float32", name="pooling")(x)
    features = layers.Activation("linear", dtype="float32", name="features")(x)
    backbone = keras.Model(images, features, name=name)
    backbone.trainable = False
    return backbone


def compute_in_bfloat16(body: keras.Model) -> None:
    """Sets each layer's policy; a preprocessing layer inside `body` keeps float32."""
    # bfloat16 has 8 significant bits: enough for activations, but normalising a pixel
    # in it would lose a step of the 256.
    for layer in _leaves(body):
        if not isinstance(layer, (layers.InputLayer, *_PREPROCESSING)):
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")


def _leaves(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer
