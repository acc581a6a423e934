"""Samples with ids and labels, in splits, and readers of their bytes."""

from __future__ import annotations

import abc
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import tensorflow as tf

from keras_rsft._progress import progress_bar
from keras_rsft.data import _images
from keras_rsft.errors import DataError, InvalidArgument


class Reader(abc.ABC):
    """Reads samples one after the other; `_items` are the keys that `load` takes."""

    any_order: ClassVar[bool] = True

    def __init__(self, ids: np.ndarray, items: np.ndarray):
        self._ids = ids
        self._items = items

    def entries(self, start: int) -> tf.data.Dataset:
        """Returns `(index, key)` pairs in index order from `start` on."""
        indices = np.arange(start, len(self._ids), dtype=np.int64)
        return tf.data.Dataset.from_tensor_slices((indices, self._items[start:]))

    def load(self, key: tf.Tensor) -> tf.Tensor:
        """Turns a key into a file's bytes, as a graph op."""
        return key

    def take(self, indices: np.ndarray) -> Self:
        """Returns a reader of the samples at these increasing positions."""
        taken = copy.copy(self)
        taken._ids, taken._items = self._ids[indices], self._items[indices]
        return taken

    def copy_names(self) -> np.ndarray:
        """Returns of each sample the id of the first that has the same content.

        Its own where contents are not compared: copies are then found by features.
        """
        return self._ids

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """Returns one file's bytes; raises OSError if it has none."""

    def all_encoded(self) -> Iterator[bytes]:
        """Yields all files' bytes in order, none of a file that cannot be read."""
        for index in range(len(self._ids)):
            try:
                yield self.encoded(index)
            except (OSError, DataError):
                yield b""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a hex digest of the samples: which they are, and their state."""

    def changed(self) -> list[str]:
        """Returns the ids of samples that are not as they were for the fingerprint."""
        return []


_FILES_TO_SHOW = 20_000
_MIDDLE_BYTES = 4096


def _middle_of(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, (os.path.getsize(path) - _MIDDLE_BYTES) // 2))
        return hashlib.sha256(file.read(_MIDDLE_BYTES)).digest()


def _sha256_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class FileReader(Reader):
    """Reads files below one folder."""

    def __init__(self, root: str, ids: np.ndarray, paths: np.ndarray | None = None):
        super().__init__(ids, ids if paths is None else paths)
        self._root = root

    def load(self, key: tf.Tensor) -> tf.Tensor:
        path = tf.strings.join([os.path.join(self._root, ""), key])
        if not any(map(_images.needs_pillow, self._items.tolist())):
            return tf.io.read_file(path)

        def read(path: bytes) -> bytes:
            return _images.read_image(os.fsdecode(path))

        return tf.ensure_shape(tf.numpy_function(read, [path], tf.string), ())

    def encoded(self, index: int) -> bytes:
        return _images.read_image(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self._root, self._items[index])

    def copy_names(self) -> np.ndarray:
        alike = [np.arange(len(self._ids)).tolist()]
        # Few files that are not equal have the same size and the same middle.
        for read in (os.path.getsize, _middle_of, _sha256_of):
            count = sum(map(len, alike))
            with progress_bar(
                "Looking for copies", total=count, unit="files",
                visible=count >= _FILES_TO_SHOW,
            ) as advance:  # fmt: skip
                alike = [
                    part for one in alike for part in self._sorted(one, read, advance)
                ]
        names = self._ids.copy()
        for one in alike:
            names[one] = self._ids[one[0]]
        return names

    def _sorted(
        self, positions: list[int], read: Callable[[str], Any], advance: Callable
    ) -> list[list[int]]:
        """Sorts files by what is read of them, without empty ones and single ones."""
        found = collections.defaultdict(list)
        for position in positions:
            with contextlib.suppress(OSError):
                found[read(self._path(position))].append(position)
            advance(1)
        return [some for key, some in found.items() if key and len(some) > 1]

    def fingerprint(self) -> str:
        self._states = self._found_states()
        named = zip(self._ids, self._states, strict=True)
        return digest(
            f"{name}\0{size} {time}\0".encode() if size >= 0 else
            f"{name}\0missing\0".encode()
            for name, (size, time) in named
        )  # fmt: skip

    def changed(self) -> list[str]:
        now = self._found_states()
        return self._ids[(now != self._states).any(axis=1)].tolist()

    def _found_states(self) -> np.ndarray:
        """Returns size and time of each file, -1 where there is none."""
        states = np.full((len(self._ids), 2), -1, np.int64)
        for at in range(len(states)):
            with contextlib.suppress(OSError):
                status = os.stat(self._path(at))
                states[at] = status.st_size, status.st_mtime_ns
        return states


def image_digest(image: np.ndarray) -> int:
    """Returns 64 bits that tell an image from others: its pixels, shape and dtype."""
    state = hashlib.blake2b(f"{image.dtype}{image.shape}".encode(), digest_size=8)
    state.update(np.ascontiguousarray(image).data.cast("B"))
    return int.from_bytes(state.digest())


_ROUNDING_ERROR = 1e-3


def rgb_image(image: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Returns `(h, w, 3)` in [0, 255]: float32, not rounded, of floats, else uint8."""
    if image.ndim == 2:
        image = image[..., np.newaxis]
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    whole_numbers = image.dtype.kind != "f"
    if whole_numbers and image.shape[-1] == 3:
        return image.astype(np.uint8)
    values = image.astype(np.float32) * np.float32(scale)
    if image.shape[-1] == 4:  # On white, as in decoding.
        share = values[..., 3:] / 255
        values = values[..., :3] * share + 255 * (1 - share)
    if whole_numbers:
        return np.rint(values).astype(np.uint8)
    if scale != 1:  # Pixels of files that were divided by 255 come back as they were.
        whole = np.rint(values)
        values = np.where(np.abs(values - whole) < _ROUNDING_ERROR, whole, values)
    return values


