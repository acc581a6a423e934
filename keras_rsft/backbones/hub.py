"""A preset of KerasHub as the network of a backbone.

Owns reading the preset's image converter, which says what pixels the network wants;
resizing is left to the reading of the images, as for every base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from keras_rsft.backbones.assembly import Base, scaled
from keras_rsft.backbones.base_name import BaseName, PixelScale
from keras_rsft.backbones.weights_file import first_line
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

_EXPECTED = "A KerasHub backbone must map images (None, height, width, 3) to features."
_USUAL_IMAGE_SIZE = (224, 224)
_DTYPES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
_UNKNOWN = "Unknown preset"


def build(
    name: BaseName,
    *,
    weights: str,
    image_size: tuple[int, int] | None,
    precision: str,
) -> Base:
    """Loads a preset: one by name, which KerasHub downloads, or a folder."""
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            f"hub:{name.place} needs the package keras-hub. Install it with: "
            'pip install "keras_rsft[hub]".'
        ) from error
    if weights not in ("imagenet", "none"):
        raise InvalidArgument(
            "`weights` of a KerasHub preset must be the default, or none for random "
            f"ones. Received: {weights!r}"
        )
    body = _load_body(keras_hub, name.place, weights == "imagenet", precision)
    inputs, outputs = keras.tree.flatten(body.input), keras.tree.flatten(body.output)
    shape = tuple(inputs[0].shape)
    takes_images = len(inputs) == 1 and len(shape) == 4 and shape[3] == 3
    if not takes_images or len(outputs) != 1 or outputs[0].shape[-1] is None:
        found = f"{[one.shape for one in inputs]} to {[one.shape for one in outputs]}"
        raise InvalidArgument(f"{_EXPECTED} Received: hub:{name.place}, from {found}.")
    converter = _load_converter(keras_hub, name.place)
    scale = name.scale or _scale_of(converter, name.place)
    size = image_size or _size_of(shape, converter)
    if any(d not in (None, s) for d, s in zip(shape[1:3], size, strict=True)):
        raise InvalidArgument(
            f"`image_size` must be {shape[1]}x{shape[2]} for hub:{name.place}. "
            f"Received: {size[0]}x{size[1]}"
        )
    return Base(body, lambda images: scaled(images, scale), size)


def _load_body(
    keras_hub: Any, preset: str, load_weights: bool, precision: str
) -> keras.Model:
    try:
        return keras_hub.models.Backbone.from_preset(
            preset, load_weights=load_weights, dtype=_DTYPES[precision]
        )
    except Exception as error:  # Of KerasHub, Kaggle, Hugging Face and the network.
        if isinstance(error, ValueError) and str(error).startswith(_UNKNOWN):
            raise InvalidArgument(
                f"There is no KerasHub preset {preset!r}, nor a preset folder of that "
                "path. A preset has a name such as resnet_50_imagenet."
            ) from error
        kind = "is damaged" if Path(preset).is_dir() else "cannot be had"
        raise WeightsUnavailable(
            f"The KerasHub preset {preset} {kind}: {first_line(error)}. Without a "
            "network, fetch its folder elsewhere and use hub:FOLDER."
        ) from error


def _load_converter(keras_hub: Any, preset: str) -> Any | None:
    try:
        return keras_hub.layers.ImageConverter.from_preset(preset)
    except Exception:  # It has none, in words that change from version to version.
        return None


def _scale_of(converter: Any | None, preset: str) -> PixelScale:
    if converter is None:
        raise InvalidArgument(
            f"The preset hub:{preset} has no image converter that says what pixel "
            "values it wants. Add them, such as @imagenet, @0:1 or @0:255."
        )
    factor = 1.0 if converter.scale is None else converter.scale
    offset = 0.0 if converter.offset is None else converter.offset
    return PixelScale(_three(factor), _three(offset))


def _three(value: Any) -> tuple[float, float, float]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    return tuple(float(one) for one in values)


def _size_of(shape: tuple[int | None, ...], converter: Any) -> tuple[int, int]:
    if None not in shape[1:3]:
        return shape[1], shape[2]
    wanted = getattr(converter, "image_size", None)
    if wanted is None or None in tuple(wanted):
        return _USUAL_IMAGE_SIZE
    return tuple(wanted)
