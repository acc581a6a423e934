"""Cached features: what lies in their folder, and how it is opened."""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._storage import json_of, open_regular
from keras_rsft.config import CACHE_DTYPES
from keras_rsft.errors import DataError

FEATURES_FILE = "features.bin"
INDEX_FILE = "index.bin"
META_FILE = "meta.json"
# Variance floor for standardisation, as a fraction of the mean variance.
LEAST_VARIANCE = 0.1


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features, labels and ids of the readable images of one split.

    Attributes:
        path: Raw file of values, shape `(rows, augmentations, dim)`.
        labels: int32 array of shape `(n,)`, the given labels.
        ids: String array of shape `(n,)`.
        dim: Number of features of an image.
        augmentations: Augmented views cached per image; the first is the plain image.
        clean_labels: int32 array of shape `(n,)`, or None if not known.
        unreadable: `(id, reason)` of each image that could not be read.
        dtype: Dtype of the values in the file, `"float32"` or `"float16"`. What comes
            out of `chunks` and of training batches is float32 in either case.
        reviewed: Boolean array of shape `(n,)`: True where a reviewer confirmed or
            corrected the label. None: nobody looked.
        before_review: These samples and those dropped since, with the labels that they
            had before a person looked. None: nobody looked.
        rows: int64 array of shape `(n,)`, increasing: the row of each sample in the
            file. None: the file holds these samples and no others.
        groups: int64 array of shape `(n,)`: samples of the same number, in whatever
            split, are copies of one photo or text. None: nobody looked for copies.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> file = Path(tempfile.mkdtemp(), "features.bin")
        >>> np.arange(6, dtype="float32").tofile(file)
        >>> labels, ids = np.array([0, 1, 0]), np.array(["a", "b", "c"])
        >>> features = rsft.FeatureSet(file, labels, ids, dim=2)
        >>> features.features[1].tolist()
        [2.0, 3.0]
    """

    path: Path
    labels: np.ndarray
    ids: np.ndarray
    dim: int
    augmentations: int = 1
    clean_labels: np.ndarray | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    dtype: str = "float32"
    reviewed: np.ndarray | None = None
    before_review: FeatureSet | None = None
    rows: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def row_bytes(self) -> int:
        """Bytes of one augmentation of one image in the file."""
        return np.dtype(self.dtype).itemsize * self.dim

    @property
    def num_bytes(self) -> int:
        """Bytes of all augmentations of these samples in the file."""
        return len(self) * self.augmentations * self.row_bytes

    @functools.cached_property
    def all_views(self) -> np.ndarray:
        """Read-only array of shape `(n, augmentations, dim)`, in the file's dtype.

        Memory-mapped where the file holds no other samples, else a copy.
        """
        if self.rows is not None:
            return self.views_of(np.arange(len(self)))
        return self._file_views

    @property
    def features(self) -> np.ndarray:
        """Array of shape `(n, dim)`: `all_views` of the plain images."""
        return self.all_views[:, 0]

    def views_of(self, samples: np.ndarray) -> np.ndarray:
        """Returns all augmentations of some samples, a copy `(k, augmentations, dim)`.

        In the file's dtype.

        Args:
            samples: Integers of shape `(k,)`, positions in [0, n).
        """
        return np.array(self._file_views[self.file_rows(samples)])

    def file_rows(self, samples: np.ndarray) -> np.ndarray:
        """Returns where samples are in the file, integers of shape `(k,)`.

        Args:
            samples: Integers of shape `(k,)`, positions in [0, n).
        """
        return samples if self.rows is None else self.rows[samples]

    def take(self, samples: np.ndarray) -> FeatureSet:
        """Returns some of the samples; their features stay in the same file.

        Args:
            samples: Integers of shape `(k,)`, increasing positions in [0, n).
        """
        taken: dict[str, Any] = {}
        for name in ("labels", "ids", "clean_labels", "reviewed", "groups"):
            values = getattr(self, name)
            taken[name] = None if values is None else values[samples]
        return dataclasses.replace(self, **taken, rows=self.file_rows(samples))

    def with_labels(
        self, labels: np.ndarray, clean_labels: np.ndarray | None = None
    ) -> FeatureSet:
        """Returns the same features under other labels, which nobody has reviewed.

        Args:
            labels: int32 array of shape `(n,)`, the given labels.
            clean_labels: int32 array of shape `(n,)`, the right ones. Default: not
                known.
        """
        unreviewed = dataclasses.replace(self, reviewed=None, before_review=None)
        return dataclasses.replace(unreviewed, labels=labels, clean_labels=clean_labels)

    def with_right_labels(self) -> FeatureSet:
        """Returns the same features under the right labels, where those are known."""
        if self.clean_labels is None:
            return self
        return self.with_labels(self.clean_labels, self.clean_labels)

    def chunks(self, rows: int = 4096) -> Iterator[np.ndarray]:
        """Yields the plain images' features in order, read from the file.

        Args:
            rows: Rows of each array but the last, at least 1. Default 4096.

        Yields:
            Float32 arrays of shape `(rows, dim)`.
        """
        for start in range(0, len(self), rows):
            wanted = self.file_rows(np.arange(start, min(start + rows, len(self))))
            first, last = int(wanted[0]), int(wanted[-1])
            values = self._read(first, last + 1)
            plain = values if self.rows is None else values[wanted - first]
            yield plain.astype(np.float32, copy=False)

    def _read(self, first: int, last: int) -> np.ndarray:
        """Returns some rows of plain images, read from the file."""
        values = np.fromfile(
            self.path,
            self.dtype,
            count=(last - first) * self.augmentations * self.dim,
            offset=first * self.augmentations * self.row_bytes,
        )
        return values.reshape(-1, self.augmentations, self.dim)[:, 0]

    def moments(self, chunk_rows: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and variance of each feature over the plain images.

        A feature that hardly varies gets a floor of a tenth of the mean variance:
        divided by its own deviation it would be thousands on the first image that
        is not like the training images, and drown all others.

        Args:
            chunk_rows: Rows read at a time, at least 1. Default 4096.

        Returns:
            Two float32 arrays of shape `(dim,)`; every variance is positive.
        """
        total = np.zeros(self.dim)
        total_of_squares = np.zeros(self.dim)
        for chunk in self.chunks(chunk_rows):
            chunk = chunk.astype(np.float64)
            total += chunk.sum(axis=0)
            total_of_squares += np.square(chunk).sum(axis=0)
        mean = total / len(self)
        variance = np.maximum(total_of_squares / len(self) - np.square(mean), 0.0)
        floor = max(LEAST_VARIANCE * variance.mean(), 1e-12)
        return mean.astype(np.float32), np.maximum(variance, floor).astype(np.float32)

    @functools.cached_property
    def _file_views(self) -> np.ndarray:
        count = len(self) if self.rows is None else int(self.rows[-1]) + 1
        shape = (count, self.augmentations, self.dim)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=shape)


