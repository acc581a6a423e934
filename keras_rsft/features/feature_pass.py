"""A pass of a frozen base over images, in order, appended to files.

Owns the append-only writing that makes a killed pass go on where it was. Where the
features are kept, and under which key, is `extraction.py`'s business.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft.data import SampleSplit
from keras_rsft.errors import DataError
from keras_rsft.features.feature_set import FEATURES_FILE, INDEX_FILE, read_meta
from keras_rsft.features.frozen_base import FrozenBase
from keras_rsft.features.share_joining import CHECKSUM
from keras_rsft.progress import progress_bar


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturePass:
    """One pass of a base over a split, as `extract_features` was asked for it."""

    base: FrozenBase
    split: SampleSplit
    folder: Path
    batch_size: int
    views: int
    seed: int
    feature_precision: str
    called: str
    progress: bool

    @property
    def is_done(self) -> bool:
        """Whether the features are kept already, so that there is nothing to run."""
        return read_meta(self.folder) is not None

    @property
    def row_bytes(self) -> int:
        """Bytes of all views of one image."""
        return np.dtype(self.feature_precision).itemsize * self.views * self.base.dim

    @property
    def meta(self) -> dict[str, Any]:
        """What `meta.json` says beside the number of rows."""
        return {
            "views": self.views,
            "dim": self.base.dim,
            "precision": self.feature_precision,
        }

    def inputs(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns what `SampleSplit.inputs` gives of a stretch of the split."""
        return self.split.inputs(
            self.base.sample_shape,
            start=start,
            stop=stop,
            views=self.views,
            seed=self.seed,
        )


def append_rows(
    work: FeaturePass, partial: Path, stretch: range
) -> tuple[int, dict[str, str]]:
    """Computes the features of a stretch of the split, after those that are there."""
    split, base = work.split, work.base
    partial.mkdir(parents=True, exist_ok=True)
    rows, next_index = _truncate_to_whole_batches(
        partial, work.row_bytes, work.batch_size, stretch.start
    )
    needed = work.row_bytes * (stretch.stop - next_index)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"The features need {needed / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB free. Choose another folder with `--cache-dir`",
            str(partial),
        )
    samples = work.inputs(next_index, stretch.stop)
    samples = samples.batch(work.batch_size).prefetch(2)
    done = next_index - stretch.start
    with (
        (partial / FEATURES_FILE).open("ab", buffering=0) as features_file,
        (partial / INDEX_FILE).open("ab", buffering=0) as index_file,
        progress_bar(
            f"{work.called} of {split.name}", total=len(stretch), unit=split.kind,
            done=done, visible=work.progress,
        ) as advance,
        ThreadPoolExecutor(1) as writer,
    ):  # fmt: skip
        rows_file = _RowFiles(features_file, index_file, partial)
        writing: Future | None = None
        views_in_a_row = (
            (index.numpy(), tf.reshape(batch, (-1, *base.sample_shape)))
            for index, batch in samples
        )
        for index, features in base.over(views_in_a_row):
            _require_unreadable(work, range(next_index, int(index[-1])), index)
            values = _kept_as(work.feature_precision, features)
            if writing is not None:
                writing.result()
            # The disk is waited for while the base is busy with the next batch.
            writing = writer.submit(rows_file.append, values, index)
            rows += len(index)
            reached = int(index[-1]) + 1
            advance(reached - next_index)
            next_index = reached
        if writing is not None:
            writing.result()
        _require_unreadable(work, range(next_index, stretch.stop), ())
    return rows, rows_file.checksums()


class _RowFiles:
    """Appends batches to the two files of a pass, and takes their checksums."""

    def __init__(self, features_file: Any, index_file: Any, folder: Path):
        self._files = {FEATURES_FILE: features_file, INDEX_FILE: index_file}
        self._digests = {name: _digest_of(folder / name) for name in self._files}

    def append(self, values: np.ndarray, index: np.ndarray) -> None:
        # The index only after its features are safe.
        for name, array in ((FEATURES_FILE, values), (INDEX_FILE, index)):
            _append(self._files[name], array)
            self._digests[name].update(_bytes_of(array))

    def checksums(self) -> dict[str, str]:
        """Returns the checksum of each file."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def require_rows(rows: int, split: SampleSplit) -> None:
    """Raises DataError if none of a split's samples could be read."""
    if rows == 0 and len(split) > 0:
        raise DataError(
            f"None of the {len(split)} {split.kind} of {split.name!r} can be read; "
            f"the first, {split.ids[0]!r}: {split.read_error(0)}."
        )


def _require_unreadable(
    work: FeaturePass, stretch: range, index: Sequence[int] | np.ndarray
) -> None:
    """Raises OSError if a sample that a pass has left out can be read after all."""
    # A disk that failed for a moment must not cost a sample for good.
    split = work.split
    for left_out in np.setdiff1d(stretch, index).tolist():
        if split.read_error(left_out) is not None:
            continue
        if any(True for _ in work.inputs(left_out, left_out + 1)):
            raise OSError(
                errno.EIO,
                f"Could not be read for the features of {split.name}, and could on a "
                "second try. See to the disk that it is on, and run the same command "
                "again: it goes on from here",
                str(split.ids[left_out]),
            )


def _kept_as(precision: str, values: np.ndarray) -> np.ndarray:
    """Returns float32 features in the precision of the file."""
    if precision == "float32":
        return values
    largest = np.abs(values).max(initial=0.0, where=np.isfinite(values))
    if largest > np.finfo(precision).max:
        raise DataError(
            f"This base has a feature of {largest:.3g}, which float16 cannot hold. "
            "Keep its features in float32: leave out `--feature-precision`."
        )
    return values.astype(precision)


def _append(file: Any, values: np.ndarray) -> None:
    rest = _bytes_of(values)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:  # Which says nothing of the file.
        raise OSError(error.errno, error.strerror, file.name) from error


def _bytes_of(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).data.cast("B")


def _digest_of(path: Path) -> Any:
    """Returns the digest of what a file has, to be gone on with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, CHECKSUM)


def _truncate_to_whole_batches(
    partial: Path, row_bytes: int, batch_size: int, first: int
) -> tuple[int, int]:
    """Drops what a killed run left half-written."""
    # Whole batches stay, so that all later ones hold the images that they would have
    # held: the last bits of a feature may depend on what it is computed together with.
    features_path, index_path = partial / FEATURES_FILE, partial / INDEX_FILE
    for path in (features_path, index_path):
        path.touch()
    rows = min(
        index_path.stat().st_size // 8, features_path.stat().st_size // row_bytes
    )
    rows -= rows % batch_size
    os.truncate(index_path, 8 * rows)
    os.truncate(features_path, row_bytes * rows)
    if rows == 0:
        return 0, first
    return rows, int(np.fromfile(index_path, dtype=np.int64)[-1]) + 1
