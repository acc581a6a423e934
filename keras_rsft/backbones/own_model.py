"""A user's own `.keras` file as the network of a backbone.

Owns checking that the file maps images to features. Nothing in it can run code:
Keras loads it in safe mode.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import keras

from keras_rsft.backbones.assembly import Base
from keras_rsft.backbones.foreign import agreed_size
from keras_rsft.backbones.weights_file import DAMAGED, first_line
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

_EXPECTED = (
    "A backbone file must map images (None, height, width, 3) in [0, 255] to "
    "(None, dim) or (None, h, w, dim)."
)
_IMAGE_RANK = 4
_IMAGE_CHANNELS = 3
_OUTPUT_RANKS = (2, 4)


def build(path: str | Path, *, image_size: tuple[int, int] | None) -> Base:
    """Loads a `.keras` file; the preprocessing must be inside it."""
    model = _load(Path(path))
    shape = _only_shape(getattr(model, "inputs", None))
    if len(shape) != _IMAGE_RANK or (shape[0], shape[3]) != (None, _IMAGE_CHANNELS):
        raise InvalidArgument(f"{_EXPECTED} Received: {path} with input {shape}.")
    size = agreed_size(shape[1:3], image_size, path)
    _check_output(model, path)
    return Base(model, _unchanged, size)


def _unchanged(images: keras.KerasTensor) -> keras.KerasTensor:
    return images


def _load(path: Path) -> keras.Model:
    if not path.is_file():
        raise InvalidArgument(f"There is no backbone file {path}.")
    if not zipfile.is_zipfile(path):
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged or not a `.keras` file."
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except DAMAGED as error:
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged: {first_line(error)}."
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise InvalidArgument(
            f"The backbone file {path} could not be loaded in safe mode: "
            f"{first_line(error)}. Save it with stock Keras layers only."
        ) from error


def _check_output(model: keras.Model, path: str | Path) -> None:
    shape = _only_shape(model.outputs)
    if len(shape) not in _OUTPUT_RANKS or shape[-1] is None:
        raise InvalidArgument(f"{_EXPECTED} Received: {path} with output {shape}.")


def _only_shape(tensors: Any) -> tuple[int | None, ...]:
    """The shape of the one tensor, or () where there is none or more than one."""
    return tuple(tensors[0].shape) if tensors and len(tensors) == 1 else ()