@dataclasses.dataclass(frozen=True)
class ArrayFeatures(FeatureSet):
    """Features in memory or in a memory map, `(rows, dim)`, which are not copied."""

    values: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0)))

    @classmethod
    def of(cls, values: np.ndarray, labels: np.ndarray, **more: Any) -> ArrayFeatures:
        more.setdefault("ids", np.arange(len(labels)))
        width = values.shape[1]
        return cls(Path("memory"), labels, dim=width, values=values, **more)

    def _read(self, first: int, last: int) -> np.ndarray:
        # The same layout as from a file: the same sums to the last bit.
        return np.ascontiguousarray(self.values[first:last], np.float32)

    @functools.cached_property
    def _file_views(self) -> np.ndarray:
        return self.values[:, None]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Returns what a finished folder says of itself, or None if there is none."""
    try:
        meta = json_of(folder / META_FILE, dict)
        rows, augmentations, dim = (int(meta[key]) for key in ("rows", "views", "dim"))
        checksums = {name: str(meta["checksums"][name]) for name in _CHECKED}
        dtype = meta.get("precision", "float32")
        row_bytes = np.dtype(dtype).itemsize * augmentations * dim
        complete = (
            (folder / FEATURES_FILE).stat().st_size == row_bytes * rows
            and (folder / INDEX_FILE).stat().st_size == 8 * rows
            and dtype in CACHE_DTYPES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = {"rows": rows, "augmentations": augmentations, "dim": dim, "dtype": dtype}
    return found | {"checksums": checksums} if complete else None


_CHECKED = (FEATURES_FILE, INDEX_FILE)
_PIECE = 2**22


def open_features(folder: Path) -> dict[str, Any]:
    """Returns what `read_meta` does; DataError where the files are not as written."""
    meta = read_meta(folder)
    if meta is None:
        raise DataError(f"The cached features in {folder} are damaged or not complete.")
    for name, expected in meta["checksums"].items():
        with open_regular(folder / name) as file:
            state = os.fstat(file.fileno())
        identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        if _checksum_at(folder / name, identity) != expected:
            raise DataError(
                f"The cached features in {folder} are damaged: {name} is not what was "
                "written."
            )
    return meta


@functools.lru_cache(maxsize=256)
def _checksum_at(path: Path, identity: tuple[int, ...]) -> str:
    """Reads a file once in a process, as long as nobody changes it."""
    # CRC-32: it is to notice damage, not forgery, and is three times as fast as the
    # fastest of hashlib.
    del identity
    return checksum_of(path)


def checksum_of(path: Path) -> str:
    checksum = 0
    with open_regular(path, buffering=0) as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"
