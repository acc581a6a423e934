"""Samples with ids and labels, in splits, and readers of their bytes."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import tensorflow as tf

from keras_rsft.data._images import (
    checked_size,
    decode_pixels,
    readable_reason,
    traced_image,
    traced_views,
    without_autotuning,
)
from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.data._labels import Corrections


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


class MemoryReader:
    """Reads what is in memory, for data sets of a few megabytes."""

    any_order = True

    def __init__(self, ids: np.ndarray, items: np.ndarray):
        self._ids = ids
        self._items = items

    def entries(self, start: int) -> tf.data.Dataset:
        indices = np.arange(start, len(self._ids), dtype=np.int64)
        return tf.data.Dataset.from_tensor_slices((indices, self._items[start:]))

    def load(self, key: tf.Tensor) -> tf.Tensor:
        return key

    def take(self, indices: np.ndarray) -> Self:
        return type(self)(self._ids[indices], self._items[indices])


class ArrayReader(MemoryReader):
    """Reads images, uint8 `(n, height, width, channels)`, from memory."""

    def load(self, key: tf.Tensor) -> tf.Tensor:
        return tf.io.encode_png(key)

    def encoded(self, index: int) -> bytes:
        return self.load(tf.constant(self._items[index])).numpy()

    def fingerprint(self) -> str:
        named = zip(self._ids, self._items, strict=True)
        return digest(f"{name}\0".encode() + image.tobytes() for name, image in named)


def digest(parts: Iterable[bytes]) -> str:
    """Returns the hex SHA-256 digest of the parts, one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class SampleSplit(abc.ABC):
    """The samples of one split, in an order that does not change between runs."""

    kind: ClassVar[str]

    name: str
    ids: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    reader: Reader
    reviewed: np.ndarray | None = None
    before_review: Self | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abc.abstractmethod
    def inputs(
        self,
        sample_shape: tuple[int | None, ...],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Reads the samples one after the other, as a base takes them."""

    @abc.abstractmethod
    def read_error(self, index: int) -> str | None:
        """Says in one sentence why a sample cannot be read; None if it can."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when a sample is added, removed or changed."""
        return self.reader.fingerprint()

    def encoded(self, index: int) -> bytes:
        """Returns a sample as the bytes of a file."""
        return self.reader.encoded(range(len(self))[index])

    def with_labels(
        self, labels: np.ndarray, clean_labels: np.ndarray | None = None
    ) -> Self:
        """Returns the same samples with other labels."""
        labels = _checked_labels("labels", labels, len(self))
        if clean_labels is None:
            return dataclasses.replace(self, labels=labels, reviewed=None)
        clean = _checked_labels("clean_labels", clean_labels, len(self))
        return dataclasses.replace(
            self, labels=labels, clean_labels=clean, reviewed=None
        )

    def take(self, indices: np.ndarray) -> Self:
        """Returns some of the samples, in the same order."""
        indices = np.asarray(indices, dtype=np.int64)
        inside = indices.size == 0 or (indices[0] >= 0 and indices[-1] < len(self))
        if indices.ndim != 1 or not inside or np.any(np.diff(indices) <= 0):
            raise InvalidArgument(
                "`indices` must be strictly increasing positions in "
                f"[0, {len(self)}), so that the order of the samples stays. "
                f"Received: indices={indices}. Sort them first."
            )
        clean, reviewed = (
            None if values is None else values[indices]
            for values in (self.clean_labels, self.reviewed)
        )
        return type(self)(
            self.name,
            self.ids[indices],
            self.labels[indices],
            clean,
            self.reader.take(indices),
            reviewed,
        )

    def mapped(
        self,
        function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        start: int,
        stop: int | None,
    ) -> tf.data.Dataset:
        """Returns what a function makes of index and bytes, where it can."""
        require_in_range("start", start, 0, len(self))
        stop = len(self) if stop is None else stop
        require_in_range("stop", stop, start, len(self))

        @tf.autograph.experimental.do_not_convert
        def run(index: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return index, function(index, self.reader.load(key))

        entries = self.reader.entries(start).take(stop - start)
        made = entries.map(run, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return without_autotuning(made.ignore_errors(log_warning=False))


@dataclasses.dataclass(frozen=True, eq=False)
class SampleData:
    """A data set of labelled samples."""

    split_type: ClassVar[type[SampleSplit]]

    train: SampleSplit
    validation: SampleSplit
    test: SampleSplit
    class_names: tuple[str, ...]
    source: str
    ignored_files: int = 0
    corrections: Corrections | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def kind(self) -> str:
        """What the samples are, in the plural: "images" or "texts"."""
        return self.train.kind


def require_in_range(name: str, value: int, low: int, high: int) -> None:
    """Raises InvalidArgument unless a value is an integer in [low, high]."""
    try:
        inside = low <= operator.index(value) <= high
    except TypeError:
        inside = False
    if not inside:
        raise InvalidArgument(
            f"`{name}` must be an integer in [{low}, {high}]. "
            f"Received: {name}={value!r}."
        )


def _checked_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidArgument(
            f"`{name}` must be {count} integers, one for each sample. "
            f"Received: shape {labels.shape}, dtype {labels.dtype}."
        )
    return labels.astype(np.int32)


_IMAGE_RANK = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit(SampleSplit):
    """The images of one split, in an order that does not change between runs.

    `ids` are paths relative to the source with `/` between their parts, the TFDS id, or
    "digits/0123". Sorted; TFDS samples are in the order on disk, by shard and number.
    For the other attributes see `SampleSplit`.
    """

    kind: ClassVar[str] = "images"

    def inputs(
        self,
        sample_shape: tuple[int | None, ...],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        if len(sample_shape) != _IMAGE_RANK:
            raise InvalidArgument(
                "The data are images, and the base takes texts. Give a base for "
                "images, or load the data as texts (--text-column, `load_texts`)."
            )
        size = sample_shape[:2]
        return self.images(size, start=start, stop=stop, views=views, seed=seed)

    def images(
        self,
        image_size: int | tuple[int, int],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Decodes the images one after the other.

        Images that cannot be read are left out: compare the indices, and ask
        `read_error` for the reason.

        Args:
            image_size: Height and width, or one number for a square.
            start: Index of the first image, in [0, n].
            stop: Index after the last image, in [start, n]. Default: n.
            views: How many versions of each image. The first is the plain one,
                each further one a random flip and crop.
            seed: Chooses the random versions, together with the image's index
                and the version's number; their order plays no part.

        Returns:
            A dataset, not batched, of `(index, image)` in index order: an int64
            scalar, and float32 of shape `(height, width, 3)` in [0, 255]. With
            `views` > 1 the latter has shape `(views, height, width, 3)`.

        Raises:
            InvalidArgument: If an argument is out of its range.
        """
        size = checked_size(image_size)
        require_in_range("views", views, 1, 2**16 - 1)
        require_in_range("seed", seed, -(2**63), 2**63 - 1)

        def render(index: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
            if views == 1:
                return traced_image(encoded, size)
            return traced_views(encoded, size, views=views, seed=seed, index=index)

        return self.mapped(render, start, stop)

    def read_error(self, index: int) -> str | None:
        """Says why an image cannot be read.

        Args:
            index: The image's position in this split.

        Returns:
            One sentence, or None if the image can be read.
        """
        try:
            decode_pixels(tf.constant(self.encoded(index)))
        except tf.errors.OpError as error:
            return readable_reason(error)
        except OSError as error:
            return f"The file cannot be opened: {error.strerror}."
        return None

    def images_in_order(
        self,
        indices: np.ndarray,
        image_size: int | tuple[int, int],
        *,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Decodes some of the images in any order, from a source that can do so.

        Args:
            indices: Shape `(k,)`, positions in [0, n).
            image_size: As in `images`.
            views: As in `images`.
            seed: As in `images`.

        Returns:
            What `images` returns; the index is a position in `indices`.

        Raises:
            InvalidArgument: If the source gives its images in one order only.
        """
        if not self.reader.any_order:
            raise InvalidArgument("This source gives its images in one order only.")
        reader = self.reader.take(indices)
        ordered = dataclasses.replace(self, ids=self.ids[indices], reader=reader)
        return ordered.images(image_size, views=views, seed=seed)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData(SampleData):
    """A data set of labelled images; for its attributes see `SampleData`."""

    split_type: ClassVar[type[SampleSplit]] = ImageSplit

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
