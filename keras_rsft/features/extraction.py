"""Runs the frozen base once over a split and keeps what comes out.

Owns the key under which features are kept, and that they are computed once. The pass
itself is `feature_pass.py`, one that several processes share `shared_pass.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from filelock import FileLock

from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.cluster import DEFAULT_PATIENCE
from keras_rsft.data import SampleSplit
from keras_rsft.features.feature_pass import FeaturePass, append_rows, require_rows
from keras_rsft.features.feature_set import (
    FEATURE_PRECISIONS,
    FEATURES_FILE,
    INDEX_FILE,
    META_FILE,
    FeatureSet,
    read_meta,
)
from keras_rsft.features.frozen_base import FrozenBase
from keras_rsft.features.share_joining import join_parts, publish
from keras_rsft.features.shares import Part, finished_parts
from keras_rsft.policy_choice import require_known
from keras_rsft.result_folder import write_json

# Part of every key: raise it when decoding, resizing, the format, or how a base is told
# from another changes.
FORMAT_VERSION = 2


def extract_features(
    backbone: keras.Model | FrozenBase,
    split: SampleSplit,
    *,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
    called: str = "Features",
    progress: bool = True,
) -> FeatureSet:
    """Returns the features of a split: kept ones, or those of one pass.

    The pass appends chunk after chunk to a file beside its final place and is
    renamed when it is complete. Interrupted at any moment, the next call goes
    on after the last whole chunk. Two processes that want the same features
    take turns, and shares that several processes have computed are put together. A
    split that images were dropped from is served by the features of the whole one.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], or texts `(batch,)`, to features `(batch, dim)`; or a
            `FrozenBase` of one, which serves several splits faster.
        split: The images, or texts.
        cache_dir: Folder for kept features. Default: `keras_rsft/features` in
            the user's cache folder.
        batch_size: Images per step of the base, at least 1. Default 32.
        views: Views kept of each image, at least 1; view 0 is the plain image,
            the others are flipped and cropped at random. Default 1.
        seed: Seed of the random views. Default 0.
        feature_precision: How features are kept: `"float32"`, the default, or
            `"float16"` for half the disk.
        called: What the progress bar calls them. Default "Features".
        progress: Show a progress bar. Default True.

    Returns:
        The features of all readable images, in the order of the split.

    Raises:
        InvalidArgument: If `feature_precision` is neither, or the base does not take
            such samples.
        DataError: If no image can be read, or a feature is too large for float16.
        OSError: If the disk has no room for the features, or a sample was left out
            that could be read on a second try; the same call goes on.
    """
    require_tensorflow_backend("`extract_features`")
    work = make_pass(
        backbone,
        split,
        cache_dir=cache_dir,
        batch_size=batch_size,
        views=views,
        seed=seed,
        feature_precision=feature_precision,
        called=called,
        progress=progress,
    )
    run_alone(work)
    return open_kept(work.folder, split)


def make_pass(
    backbone: keras.Model | FrozenBase,
    split: SampleSplit,
    *,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
    called: str = "Features",
    progress: bool = True,
) -> FeaturePass:
    """Says which pass `extract_features` with these arguments would make, if any."""
    while split.before_review is not None:
        split = split.before_review
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    base = backbone
    if not isinstance(base, FrozenBase):
        base = FrozenBase(backbone, num_images=views * len(split))
    require_known("feature precision", feature_precision, FEATURE_PRECISIONS)
    key = feature_key(
        base, split, views=views, seed=seed, feature_precision=feature_precision
    )
    return FeaturePass(
        base, split, root / key, batch_size, views, seed, feature_precision, called,
        progress,
    )  # fmt: skip


def default_cache_dir() -> Path:
    """Returns the folder for kept features, in `XDG_CACHE_HOME` if it is set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "keras_rsft" / "features"


def feature_key(
    base: FrozenBase,
    split: SampleSplit,
    *,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
) -> str:
    """Names the features of these images under this base, with its weights."""
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


def run_alone(work: FeaturePass) -> None:
    """Makes a pass, or what is left of it; where another process does, waits for it."""
    with FileLock(f"{work.folder}.lock"):
        if not work.is_done:
            _run_pass(work)


def _run_pass(work: FeaturePass) -> None:
    parts = finished_parts(work.folder, len(work.split))
    if parts is not None:  # Other processes have computed all of it.
        join_pass(work, parts, patience=DEFAULT_PATIENCE)
        return
    partial = work.folder.with_name(f"{work.folder.name}.partial")
    rows, _ = append_rows(work, partial, range(len(work.split)))
    require_rows(rows, work.split)
    write_json(partial / META_FILE, {"rows": rows, **work.meta})
    publish(partial, work.folder)


def join_pass(work: FeaturePass, parts: Sequence[Part], *, patience: float) -> None:
    """Makes one set of finished parts, as `join_parts` does."""
    require_rows(sum(part.rows for part in parts), work.split)
    join_parts(
        work.folder,
        parts,
        work.meta,
        name=work.split.name,
        patience=patience,
        progress=work.progress,
    )


def open_kept(folder: Path, split: SampleSplit) -> FeatureSet:
    """Returns the features in a finished folder, with the labels of the split."""
    if split.before_review is not None:
        return _left_over(open_kept(folder, split.before_review), split)
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


def _left_over(before_review: FeatureSet, split: SampleSplit) -> FeatureSet:
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
