"""Loads a Keras weights file into a model that is already built.

Owns telling apart a file that is missing, one that is damaged and one that belongs
to another model; the reading is Keras's own.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path

import keras

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
