"""Reads the tensors of a legacy PyTorch weights file without PyTorch.

Owns the file format that `torch.save` wrote before version 1.6: five pickle
streams (magic number, protocol, byte order, names to tensors, storage keys),
then each storage as an int64 element count and little-endian numbers. The pickle
streams are interpreted here, opcode by opcode, over a whitelist: nothing of the
file is ever imported, called or executed. What the tensors mean is left to others.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from keras_rsft.errors import WeightsUnavailable

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZIP_SIGNATURE = b"PK\x03\x04"
_COUNT = struct.Struct("<q")
# One opcode can cost some hundred bytes of memory. A state dict needs about sixty
# opcodes a tensor, so this is room for more than ten thousand tensors.
_MAX_OPCODES = 1_000_000
_MAX_RANK = 32
_NO_VIEW = ((), (None,))

_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_STORAGE_DTYPES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
}
_ALLOWED_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, *_STORAGE_DTYPES}


_Handler: TypeAlias = Callable[["_PickleMachine", Any], None]


class _MalformedError(Exception):
    """Something in the file is not as it should be; the text says what."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """A whitelisted name of the file; a label here, never the thing it names."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in its storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the named tensors of a legacy (before 1.6) PyTorch file."""
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
    _check_header(stream)
    tensors = _check_tensors(_load_pickle(stream))
    keys = _load_pickle(stream)
    storages = _cut_storages(memoryview(content)[stream.tell() :], keys, tensors)
    return {
        name: _as_array(tensor, storages[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _check_header(stream: io.BytesIO) -> None:
    if _load_pickle(stream) != _MAGIC_NUMBER:
        raise _MalformedError("it does not begin with PyTorch's magic number")
    if _load_pickle(stream) != _PROTOCOL_VERSION:
        raise _MalformedError(f"its protocol version is not {_PROTOCOL_VERSION}")
    system = _load_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _MalformedError("it was not written on a little-endian machine")


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


def _load_pickle(stream: io.BytesIO) -> Any:
    """Interprets one pickle stream and leaves `stream` behind its end."""
    machine = _PickleMachine()
    operations = pickletools.genops(stream)
    for _ in range(_MAX_OPCODES):
        handler = _next_handler(stream)
        try:
            opcode, argument, _position = next(operations)
        # A warning where the user makes errors of them: an escape in a name.
        except (ValueError, LookupError, struct.error, Warning) as error:
            raise _MalformedError("it ends early or is damaged") from error
        if opcode.name == "STOP":
            return machine.pop()
        handler(machine, argument)
    raise _MalformedError(f"it has more than {_MAX_OPCODES} pickle opcodes")


def _next_handler(stream: io.BytesIO) -> _Handler:
    """Looks at the next opcode, before `pickletools` reads its argument."""
    code = stream.read(1)
    stream.seek(-len(code), io.SEEK_CUR)
    name = _OPCODE_NAMES.get(code)
    if name is None:
        raise _MalformedError("it ends early or is damaged")
    if name not in _HANDLERS:
        raise _MalformedError(f"the pickle opcode {name} is not allowed")
    return _HANDLERS[name]


class _PickleMachine:
    """The stack and the memo of the interpreter; each opcode is a method."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise _MalformedError("a pickle opcode finds nothing to work on")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _MalformedError(f"a pickle opcode finds no {kind.__name__}")
        return self._stack[-1]

    def mark(self, _: Any) -> None:
        self._outer_stacks.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self._outer_stacks:
            raise _MalformedError("a pickle opcode finds no mark")
        items, self._stack = self._stack, self._outer_stacks.pop()
        return items

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def put(self, index: int) -> None:
        self._memo[index] = self.top(object)

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise _MalformedError("a pickle opcode asks for a value it never stored")
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise _MalformedError("a dictionary key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Strings only: the hash of tuples within tuples can take for ever.
            if not isinstance(key, str):
                raise _MalformedError("a dictionary key is not a string")
            target[key] = value

    def set_item(self, _: Any) -> None:
        value = self.pop()
        self.set_items([self.pop(), value])

    def load_global(self, name: str) -> None:
        if name not in _ALLOWED_GLOBALS:
            raise _MalformedError(f"it asks for `{name[:80]}`, which is not allowed")
        self.push(_Global(name))

    def load_storage(self, _: Any) -> None:
        self.push(_storage_from(self.pop()))

    def reduce(self, _: Any) -> None:
        arguments = self.pop()
        function = self.pop()
        if function == _Global(_ORDERED_DICT) and arguments == ():
            self.push({})
        elif function == _Global(_REBUILD_TENSOR):
            self.push(_tensor_from(arguments))
        else:
            raise _MalformedError("it asks for a call that is not allowed")

    def build(self, _: Any) -> None:
        # The attributes of an OrderedDict: version numbers, of no use here.
        self.pop()
        self.top(dict)


def _storage_from(value: Any) -> _Storage:
    # A sixth item, other than None, would make it a view into another storage.
    if not isinstance(value, tuple) or len(value) < 5 or value[5:] not in _NO_VIEW:
        raise _MalformedError("a storage is not described as PyTorch does")
    tag, kind, key, _, length = value[:5]
    if tag != "storage" or not isinstance(key, str) or not _is_count(length):
        raise _MalformedError("a storage is not described as PyTorch does")
    if not isinstance(kind, _Global) or kind.name not in _STORAGE_DTYPES:
        raise _MalformedError("a storage holds numbers of an unknown type")
    return _Storage(key, _STORAGE_DTYPES[kind.name], length)


def _tensor_from(value: Any) -> _Tensor:
    # (storage, offset, shape, strides, requires_grad, hooks); the last two are
    # for training.
    if not isinstance(value, tuple) or len(value) != 6:
        raise _MalformedError("a tensor is not described as PyTorch does")
    storage, offset, shape, strides = value[:4]
    if not isinstance(storage, _Storage) or not _is_count(offset):
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
    return _Tensor(storage, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_count(item) for item in value)


_OPCODE_NAMES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
_HANDLERS: dict[str, _Handler] = {
    "PROTO": lambda machine, version: None,
    "MARK": _PickleMachine.mark,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _PickleMachine.push,
    "BININT1": _PickleMachine.push,
    "BININT2": _PickleMachine.push,
    "LONG1": _PickleMachine.push,
    "BINUNICODE": _PickleMachine.push,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": _PickleMachine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": _PickleMachine.put,
    "LONG_BINPUT": _PickleMachine.put,
    "BINGET": _PickleMachine.get,
    "LONG_BINGET": _PickleMachine.get,
    "GLOBAL": _PickleMachine.load_global,
    "BINPERSID": _PickleMachine.load_storage,
    "REDUCE": _PickleMachine.reduce,
    "BUILD": _PickleMachine.build,
    "STOP": lambda machine, _: None,
}
