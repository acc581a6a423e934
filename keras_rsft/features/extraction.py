"""Runs the frozen base once over a split and keeps what comes out.

Owns the key under which features are kept, the append-only writing that makes
a killed run go on where it was, and the pass itself.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from filelock import FileLock

from keras_rsft.data import ImageSplit
from keras_rsft.errors import DataError
from keras_rsft.features.feature_set import (
    FEATURE_PRECISIONS,
    FEATURES_FILE,
    INDEX_FILE,
    META_FILE,
    FeatureSet,
    read_meta,
)
from keras_rsft.features.frozen_base import FrozenBase
from keras_rsft.policy_choice import require_known
from keras_rsft.progress import progress_bar

# Part of every key: raise it when decoding, resizing or the format changes.
FORMAT_VERSION = 1


def extract_features(
    backbone: keras.Model | FrozenBase,
    split: ImageSplit,
    *,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
    progress: bool = True,
) -> FeatureSet:
    """Returns the features of a split: kept ones, or those of one pass.

    The pass appends chunk after chunk to a file beside its final place and is
    renamed when it is complete. Interrupted at any moment, the next call goes
    on after the last whole chunk. Two processes that want the same features
    take turns. A split that images were dropped from is served by the features of
    the whole one.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], to features `(batch, dim)`; or a `FrozenBase` of one, which
            serves several splits faster.
        split: The images.
        cache_dir: Folder for kept features. Default: `keras_rsft/features` in
            the user's cache folder.
        batch_size: Images per step of the base, at least 1. Default 32.
        views: Views kept of each image, at least 1; view 0 is the plain image,
            the others are flipped and cropped at random. Default 1.
        seed: Seed of the random views. Default 0.
        feature_precision: How features are kept: `"float32"`, the default, or
            `"float16"` for half the disk.
        progress: Show a progress bar. Default True.

    Returns:
        The features of all readable images, in the order of the split.

    Raises:
        InvalidArgument: If `feature_precision` is neither.
        DataError: If no image can be read, or a feature is too large for float16.
        OSError: If the disk has no room for the features.
    """
    if split.before_review is not None:
        before_review = extract_features(
            backbone,
            split.before_review,
            cache_dir=cache_dir,
            batch_size=batch_size,
            views=views,
            seed=seed,
            feature_precision=feature_precision,
            progress=progress,
        )
        return _left_over(before_review, split)
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    base = backbone
    if not isinstance(base, FrozenBase):
        base = FrozenBase(backbone, num_images=views * len(split))
    require_known("feature precision", feature_precision, FEATURE_PRECISIONS)
    key = feature_key(
        base, split, views=views, seed=seed, feature_precision=feature_precision
    )
    folder = root / key
    with FileLock(f"{folder}.lock"):
        if read_meta(folder) is None:
            _run_pass(
                base, split, folder, batch_size, views, seed, feature_precision,
                progress,
            )  # fmt: skip
    return _open(folder, split)


def is_kept(
    base: FrozenBase,
    split: ImageSplit,
    *,
    cache_dir: str | os.PathLike | None = None,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
) -> bool:
    """Says whether `extract_features` would find the features and run no pass."""
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    key = feature_key(
        base, split, views=views, seed=seed, feature_precision=feature_precision
    )
    return read_meta(root / key) is not None


def default_cache_dir() -> Path:
    """Returns the folder for kept features, by the rules of the platform."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(base) / "keras_rsft" / "features"


