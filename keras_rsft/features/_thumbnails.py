"""Small pictures and text excerpts of a split, for its report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft import _storage
from keras_rsft._progress import progress_bar
from keras_rsft.data._images import shrunk_jpeg, without_autotuning
from keras_rsft.data._samples import ImageSplit, SampleSplit
from keras_rsft.data._sources import TextSplit
from keras_rsft.errors import DataError
from keras_rsft.features._extract import default_cache_dir

SIZE = 96
QUALITY = 75
MAX_THUMBNAILS = 100_000
# What a page can hold beside the thumbnails.
MAX_PREVIEWS, PREVIEW_SIDE = 250, 320
_FORMAT_VERSION = 1
_BATCH = 64


def write_thumbnails(
    splits: Sequence[ImageSplit],
    suspicion: dict[str, float],
    folder: Path,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Puts a pack of thumbnails into a folder; cached ones if there are any."""
    if sum(map(len, splits)) > MAX_THUMBNAILS:
        chosen = most_suspicious(splits, suspicion, MAX_THUMBNAILS)
        pairs = zip(splits, chosen, strict=True)
        _render([split.take(rows) for split, rows in pairs], folder, progress)
        return
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    # Those that were cached before a review serve still.
    whole: list[Any] = [split.before_review or split for split in splits]
    described = [_FORMAT_VERSION, SIZE, QUALITY, *(one.fingerprint for one in whole)]
    encoded = json.dumps(described).encode()
    pack = root / f"thumbnails-{hashlib.blake2b(encoded, digest_size=16).hexdigest()}"
    with _storage.locked(f"{pack}.lock"):
        if not pack.exists():
            for left in root.glob(f".{pack.name}-*"):  # By one that was killed.
                shutil.rmtree(left, ignore_errors=True)
            with _storage.written_whole(pack) as partial:
                _render(whole, partial, progress)
    for name in (_storage.THUMBNAILS_FILE, _storage.THUMBNAILS_INDEX_FILE):
        with _storage.open_regular(pack / name) as file:
            try:
                os.link(pack / name, folder / name)  # No second copy on the same disk.
            except OSError:
                (folder / name).write_bytes(file.read())


def write_previews(
    splits: Sequence[ImageSplit],
    suspicion: dict[str, float],
    folder: Path,
    *,
    progress: bool = True,
) -> None:
    """Puts larger pictures of the most suspicious images into a folder, uncropped."""
    chosen = most_suspicious(splits, suspicion, MAX_PREVIEWS)

    def encoded(advance: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
        for split, indices in zip(splits, chosen, strict=True):
            files = split.take(indices).reader.all_encoded()
            for index, file_bytes in zip(indices.tolist(), files, strict=True):
                # Others are in unreadable.csv, or gone.
                with contextlib.suppress(tf.errors.OpError):
                    yield str(split.ids[index]), shrunk_jpeg(file_bytes, PREVIEW_SIDE)
                advance(1)

    with progress_bar(
        "Previews", total=sum(map(len, chosen)), unit="images", visible=progress
    ) as advance:
        _storage.write_pack(folder / _storage.PREVIEWS_FILE, encoded(advance))


def most_suspicious(
    splits: Sequence[SampleSplit], suspicion: dict[str, float], most: int
) -> list[np.ndarray]:
    """Returns of each split the positions of its share of the most suspicious."""
    values = [
        np.array([suspicion.get(str(one), -1.0) for one in split.ids])
        for split in splits
    ]
    order = np.argsort(-np.concatenate(values), kind="stable")
    taken = np.zeros(len(order), bool)
    taken[order[:most]] = True
    borders = np.cumsum([len(split) for split in splits])[:-1]
    return [np.flatnonzero(part) for part in np.split(taken, borders)]


def _render(splits: Sequence[ImageSplit], folder: Path, progress: bool) -> None:
    def encoded(advance: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
        for split in filter(len, splits):
            images = split.images(SIZE)
            images = images.map(_encode, num_parallel_calls=tf.data.AUTOTUNE)
            batches = without_autotuning(images.batch(_BATCH).prefetch(2))
            reached = 0
            for indices, files in batches.as_numpy_iterator():
                yield from zip(map(str, split.ids[indices]), files, strict=True)
                advance(int(indices[-1]) + 1 - reached)
                reached = int(indices[-1]) + 1

    with progress_bar(
        "Thumbnails", total=sum(map(len, splits)), unit="images", visible=progress
    ) as advance:
        _storage.write_pack(folder / _storage.THUMBNAILS_FILE, encoded(advance))


@tf.autograph.experimental.do_not_convert
def _encode(index: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    pixels = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    return index, tf.io.encode_jpeg(pixels, quality=QUALITY, optimize_size=True)


MAX_CHARACTERS = 600


def write_excerpts(
    splits: Sequence[TextSplit], suspicion: dict[str, float], folder: Path
) -> None:
    """Puts the beginnings of the texts that can be read into a folder."""
    chosen = most_suspicious(splits, suspicion, MAX_THUMBNAILS)
    with (folder / _storage.TEXTS_FILE).open("w", encoding="utf-8") as file:
        for split, rows in zip(splits, chosen, strict=True):
            for index in rows.tolist():
                try:
                    text = split.text(index)
                except (DataError, OSError):  # In unreadable.csv, or gone since.
                    continue
                line = {"id": str(split.ids[index]), "text": excerpt_of(text)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def excerpt_of(text: str) -> str:
    """Returns the beginning of a text, 600 characters at most, in one paragraph."""
    flat = " ".join(text[: 10 * MAX_CHARACTERS].split())
    if len(flat) <= MAX_CHARACTERS and len(text) <= 10 * MAX_CHARACTERS:
        return flat
    return f"{flat[: MAX_CHARACTERS - 1]}…"
