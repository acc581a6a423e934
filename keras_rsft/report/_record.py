"""Reads a run's folder. Computes nothing."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft import _storage
from keras_rsft._storage import read_csv
from keras_rsft.config import takes_texts
from keras_rsft.errors import DataError, InvalidArgument

TRIALS_FILE, HEAT_MAP_FILE = "trials.csv", "heatmap.svg"
PARALLEL_COORDINATES_FILE = "parallel_coordinates.svg"
_NUMBERS = ("predicted_probability", "loss_mean", "loss_last", "suspicion")
_COUNTS = ("seen", "accepted", "rejected")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """The ledger, one entry a training sample."""

    ids: list[str]
    given: np.ndarray
    predicted: np.ndarray
    clean: np.ndarray
    numbers: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


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
    acceptance: np.ndarray | None
    pairs: tuple[tuple[str, str, float], ...]
    split_sizes: dict[str, int]
    trials: tuple[dict[str, str], ...]

    @property
    def is_search(self) -> bool:
        """Whether this is the folder of a search."""
        return self.samples is None

    @property
    def ledger(self) -> Samples:
        """The samples of a run."""
        if self.samples is None:
            raise InvalidArgument(f"{self.folder} is a search and has no ledger.")
        return self.samples

    @functools.cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that tell this run from others."""
        digest = hashlib.sha256(json.dumps(self.config, default=str).encode())
        for name in (_storage.LEDGER_FILE, _storage.RESULTS_FILE):
            path = self.folder / name
            digest.update(path.read_bytes() if path.exists() else b"")
        return digest.hexdigest()[:16]

    @functools.cached_property
    def thumbnail_places(self) -> dict[str, tuple[int, int]]:
        """Offset and length in bytes of each sample's thumbnail, by id."""
        rows = _rows(self.folder / _storage.THUMBNAILS_INDEX_FILE)
        return {row["id"]: (int(row["offset"]), int(row["bytes"])) for row in rows}

    def thumbnail(self, sample_id: str) -> bytes | None:
        """Returns a JPEG file, or None where the image has none."""
        place = self.thumbnail_places.get(sample_id)
        if place is None:
            return None
        with (self.folder / _storage.THUMBNAILS_FILE).open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """The beginnings of the samples by id; empty where they are images."""
        path = self.folder / _storage.TEXTS_FILE
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return {str(row["id"]): str(row["text"]) for row in rows}

    @property
    def kind(self) -> str:
        """What the samples are, in the plural: "images" or "texts"."""
        recorded = self.config
        if isinstance(recorded.get("data"), dict):  # A search has it one level deeper.
            recorded = recorded["data"].get("source", {})
        return "texts" if takes_texts(recorded.get("backbone") or "") else "images"

    @property
    def pictures(self) -> dict[str, bytes]:
        """The search's SVG files that are there: `heat_map`, `parallel_coordinates`."""
        files = {
            "heat_map": self.folder / HEAT_MAP_FILE,
            "parallel_coordinates": self.folder / PARALLEL_COORDINATES_FILE,
        }
        there = {name: path for name, path in files.items() if path.exists()}
        return {name: path.read_bytes() for name, path in there.items()}


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder, or the folder of a finished search."""
    has_ledger = (folder / _storage.LEDGER_FILE).is_file()
    is_search = (folder / _storage.SEARCH_FILE).is_file()
    if not (folder / _storage.RESULTS_FILE).is_file() or not (has_ledger or is_search):
        raise InvalidArgument(
            "Expected a run folder, as `keras-rsft fit` leaves it, with "
            f"{_storage.RESULTS_FILE} and {_storage.LEDGER_FILE}. Received: {folder}."
        )
    try:
        return _read(folder, is_search=not has_ledger)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"A file in {folder} is not as `keras-rsft` wrote it "
            f"({type(error).__name__}: {error}). Make the run again."
        ) from error


def _read(folder: Path, *, is_search: bool) -> RunRecord:
    config = _json(
        folder / (_storage.SEARCH_FILE if is_search else _storage.CONFIG_FILE)
    )
    classes = folder / _storage.CLASSES_FILE
    if is_search and not classes.exists():  # Every trial failed: there is no model.
        class_names = tuple(config["data"]["classes"])
    else:
        class_names = tuple(_json(classes))
    metrics = list(_rows(folder / _storage.METRICS_FILE))
    return RunRecord(
        folder=folder,
        class_names=class_names,
        config=config,
        results=_json(folder / _storage.RESULTS_FILE),
        metrics={
            name: [_number(row[name]) for row in metrics]
            for name in (metrics[0] if metrics else {})
        },
        samples=None if is_search else _samples(folder, class_names),
        losses=_losses(folder),
        acceptance=_acceptance(folder),
        pairs=tuple(
            (row["id"], row["other_id"], float(row["similarity"]))
            for row in _rows(folder / _storage.NEAR_DUPLICATES_FILE)
        ),
        split_sizes=_split_sizes(folder),
        trials=tuple(_rows(folder / TRIALS_FILE)),
    )


def _samples(folder: Path, class_names: tuple[str, ...]) -> Samples:
    place = {name: index for index, name in enumerate(class_names)} | {"": -1}
    rows = list(_rows(folder / _storage.LEDGER_FILE))

    def labels(column: str) -> np.ndarray:
        return np.array([place[row[column]] for row in rows], np.int32)

    return Samples(
        ids=[row["id"] for row in rows],
        given=labels("given_label"),
        predicted=labels("predicted_label"),
        clean=labels("clean_label"),
        numbers={
            name: np.array([_number(row[name]) for row in rows]) for name in _NUMBERS
        },
        counts={
            name: np.array([int(row[name]) for row in rows], np.int64)
            for name in _COUNTS
        },
    )


def _losses(folder: Path) -> tuple[EpochLosses, ...]:
    bins: dict[int, list[tuple[float, float, int, int]]] = {}
    thresholds: dict[int, float | None] = {}
    for row in _rows(folder / _storage.HISTOGRAMS_FILE):
        epoch = int(row["epoch"])
        counts = (int(row["accepted"]), int(row["rejected"]))
        one = (float(row["low"]), float(row["high"]), *counts)
        bins.setdefault(epoch, []).append(one)
        thresholds[epoch] = float(row["threshold"]) if row["threshold"] else None
    return tuple(
        EpochLosses(epoch, thresholds[epoch], tuple(bins[epoch]))
        for epoch in sorted(bins)
    )


def _acceptance(folder: Path) -> np.ndarray | None:
    path = folder / _storage.ACCEPTANCE_FILE
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))  # By place: a class may be called "epoch".
    return np.array([_number(cell) for cell in lines[-1][1:]])


def _split_sizes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for row in _rows(folder / _storage.SAMPLES_FILE):
        sizes[row["split"]] = sizes.get(row["split"], 0) + 1
    return sizes


def _rows(path: Path) -> Iterator[dict[str, str]]:
    return read_csv(path) if path.exists() else iter(())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan
