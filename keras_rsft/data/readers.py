"""Gets the encoded bytes of a split's images, wherever they are kept.

A reader knows the images of one split by their position in it. It holds no
image that it can fetch again; decoding is left to `decode.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import tensorflow as tf


class Reader(Protocol):
    """What an `ImageSplit` asks of the place where its images are."""

    any_order: bool

    def entries(self, start: int) -> tf.data.Dataset:
        """Returns `(index, key)` pairs in index order from `start` on."""

    def load(self, key: tf.Tensor) -> tf.Tensor:
        """Turns a key into an image file's bytes, as a graph op."""

    def encoded(self, index: int) -> bytes:
        """Returns one image file's bytes; raises OSError if it has none."""

    def fingerprint(self) -> str:
        """Returns a hex digest of the images: which they are, and their state."""

    def take(self, indices: np.ndarray) -> Reader:
        """Returns a reader of the images at these increasing positions."""


class FileReader:
    """Reads image files below one folder."""

    any_order = True

    def __init__(self, root: str, ids: np.ndarray):
        self._root = root
        self._ids = ids

    def entries(self, start: int) -> tf.data.Dataset:
        indices = np.arange(start, len(self._ids), dtype=np.int64)
        return tf.data.Dataset.from_tensor_slices((indices, self._ids[start:]))

    def load(self, key: tf.Tensor) -> tf.Tensor:
        return tf.io.read_file(tf.strings.join([self._root, os.sep, key]))

    def encoded(self, index: int) -> bytes:
        with open(self._path(self._ids[index]), "rb") as file:
            return file.read()

    def fingerprint(self) -> str:
        return digest(f"{name}\0{self._state(name)}\0".encode() for name in self._ids)

    def take(self, indices: np.ndarray) -> FileReader:
        return FileReader(self._root, self._ids[indices])

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)

    def _state(self, name: str) -> str:
        try:
            status = os.stat(self._path(name))
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"


class ArrayReader:
    """Reads images from an array in memory, for data sets of a few megabytes."""

    any_order = True

    def __init__(self, ids: np.ndarray, pixels: np.ndarray):
        self._ids = ids
        self._pixels = pixels

    def entries(self, start: int) -> tf.data.Dataset:
        indices = np.arange(start, len(self._ids), dtype=np.int64)
        return tf.data.Dataset.from_tensor_slices((indices, self._pixels[start:]))

    def load(self, key: tf.Tensor) -> tf.Tensor:
        return tf.io.encode_png(key)

    def encoded(self, index: int) -> bytes:
        return self.load(tf.constant(self._pixels[index])).numpy()

    def fingerprint(self) -> str:
        named = zip(self._ids, self._pixels, strict=True)
        return digest(f"{name}\0".encode() + image.tobytes() for name, image in named)

    def take(self, indices: np.ndarray) -> ArrayReader:
        return ArrayReader(self._ids[indices], self._pixels[indices])


def digest(parts: Iterable[bytes]) -> str:
    """Returns the hex SHA-256 digest of the parts, one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()
