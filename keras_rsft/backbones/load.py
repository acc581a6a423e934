"""Pretrained bases by name: what the rest of the package calls.

Owns names, options and their errors; building is left to the module of each kind
of base, and what all have in common to `assembly.py`.
"""

from __future__ import annotations

import operator
import os
from pathlib import Path

import keras

from keras_rsft.backbones import (
    applications,
    efficientnet_lite0,
    hub,
    onnx_file,
    own_model,
    saved_model,
)
from keras_rsft.backbones.assembly import (
    PRECISIONS,
    Base,
    assemble,
    built_in_float32,
    scaled,
)
from keras_rsft.backbones.base_name import (
    TEXT_ENCODERS,
    BaseName,
    parse_base_name,
    plain_name,
    takes_texts,
)
from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import nearest_name_hint

_OWN_MODEL_SUFFIX = ".keras"


def available_backbones() -> tuple[str, ...]:
    """The names that `load_backbone` knows, sorted.

    Returns:
        `"efficientnet_lite0"` and each model function of `keras.applications` in
        lower case, such as `"resnet50"`.
    """
    return tuple(sorted((efficientnet_lite0.NAME, *applications.applications())))


def load_backbone(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = "imagenet",
    image_size: int | tuple[int, int] | None = None,
    precision: str = "float32",
) -> keras.Model:
    """Loads a pretrained base, frozen, with its preprocessing inside.

    The result is made of stock Keras parts: it saves to a `.keras` file that loads
    without this package, and exports as a SavedModel. Called with `training=True`
    it does the same as without. A SavedModel or ONNX file becomes one layer of this
    package, which keeps all of it: a `.keras` file with it loads after
    `import keras_rsft.backbones`.

    Args:
        name: One of these.

            - One of `available_backbones()`, in any capitalisation and with or
              without underscores and hyphens.
            - The path of your own `.keras` file that maps images in [0, 255] to
              `(batch, dim)` features or `(batch, h, w, dim)` feature maps.
            - `hub:PRESET`, a preset of KerasHub by name or folder, with the extra
              `hub`. Its image converter says how pixels are scaled.
            - `savedmodel:FOLDER@SCALE`, a SavedModel from TensorFlow Hub or any
              other. Loading one runs its initialisers: take it from a source that
              you trust. What is kept and run later does nothing but compute.
            - `onnx:FILE@SCALE`, with the extra `onnx`; batch, channels first or
              last and float16 as the file has them. It runs in ONNX Runtime.
            - `minilm`, a sentence encoder, with the extra `text`: it takes texts.

            SCALE is what the network makes of pixels: `0:1` or another range,
            `imagenet` (mean and standard deviation as Torchvision and timm use
            them), or `MEAN/STD` of three channels in [0, 1]. Feature maps and tokens
            are averaged.
        weights: `"imagenet"`; `"none"` for random ones; or the path of a
            `.weights.h5`, `.h5` or `.keras` file for the base without its classes
            (for `efficientnet_lite0` also a `.pth` file of PyTorch before 1.6; for
            `minilm` the default is the published ones, and a folder with a
            `model.safetensors` and a `tokenizer.json` is taken). With your own file,
            leave the default: its weights are in it.
        image_size: Side, or (height, width), in pixels. None: the size that the
            base was made for.
        precision: `"float32"`, or `"bfloat16"` to compute the base in bfloat16;
            preprocessing and features are float32 in both. A SavedModel and an ONNX
            file compute as they were made: `"float32"`.

    Returns:
        A model from float32 images `(batch, height, width, 3)` in [0, 255] to
        float32 features `(batch, dim)`, with no trainable weights. `minilm`: from
        texts `(batch,)`, strings in UTF-8, to vectors `(batch, 384)` of length 1.

    Raises:
        InvalidArgument: An option has a value that cannot be used.
        WeightsUnavailable: The weights cannot be downloaded or read.
        ImportError: `efficientnet_lite0` without the package of its weights, or a
            base of an extra that is not installed.
    """
    if takes_texts(name):
        return _text_encoder(weights, image_size, precision)
    size = _parse_image_size(image_size)
    _require_precision(precision)
    if keras.config.image_data_format() != "channels_last":
        raise InvalidArgument(
            'Backbones need Keras\'s image data format "channels_last". Received: '
            f"{keras.config.image_data_format()!r}. Change it in keras.json."
        )
    name = os.fspath(name)
    parsed = parse_base_name(name)
    with built_in_float32():
        if parsed is None:
            base = _build(name, weights, size)
        else:
            base = _build_by_kind(parsed, name, weights, size, precision)
            precision = "float32"  # Of what is not yet in the wanted one.
        return assemble(base, name=f"{base.body.name}_backbone", precision=precision)


def _text_encoder(
    weights: str | os.PathLike[str] | None,
    image_size: int | tuple[int, int] | None,
    precision: str,
) -> keras.Model:
    if image_size is not None:
        raise InvalidArgument(
            "A text encoder has no image size. Received: "
            f"image_size={image_size!r}. Leave it out."
        )
    from keras_rsft.backbones import minilm

    _require_precision(precision)
    with built_in_float32():
        return minilm.build(weights=weights or "imagenet", precision=precision)


def _require_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InvalidArgument(
            f"`precision` must be one of {PRECISIONS}. Received: {precision!r}"
        )


def check_backbone_name(name: str | os.PathLike[str]) -> None:
    """Refuses a name that no base can have, without loading anything."""
    name = os.fspath(name)
    if takes_texts(name):
        return
    parsed = parse_base_name(name)
    if parsed is None and not name.endswith(_OWN_MODEL_SUFFIX):
        _resolve(name)
        return
    place = name if parsed is None else parsed.place
    if (parsed is None or parsed.kind != "hub") and not os.path.exists(place):
        raise InvalidArgument(f"There is no backbone file {place}.")


def _build_by_kind(
    parsed: BaseName,
    name: str,
    weights: str | os.PathLike[str] | None,
    size: tuple[int, int] | None,
    precision: str,
) -> Base:
    if parsed.kind == "hub":
        own = weights if weights == "none" else _only_default(weights, name)
        return hub.build(parsed, weights=own, image_size=size, precision=precision)
    _only_default(weights, name)
    if precision != "float32":
        raise InvalidArgument(
            f"{name} computes as it was made: `precision` must be float32 (or auto, "
            f"where that can be said). Received: {precision!r}"
        )
    module = onnx_file if parsed.kind == "onnx" else saved_model
    body = module.build(Path(parsed.place), image_size=size)
    return Base(
        body, lambda images: scaled(images, parsed.scale), body.input_shape[1:3]
    )


def _only_default(weights: str | os.PathLike[str] | None, name: str) -> str:
    if weights not in ("imagenet", None):
        raise InvalidArgument(
            f"`weights` cannot be given with your own backbone file {name}, whose "
            f"weights are in it. Received: weights={weights!r}"
        )
    return "imagenet"


def _build(
    name: str, weights: str | os.PathLike[str] | None, size: tuple[int, int] | None
) -> Base:
    if name.endswith(_OWN_MODEL_SUFFIX):
        _only_default(weights, name)
        return own_model.build(name, image_size=size)
    known = _resolve(name)
    weights = _parse_weights(weights)
    if known == efficientnet_lite0.NAME:
        size = size or efficientnet_lite0.IMAGE_SIZE
        body = efficientnet_lite0.build(weights=weights, image_size=size)
        return Base(body, lambda images: images, size)
    application = applications.applications()[known]
    return applications.build(application, weights=weights, image_size=size)


def _resolve(name: str) -> str:
    """The name as `available_backbones` writes it."""
    known = {plain_name(each): each for each in available_backbones()}
    plain = plain_name(name)
    if plain not in known:
        raise InvalidArgument(
            "The backbone must be a network of Keras by name, such as resnet50 (all: "
            "keras_rsft.backbones.available_backbones()), efficientnet_lite0, your own "
            "`.keras` file, hub:, savedmodel: or onnx: with a place, or "
            f"{TEXT_ENCODERS[0]} for texts. Received: {name!r}."
            f"{nearest_name_hint(plain, [*known.values()], cutoff=0.6)}"
        )
    return known[plain]


def _parse_weights(weights: str | os.PathLike[str] | None) -> str | Path:
    if weights in ("imagenet", "none"):
        return str(weights)
    if weights is None or not Path(weights).is_file():
        raise InvalidArgument(
            '`weights` must be "imagenet", "none" or the path of a weights file. '
            f"Received: {weights!r}, which is not a file."
        )
    return Path(weights)


def _parse_image_size(
    image_size: int | tuple[int, int] | None,
) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = image_size if isinstance(image_size, (tuple, list)) else [image_size] * 2
    try:
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1 or any(isinstance(side, bool) for side in sides):
        raise InvalidArgument(
            "`image_size` must be a number of pixels or (height, width). "
            f"Received: {image_size!r}"
        )
    return height, width
