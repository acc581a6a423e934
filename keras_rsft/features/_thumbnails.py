"""Small pictures and text excerpts of a split, for its report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_rsft import _storage
from keras_rsft._progress import progress_bar
from keras_rsft.data._images import without_autotuning
from keras_rsft.data._samples import ImageSplit, SampleSplit
from keras_rsft.data._sources import TextSplit
from keras_rsft.errors import DataError
from keras_rsft.features._extract import default_cache_dir

SIZE = 96
QUALITY = 75
MAX_THUMBNAILS = 100_000
_FORMAT_VERSION = 1
_BATCH = 64


def write_thumbnails(
    split: ImageSplit,
    suspicion: dict[str, float],
    folder: Path,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Puts a pack of thumbnails into a folder; cached ones if there are any."""
    if len(split) > MAX_THUMBNAILS:
        chosen = most_suspicious(split, suspicion, MAX_THUMBNAILS)
        _render(split.take(chosen), folder, progress)
        return
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    if split.before_review is not None:
        split = split.before_review  # Those that were cached before serve still.
    described = [_FORMAT_VERSION, SIZE, QUALITY, split.fingerprint]
    encoded = json.dumps(described).encode()
    pack = root / f"thumbnails-{hashlib.blake2b(encoded, digest_size=16).hexdigest()}"
    with _storage.locked(f"{pack}.lock"):
        if not pack.exists():
            for left in root.glob(f".{pack.name}-*"):  # By one that was killed.
                shutil.rmtree(left, ignore_errors=True)
            with _storage.written_whole(pack) as partial:
                _render(split, partial, progress)
    for name in (_storage.THUMBNAILS_FILE, _storage.THUMBNAILS_INDEX_FILE):
        try:
            os.link(pack / name, folder / name)  # No second copy on the same disk.
        except OSError:
            shutil.copyfile(pack / name, folder / name)


def most_suspicious(
    split: SampleSplit, suspicion: dict[str, float], most: int
) -> np.ndarray:
    """Returns the positions of the most suspicious samples, in increasing order."""
    values = np.array([suspicion.get(str(one), -1.0) for one in split.ids])
    return np.sort(np.argsort(-values, kind="stable")[:most])


def _render(split: ImageSplit, folder: Path, progress: bool) -> None:
    images = split.images(SIZE).map(_encode, num_parallel_calls=tf.data.AUTOTUNE)
    batches = without_autotuning(images.batch(_BATCH).prefetch(2))
    rows = []
    offset = reached = 0
    with (
        (folder / _storage.THUMBNAILS_FILE).open("wb") as file,
        progress_bar(
            "Thumbnails", total=len(split), unit="images", visible=progress
        ) as advance,
    ):
        for indices, encoded in batches.as_numpy_iterator():
            for index, one in zip(indices, encoded, strict=True):
                file.write(one)
                rows.append((str(split.ids[index]), offset, len(one)))
                offset += len(one)
            advance(int(indices[-1]) + 1 - reached)
            reached = int(indices[-1]) + 1
    _storage.write_csv(
        folder / _storage.THUMBNAILS_INDEX_FILE, ("id", "offset", "bytes"), rows
    )


@tf.autograph.experimental.do_not_convert
def _encode(index: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    pixels = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    return index, tf.io.encode_jpeg(pixels, quality=QUALITY, optimize_size=True)


MAX_CHARACTERS = 600


def write_excerpts(split: TextSplit, suspicion: dict[str, float], folder: Path) -> None:
    """Puts the beginnings of the texts that can be read into a folder."""
    with (folder / _storage.TEXTS_FILE).open("w", encoding="utf-8") as file:
        for index in most_suspicious(split, suspicion, MAX_THUMBNAILS).tolist():
            try:
                text = split.text(index)
            except (DataError, OSError):  # It is in unreadable.csv, or gone since.
                continue
            line = {"id": str(split.ids[index]), "text": excerpt_of(text)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def excerpt_of(text: str) -> str:
    """Returns the beginning of a text, 600 characters at most, in one paragraph."""
    flat = " ".join(text[: 10 * MAX_CHARACTERS].split())
    if len(flat) <= MAX_CHARACTERS and len(text) <= 10 * MAX_CHARACTERS:
        return flat
    return f"{flat[: MAX_CHARACTERS - 1]}…"