class PixelReader(Reader):
    """Reads images that are pixels already, not files."""

    def __init__(self, ids: np.ndarray, digests: np.ndarray, scale: float):
        super().__init__(ids, np.arange(len(ids)))
        self._digests = digests
        self._scale = scale

    def take(self, indices: np.ndarray) -> Self:
        taken = super().take(indices)
        taken._digests = self._digests[indices]
        return taken

    def copy_names(self) -> np.ndarray:
        first: dict[int, str] = {}
        named = zip(self._digests.tolist(), self._ids.tolist(), strict=True)
        return np.array([first.setdefault(one, name) for one, name in named], np.str_)

    def encoded(self, index: int) -> bytes:
        return next(self.take(np.array([index])).all_encoded())

    def all_encoded(self) -> Iterator[bytes]:
        for pixels in self.pixels():
            yield tf.io.encode_png(np.rint(pixels).astype(np.uint8)).numpy()

    @abc.abstractmethod
    def pixels(self) -> Iterator[np.ndarray]:
        """Yields the images in order, as `rgb_image` returns them."""

    def fingerprint(self) -> str:
        named = zip(self._ids, self._digests, strict=True)
        pixels = (f"{name}\0{one:016x}".encode() for name, one in named)
        return digest([f"{self._scale}\0".encode(), *pixels])


class ArrayReader(PixelReader):
    """Reads images, `(n, height, width[, channels])`, from memory or a memory map."""

    def __init__(
        self,
        ids: np.ndarray,
        images: np.ndarray,
        digests: np.ndarray | None = None,
        scale: float = 1.0,
    ):
        if digests is None:
            digests = np.array([image_digest(image) for image in images], np.uint64)
        super().__init__(ids, digests, scale)
        self._images = images

    def load(self, key: tf.Tensor) -> tf.Tensor:
        dtype = np.float32 if self._images.dtype.kind == "f" else np.uint8
        image = tf.numpy_function(self._rgb, [key], dtype)
        return tf.ensure_shape(image, (None, None, 3))

    def pixels(self) -> Iterator[np.ndarray]:
        return map(self._rgb, self._items)

    def _rgb(self, position: int) -> np.ndarray:
        return rgb_image(self._images[position], self._scale)


