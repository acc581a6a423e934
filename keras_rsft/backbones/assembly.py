"""Turns a pretrained network into a backbone: images in, frozen features out."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from keras import layers

from keras_rsft.config import PixelScale
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

# What HDF5 and zip raise on a file that is cut short or overwritten.
DAMAGED = (OSError, RuntimeError, zipfile.BadZipFile, zlib.error)

_SUFFIXES = (".h5", ".keras")


def load_weights_file(model: keras.Model, path: str | Path) -> None:
    """Loads `.weights.h5`, `.h5` (legacy) or `.keras` weights into `model`."""
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InvalidArgument(
            "`weights` must be a `.weights.h5`, `.h5` or `.keras` file, or `.pth` for "
            f"efficientnet_lite0. Received: {path} for {model.name}"
        )
    if not path.is_file():
        raise InvalidArgument(
            '`weights` must be "imagenet", "none" or the path of a weights file. '
            f"There is no file {path}."
        )
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            model.load_weights(str(path))
    except DAMAGED as error:
        raise WeightsUnavailable(
            f"The weights file {path} is damaged or not a weights file: "
            f"{first_line(error)}. Fetch it again."
        ) from error
    except (ValueError, KeyError) as error:
        raise InvalidArgument(
            f"The weights in {path} do not fit {model.name} without its classes "
            f"(include_top=False): {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the texts of Keras can fill a screen."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


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


def build_head(
    dim: int,
    num_classes: int,
    *,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> keras.Model:
    """Builds a Dense head with softmax.

    Args:
        dim: Number of features, at least 1.
        num_classes: Number of classes, at least 2.
        moments: Mean and variance of the features, `(dim,)` each, by which they
            are standardised first; None leaves them as they are.
        seed: Seed of the initial weights. Default 0.

    Returns:
        Model from features `(batch, dim)` to probabilities
        `(batch, num_classes)`, float32, with a trainable kernel and bias.

    Raises:
        InvalidArgument: If there are fewer than 2 classes.

    Example:
        >>> import keras_rsft as rsft
        >>> rsft.build_head(1280, 10).output_shape
        (None, 10)
    """
    if num_classes < 2:
        raise InvalidArgument(
            f"`num_classes` must be at least 2. Received: num_classes={num_classes}."
        )
    features = keras.Input((dim,), name="features")
    values = features
    if moments is not None:
        mean, variance = (np.asarray(moment, np.float32) for moment in moments)
        standardise = keras.layers.Normalization(
            mean=mean.tolist(), variance=variance.tolist(), name="standardise"
        )
        values = standardise(values)
    scores = keras.layers.Dense(
        num_classes,
        activation="softmax",
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        dtype="float32",
        name="scores",
    )(values)
    return keras.Model(features, scores, name="head")


def build_classifier(
    backbone: keras.Model, num_classes: int, *, head: keras.Model | None = None
) -> keras.Model:
    """Joins a frozen base and a head into one model.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], or from texts, to features `(batch, dim)`, as `load_backbone`
            gives it.
        num_classes: Number of classes, at least 2.
        head: A trained head. Default: a new one, without standardisation.

    Returns:
        Model from images or texts to probabilities `(batch, num_classes)`; only the
        head is trainable.

    Raises:
        InvalidArgument: If the head does not fit the base or the classes.
    """
    dim = backbone.output_shape[-1]
    if head is None:
        head = build_head(dim, num_classes)
    if head.input_shape[-1] != dim or head.output_shape[-1] != num_classes:
        raise InvalidArgument(
            f"The head must map {dim} features to {num_classes} classes. Received: "
            f"a head from {head.input_shape[-1]} to {head.output_shape[-1]}."
        )
    backbone.trainable = False
    taken = backbone.inputs[0]
    samples = keras.Input(taken.shape[1:], dtype=taken.dtype, name=taken.name)
    return keras.Model(samples, head(backbone(samples)), name="classifier")
