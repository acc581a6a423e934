"""Kept features: what is in their folder and how it is opened.

Owns the file format: `features.bin` (float32 or float16, row after row), `index.bin`
(int64, which sample of the split each row belongs to) and `meta.json` (sizes).
Writing them is `extraction.py`'s business.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FEATURES_FILE = "features.bin"
INDEX_FILE = "index.bin"
META_FILE = "meta.json"
FEATURE_PRECISIONS = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features, labels and ids of the readable images of one split.

    Attributes:
        path: Raw file of values, shape `(n, views, dim)`.
        labels: int32 array of shape `(n,)`, the given labels.
        ids: String array of shape `(n,)`.
        dim: Number of features of an image.
        views: Views kept of each image; view 0 is the plain image.
        clean_labels: int32 array of shape `(n,)`, or None if not known.
        unreadable: `(id, reason)` of each image that could not be read.
        precision: Of the values in the file, `"float32"` or `"float16"`. What comes out
            of `chunks` and of training batches is float32 in either case.
    """

    path: Path
    labels: np.ndarray
    ids: np.ndarray
    dim: int
    views: int = 1
    clean_labels: np.ndarray | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    precision: str = "float32"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def row_bytes(self) -> int:
        """Bytes of one view of one image in the file."""
        return np.dtype(self.precision).itemsize * self.dim

    @functools.cached_property
    def all_views(self) -> np.ndarray:
        """Memory-mapped, read-only array of shape `(n, views, dim)`, as in the file."""
        shape = (len(self), self.views, self.dim)
        return np.memmap(self.path, dtype=self.precision, mode="r", shape=shape)

    @property
    def features(self) -> np.ndarray:
        """Memory-mapped array of shape `(n, dim)`, as in the file: the plain images."""
        return self.all_views[:, 0]

    def with_labels(
        self, labels: np.ndarray, clean_labels: np.ndarray | None = None
    ) -> FeatureSet:
        """Returns the same features under other labels, both of shape `(n,)`."""
        return dataclasses.replace(self, labels=labels, clean_labels=clean_labels)

    def chunks(self, rows: int = 4096) -> Iterator[np.ndarray]:
        """Yields the plain images' features in order, read from the file.

        Args:
            rows: Rows of each array but the last, at least 1. Default 4096.

        Yields:
            Float32 arrays of shape `(rows, dim)`.
        """
        row_values = self.views * self.dim
        for start in range(0, len(self), rows):
            count = min(rows, len(self) - start) * row_values
            offset = start * self.views * self.row_bytes
            values = np.fromfile(self.path, self.precision, count=count, offset=offset)
            plain = values.reshape(-1, self.views, self.dim)[:, 0]
            yield plain.astype(np.float32, copy=False)

    def moments(self, chunk_rows: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and variance of each feature over the plain images.

        A feature that hardly varies gets a floor of a millionth of the mean
        variance, so that standardising never blows up a dead feature.

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
        floor = max(1e-6 * variance.mean(), 1e-12)
        return mean.astype(np.float32), np.maximum(variance, floor).astype(np.float32)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Returns sizes and precision of a finished folder, or None if there is none.

    A folder whose files do not have the size that `meta.json` says is treated
    as absent.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        rows, views, dim = (int(meta[key]) for key in ("rows", "views", "dim"))
        precision = meta.get("precision", "float32")
        row_bytes = np.dtype(precision).itemsize * views * dim
        complete = (
            (folder / FEATURES_FILE).stat().st_size == row_bytes * rows
            and (folder / INDEX_FILE).stat().st_size == 8 * rows
            and precision in FEATURE_PRECISIONS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not complete:
        return None
    return {"rows": rows, "views": views, "dim": dim, "precision": precision}