class StreamReader(PixelReader):
    """Reads images that come one after the other, the same in each pass.

    `images` starts a pass; what it yields must have the digests of the first one.
    """

    any_order = False

    def __init__(
        self,
        ids: np.ndarray,
        images: Callable[[], Iterator[np.ndarray]],
        digests: np.ndarray,
        scale: float,
        dtype: np.dtype,
        changed: str,
    ):
        super().__init__(ids, digests, scale)
        self._images = images
        self._dtype = dtype
        self._changed = changed
        self._faults: list[str] = []  # One list for all parts of the samples.

    def entries(self, start: int) -> tf.data.Dataset:
        signature = (
            tf.TensorSpec((), tf.int64),
            tf.TensorSpec((None, None, 3), self._dtype),
        )
        after = self.take(np.arange(start, len(self._ids)))
        return tf.data.Dataset.from_generator(
            lambda: enumerate(after.pixels(), start), output_signature=signature
        )

    def pixels(self) -> Iterator[np.ndarray]:
        # A pass in a pipeline leaves out what fails; `read_error` then ends up here.
        if self._faults:
            raise InvalidArgument(self._faults[0])
        stream = enumerate(self._images())
        for wanted, known in zip(self._items, self._digests, strict=True):
            image = next((one for position, one in stream if position == wanted), None)
            if image is None or image_digest(image) != known:
                self._faults.append(self._changed)
                raise InvalidArgument(self._changed)
            yield rgb_image(image, self._scale).astype(self._dtype, copy=False)


def digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class SampleSplit(abc.ABC):
    """The samples of one split, in an order that does not change between runs.

    Attributes:
        kind: "images" or "texts".
        name: "train", "validation" or "test".
        ids: Shape `(n,)`, strings.
        labels: Shape `(n,)`, int32: the given labels, right or wrong.
        clean_labels: Shape `(n,)`, int32: the right labels. None if unknown.
        reader: Reads the samples' bytes.
        reviewed: Shape `(n,)`, bool: samples whose label a review kept or corrected.
            None: there was no review.
        before_review: This split before corrections; cached features of it serve this
            one too. None: there was no review.
    """

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
        self, sample_shape: tuple[int | None, ...], **options: Any
    ) -> tf.data.Dataset:
        """Reads the samples as a backbone takes them; for options see `images`."""

    @abc.abstractmethod
    def check(self, encoded: bytes) -> None:
        """Raises DataError or OpError if a sample's bytes cannot be used."""

    def read_error(self, index: int) -> str | None:
        """Says why a sample cannot be read.

        Args:
            index: Its position in this split.

        Returns:
            One sentence, or None if it can be read.
        """
        try:
            self.check(self.encoded(index))
        except tf.errors.OpError as error:
            return _images.readable_reason(error)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"The file cannot be opened: {error.strerror}."
        return None

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
        changed: dict[str, Any] = {"labels": labels}
        if clean_labels is not None:
            changed["clean_labels"] = clean_labels
        for name, values in changed.items():
            values = np.asarray(values)
            integers = np.issubdtype(values.dtype, np.integer)
            if values.shape != (len(self),) or not integers:
                raise InvalidArgument(
                    f"`{name}` must be {len(self)} integers, one for each sample. "
                    f"Received: shape {values.shape}, dtype {values.dtype}."
                )
            changed[name] = values.astype(np.int32)
        return dataclasses.replace(self, **changed, reviewed=None)

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
        taken: dict[str, Any] = {"reader": self.reader.take(indices)}
        for name in ("ids", "labels", "clean_labels", "reviewed"):
            values = getattr(self, name)
            taken[name] = None if values is None else values[indices]
        return dataclasses.replace(self, **taken, before_review=None)

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
        return _images.without_autotuning(made.ignore_errors(log_warning=False))


def require_in_range(name: str, value: int, low: int, high: int) -> None:
    try:
        inside = low <= operator.index(value) <= high
    except TypeError:
        inside = False
    if not inside:
        raise InvalidArgument(
            f"`{name}` must be an integer in [{low}, {high}]. "
            f"Received: {name}={value!r}."
        )


class Correction(NamedTuple):
    """The decision about one sample."""

    id: str
    given_label: str
    decision: str
    new_label: str = ""


DECISIONS = ("keep", "relabel", "drop")


