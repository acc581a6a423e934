"""Reads a run's folder. Computes nothing."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft import _storage
from keras_rsft.config import IMAGES, TEXTS, takes_texts
from keras_rsft.errors import InvalidArgument

TRIALS_FILE, HEAT_MAP_FILE = "trials.csv", "heatmap.svg"
PARALLEL_COORDINATES_FILE = "parallel_coordinates.svg"


# Of one small picture.
_MOST_BYTES = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """The ledger, one entry per sample; an unknown label is -1."""

    ids: list[str]
    split: list[str]
    given: np.ndarray
    predicted: np.ndarray
    clean: np.ndarray
    probability: np.ndarray
    suspicion: np.ndarray
    right_probability: np.ndarray
    looks_wrong: np.ndarray
    loss: np.ndarray
    seen: np.ndarray
    rejected: np.ndarray
    # Whether a person has confirmed or corrected the label.
    reviewed: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpochLosses:
    """The histogram of one epoch: `(low, high, accepted, rejected)` for each bin."""

    epoch: int
    threshold: float | None
    bins: tuple[tuple[float, float, int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """A run folder or the folder of a search, as far as it has been written."""

    folder: Path
    class_names: tuple[str, ...]
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, list[float]]
    samples: Samples | None
    losses: tuple[EpochLosses, ...]
    acceptance: np.ndarray
    pairs: tuple[tuple[str, str, float], ...]
    split_sizes: dict[str, int]
    trials: tuple[dict[str, str], ...]

    @property
    def is_search(self) -> bool:
        return self.samples is None

    @property
    def is_audit(self) -> bool:
        """Whether labels were audited, and nothing was trained."""
        return not (self.is_search or self.metrics)

    @property
    def ledger(self) -> Samples:
        if self.samples is None:
            raise InvalidArgument(f"{self.folder} is a search and has no ledger.")
        return self.samples

    @functools.cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that tell this run from others."""
        digest = hashlib.sha256(json.dumps(self.config, default=str).encode())
        for name in (_storage.LEDGER_FILE, _storage.RESULTS_FILE):
            path = self.folder / name
            digest.update(_storage.bytes_of(path) if path.exists() else b"")
        return digest.hexdigest()[:16]

    @functools.cached_property
    def thumbnail_index(self) -> dict[str, tuple[int, int]]:
        """Offset and length in bytes of each sample's thumbnail, by id."""
        return _pictures(self.folder / _storage.THUMBNAILS_INDEX_FILE)

    @functools.cached_property
    def preview_index(self) -> dict[str, tuple[int, int]]:
        """The same of the larger pictures, which the most suspicious ones have."""
        return _pictures(self.folder / _storage.PREVIEWS_INDEX_FILE)

    def thumbnail(self, sample_id: str) -> bytes | None:
        """Returns a JPEG file, or None where the image has none."""
        path = self.folder / _storage.THUMBNAILS_FILE
        return _cut(path, self.thumbnail_index.get(sample_id))

    def preview(self, sample_id: str) -> bytes | None:
        """Returns a JPEG file, uncropped, or None where the image has none."""
        path = self.folder / _storage.PREVIEWS_FILE
        return _cut(path, self.preview_index.get(sample_id))

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """The beginnings of the samples by id; empty where they are images."""
        path = self.folder / _storage.TEXTS_FILE
        if not path.is_file():
            return {}
        with _storage.text_of(path) as lines:
            rows = map(json.loads, lines)
            return {str(row["id"]): str(row["text"]) for row in rows}

    @property
    def kind(self) -> str:
        """What the samples are, in the plural: "images" or "texts"."""
        recorded = self.config
        if isinstance(recorded.get("data"), list):  # A search has it one level deeper.
            recorded = next((one for one in recorded["data"][:1] if one), {})
        return TEXTS if takes_texts(recorded.get("backbone") or "") else IMAGES

    @property
    def pictures(self) -> dict[str, bytes]:
        """The search's SVG files that exist: `heatmap`, `parallel_coordinates`."""
        names = (HEAT_MAP_FILE, PARALLEL_COORDINATES_FILE)
        paths = (self.folder / name for name in names)
        return {path.stem: _storage.bytes_of(path) for path in paths if path.exists()}