def feature_key(
    base: FrozenBase,
    split: ImageSplit,
    *,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
) -> str:
    """Names the features of these images under this base, with its weights.

    Depends on the architecture (with its preprocessing, image size and
    precision), on every weight, on the images, on the views and on how features are
    kept; not on labels, on layer names, nor on where the data lies.

    Returns:
        32 hexadecimal digits.
    """
    described = [
        FORMAT_VERSION,
        base.fingerprint,
        split.fingerprint,
        views,
        seed if views > 1 else None,
    ]
    if feature_precision != "float32":
        described.append(feature_precision)
    encoded = json.dumps(described).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _run_pass(
    base: FrozenBase,
    split: ImageSplit,
    folder: Path,
    batch_size: int,
    views: int,
    seed: int,
    feature_precision: str,
    progress: bool,
) -> None:
    row_bytes = np.dtype(feature_precision).itemsize * views * base.dim
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    rows, next_index = _truncate_to_whole_batches(partial, row_bytes, batch_size)
    _require_disk_space(partial, row_bytes * (len(split) - next_index))
    images = split.images(base.image_size, start=next_index, views=views, seed=seed)
    images = images.batch(batch_size).prefetch(2)
    label = f"Features of {split.name}"
    with (
        (partial / FEATURES_FILE).open("ab", buffering=0) as features_file,
        (partial / INDEX_FILE).open("ab", buffering=0) as index_file,
        progress_bar(
            label, total=len(split), unit="images", done=next_index, visible=progress
        ) as advance,
    ):
        views_in_a_row = (
            (index, tf.reshape(batch, (-1, *base.image_size, 3)))
            for index, batch in images
        )
        for index, values in base.over(views_in_a_row):
            _append(features_file, _kept_as(feature_precision, values))
            _append(index_file, index.numpy())  # Only after its features are safe.
            rows += len(index)
            reached = int(index[-1]) + 1
            advance(reached - next_index)
            next_index = reached
    if rows == 0 and len(split) > 0:
        raise DataError(
            f"None of the {len(split)} images of {split.name!r} can be read; "
            f"the first, {split.ids[0]!r}: {split.read_error(0)}."
        )
    meta = {"rows": rows, "views": views, "dim": base.dim}
    meta["precision"] = feature_precision
    (partial / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # Only ever a damaged one.
    partial.rename(folder)


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
    rest = np.ascontiguousarray(values).data.cast("B")
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:  # Which says nothing of the file.
        raise OSError(error.errno, error.strerror, file.name) from error


def _truncate_to_whole_batches(
    partial: Path, row_bytes: int, batch_size: int
) -> tuple[int, int]:
    """Drops what a killed run left half-written.

    Whole batches stay, so that all later ones hold the images that they would have
    held: the last bits of a feature may depend on what it is computed together with.

    Returns:
        The number of whole rows, and the index of the first sample after them.
    """
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
        return 0, 0
    return rows, int(np.fromfile(index_path, dtype=np.int64)[-1]) + 1


def _require_disk_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"The features need {needed / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB free. Choose another folder with `--cache-dir`",
            str(folder),
        )


def _open(folder: Path, split: ImageSplit) -> FeatureSet:
    meta = read_meta(folder)
    if meta is None:
        raise OSError(errno.EIO, "The kept features are damaged", str(folder))
    index = np.fromfile(folder / INDEX_FILE, dtype=np.int64)
    missing = np.setdiff1d(np.arange(len(split)), index)
    unreadable = tuple(
        (str(split.ids[i]), split.read_error(int(i)) or "unreadable") for i in missing
    )
    return FeatureSet(
        path=folder / FEATURES_FILE,
        labels=split.labels[index],
        ids=split.ids[index],
        dim=meta["dim"],
        views=meta["views"],
        clean_labels=None if split.clean_labels is None else split.clean_labels[index],
        unreadable=unreadable,
        precision=meta["precision"],
        reviewed=None if split.reviewed is None else split.reviewed[index],
    )


def _left_over(before_review: FeatureSet, split: ImageSplit) -> FeatureSet:
    """Returns what remains of a split's features, with the labels that it has now."""
    at = {sample_id: place for place, sample_id in enumerate(split.ids.tolist())}
    ids = before_review.ids.tolist()
    remains = np.array([sample_id in at for sample_id in ids], bool)
    index = np.array([at[sample_id] for sample_id in ids if sample_id in at], np.int64)
    return dataclasses.replace(
        before_review.take(np.flatnonzero(remains)),
        labels=split.labels[index],
        clean_labels=None if split.clean_labels is None else split.clean_labels[index],
        reviewed=None if split.reviewed is None else split.reviewed[index],
        before_review=before_review,
        unreadable=tuple(pair for pair in before_review.unreadable if pair[0] in at),
    )