@dataclasses.dataclass(frozen=True)
class Corrections:
    """All corrections of a data set, against its labels as they were loaded."""

    rows: tuple[Correction, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    tested: int = 0

    def describe(self) -> str:
        """Says in one line, or two, what was changed."""
        counts = collections.Counter(row.decision for row in self.rows)
        text = (
            f"Corrections: {counts['keep']} labels kept, {counts['relabel']} "
            f"relabelled, {counts['drop']} samples dropped."
        )
        if self.tested:
            text += (
                f"\n{self.tested} of these samples are in the test split: its accuracy "
                "cannot be compared with one from before."
            )
        return text

    def record(self) -> dict[str, Any]:
        """Returns the files and the counts, as JSON can hold them."""
        files = [{"path": path, "sha256": digest} for path, digest in self.files]
        decisions = [row.decision for row in self.rows]
        return {"files": files} | {one: decisions.count(one) for one in DECISIONS}


@dataclasses.dataclass(frozen=True, eq=False)
class SampleData:
    """A data set of labelled samples.

    Attributes:
        train: The samples to train on.
        validation: The samples to choose settings by.
        test: The samples to measure the result on.
        class_names: Names of the classes, by label.
        source: Where the data are from, as given.
        unread_files: How many files in a folder are not read, by their ending; hidden
            ones do not count.
        notes: Sentences about what may not be meant so: files that are not read,
            classes whose names hardly differ.
        corrections: What `apply_corrections` changed, or None.
        cut: Names of the splits that were held out from the training samples; the
            others are as the source has them.
        fingerprint: Hex digest of samples that came as Python objects, which the
            command line cannot load again by `source`. None: it can.
    """

    split_type: ClassVar[type[SampleSplit]]

    train: SampleSplit
    validation: SampleSplit
    test: SampleSplit
    class_names: tuple[str, ...]
    source: str
    unread_files: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    corrections: Corrections | None = None
    cut: tuple[str, ...] = ()
    fingerprint: str | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def kind(self) -> str:
        """What the samples are, in the plural: "images" or "texts"."""
        return self.train.kind


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit(SampleSplit):
    """The images of one split, in an order that does not change between runs.

    `ids` are paths relative to the source with `/` between their parts, the TFDS id, or
    "digits/0123". Sorted; TFDS samples are in the order on disk, by shard and number.
    For those of arrays and streams see `load_data`, for the other attributes
    `SampleSplit`.
    """

    kind: ClassVar[str] = "images"

    def inputs(
        self, sample_shape: tuple[int | None, ...], **options: Any
    ) -> tf.data.Dataset:
        if len(sample_shape) != 3:  # Height, width, channels.
            raise InvalidArgument(
                "The data are images, and the backbone takes texts. Give a backbone "
                "for images, or load the data as texts (--text-column, `load_texts`)."
            )
        return self.images(_images.checked_size(sample_shape[:2]), **options)

    def images(
        self,
        image_size: int | tuple[int, int],
        *,
        start: int = 0,
        stop: int | None = None,
        augmentations: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Decodes the images one after the other.

        Images that cannot be read are left out: compare the indices, and ask
        `read_error` for the reason.

        Args:
            image_size: Height and width, or one number for a square.
            start: Index of the first image, in [0, n].
            stop: Index after the last image, in [start, n]. Default: n.
            augmentations: Augmented views of each image. The first is the plain one,
                each further one a random flip and crop.
            seed: Chooses the random augmentations, together with the image's index
                and the augmentation's number; their order plays no part.

        Returns:
            A dataset, not batched, of `(index, image)` in index order: an int64
            scalar, and float32 of shape `(height, width, 3)` in [0, 255]. With
            `augmentations` > 1 the latter has shape `(augmentations, height, width,
            3)`.

        Raises:
            InvalidArgument: If an argument is out of its range.
        """
        size = _images.checked_size(image_size)
        require_in_range("augmentations", augmentations, 1, 2**16 - 1)
        require_in_range("seed", seed, -(2**63), 2**63 - 1)

        def render(index: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
            if augmentations == 1:
                return _images.traced_image(encoded, size)
            return _images.traced_views(
                encoded, size, augmentations=augmentations, seed=seed, index=index
            )

        return self.mapped(render, start, stop)

    def check(self, encoded: bytes) -> None:
        _images.decode_pixels(tf.constant(encoded))


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData(SampleData):
    """A data set of labelled images; for its attributes see `SampleData`."""

    split_type: ClassVar[type[SampleSplit]] = ImageSplit

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