def read_run(folder: Path) -> RunRecord:
    has_ledger = (folder / _storage.LEDGER_FILE).is_file()
    is_search = (folder / _storage.SEARCH_FILE).is_file()
    if not (folder / _storage.RESULTS_FILE).is_file() or not (has_ledger or is_search):
        raise InvalidArgument(
            "Expected a run folder, as `keras-rsft fit` leaves it, with "
            f"{_storage.RESULTS_FILE} and {_storage.LEDGER_FILE}. Received: {folder}."
        )
    is_search = not has_ledger
    path = folder / (_storage.SEARCH_FILE if is_search else _storage.CONFIG_FILE)
    config = _storage.json_of(path, dict)
    if is_search and not (folder / _storage.CLASSES_FILE).exists():
        with _storage.understood(path):
            class_names = tuple(config["data"][1])  # All trials failed: no model.
    else:
        class_names = _storage.read_class_names(folder)
    with _rows(folder / _storage.METRICS_FILE) as rows:
        metrics = {
            name: [_number(row[name]) for row in rows]
            for name in (rows[0] if rows else {})
        }
    losses = []
    with _rows(folder / _storage.HISTOGRAMS_FILE) as bins:
        for epoch, group in itertools.groupby(bins, lambda row: int(row["epoch"])):
            counted = []
            for row in group:
                limit = _number(row["threshold"])
                edges = _finite(row["low"]), _finite(row["high"])
                counted.append((*edges, int(row["accepted"]), int(row["rejected"])))
            known = None if math.isnan(limit) else limit
            losses.append(EpochLosses(epoch, known, tuple(counted)))
    with _rows(folder / _storage.SAMPLES_FILE) as listed:
        reviewed = {row["id"] for row in listed if row.get("decision")}
        split_sizes = collections.Counter(row["split"] for row in listed)
    acceptance, path = np.array([]), folder / _storage.ACCEPTANCE_FILE
    if path.exists():
        with _storage.text_of(path) as file:
            *_, last = csv.reader(file)  # By position: a class may be called "epoch".
            acceptance = np.array([_number(cell) for cell in last[1:]])
    with _rows(folder / _storage.NEAR_DUPLICATES_FILE) as rows:
        pairs = tuple(
            (row["id"], row["other_id"], _finite(row["similarity"])) for row in rows
        )
    with _rows(folder / TRIALS_FILE) as rows:
        trials = tuple(rows)
    return RunRecord(
        folder=folder,
        class_names=class_names,
        config=config,
        results=_storage.json_of(folder / _storage.RESULTS_FILE, dict),
        metrics=metrics,
        samples=None if is_search else _samples(folder, class_names, reviewed),
        losses=tuple(losses),
        acceptance=acceptance,
        pairs=pairs,
        split_sizes=split_sizes,
        trials=trials,
    )


def _samples(folder: Path, class_names: tuple[str, ...], reviewed: set[str]) -> Samples:
    with _rows(folder / _storage.LEDGER_FILE) as rows:
        return _samples_in(rows, class_names, reviewed)


def _samples_in(
    rows: list[dict[str, str]], class_names: tuple[str, ...], reviewed: set[str]
) -> Samples:
    positions = {name: index for index, name in enumerate(class_names)} | {"": -1}

    def labels(column: str) -> np.ndarray:
        return np.array([positions[row[column]] for row in rows], np.int32)

    def numbers(column: str) -> np.ndarray:
        return np.array([_number(row.get(column) or "") for row in rows])

    return Samples(
        ids=[row["id"] for row in rows],
        split=[row["split"] for row in rows],
        given=labels("given_label"),
        predicted=labels("predicted_label"),
        clean=labels("clean_label"),
        probability=numbers("predicted_probability"),
        suspicion=numbers("suspicion"),
        right_probability=numbers("right_probability"),
        looks_wrong=numbers("looks_wrong") == 1,
        loss=numbers("loss_mean"),
        seen=numbers("seen").astype(np.int64),
        rejected=numbers("rejected").astype(np.int64),
        reviewed=np.array([row["id"] in reviewed for row in rows], bool),
    )


def _pictures(index: Path) -> dict[str, tuple[int, int]]:
    with _rows(index) as rows:
        places = {row["id"]: (int(row["offset"]), int(row["bytes"])) for row in rows}
        if any(min(place) < 0 or place[1] > _MOST_BYTES for place in places.values()):
            raise ValueError("a picture in no place")
        return places


def _cut(path: Path, place: tuple[int, int] | None) -> bytes | None:
    """Returns the bytes at an offset and of a length."""
    if place is None:
        return None
    offset, length = place
    with _storage.open_regular(path) as file:
        file.seek(offset)
        return file.read(length)


@contextlib.contextmanager
def _rows(path: Path) -> Iterator[list[dict[str, str]]]:
    """Gives a table's rows; what is wrong with them is said of this file."""
    with _storage.understood(path):
        yield list(_storage.read_csv(path)) if path.exists() else []


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _finite(cell: str) -> float:
    if not math.isfinite(number := float(cell)):
        raise ValueError(f"a number must be finite, not {cell}")
    return number
