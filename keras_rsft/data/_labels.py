"""Changes labels: noise added on purpose, corrections from a review."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._storage import plain_cell
from keras_rsft.config import SPLITS, nearest_name_hint, require_known
from keras_rsft.data._samples import (
    DECISIONS,
    Correction,
    Corrections,
    ImageSplit,
    SampleData,
)
from keras_rsft.data._sources import read_table
from keras_rsft.errors import DataError, InvalidArgument

# Noise --------------------------------------------------------------------------------

NOISE_KINDS = ("symmetric", "asymmetric", "instance")

THUMBNAIL_SIZE = 8
# Of a sample's own flip rate around the mean rate, as in the published code.
_RATE_DEVIATION = 0.1


def add_label_noise(
    data: SampleData, spec: str, *, seed: int, splits: tuple[str, ...] = ("train",)
) -> SampleData:
    """Gives a fraction of the samples a wrong label.

    Args:
        data: The data set.
        spec: "symmetric:RATE" moves round(RATE x n) labels of a split, chosen
            uniformly, each to any other class. "asymmetric:RATE" moves
            round(RATE x n) labels of each class to the next class, and those
            of the last class to the first. "instance:RATE" moves
            round(RATE x n) labels of a split, each to a class that its image
            decides: see `instance_noise`. RATE is in (0, 1).
        seed: Chooses the labels, in [0, 2**63). Each split is drawn by itself.
        splits: The names of the splits to change.

    Returns:
        The data set with these labels. The labels from before become the clean
        labels of every split, where none are known.

    Raises:
        InvalidArgument: If an argument is not as above.

    Example:
        >>> import keras_rsft as rsft
        >>> data = rsft.load_images("digits")
        >>> noisy = rsft.add_label_noise(data, "symmetric:0.3", seed=0)
        >>> round(float((noisy.train.labels != data.train.labels).mean()), 2)
        0.3
    """
    kind, rate = parse_noise(spec)
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise InvalidArgument(
            f"`seed` must be an integer in [0, 2**63). Received: seed={seed!r}."
        )
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise InvalidArgument(
            f"`splits` must be a tuple of names out of {SPLITS}. "
            f"Received: splits={splits!r}."
        )
    if kind == "instance" and data.kind != "images":
        raise InvalidArgument(
            f"Noise of the kind instance is made of images. Received: {data.kind}. "
            "Use symmetric or asymmetric."
        )
    changed: dict[str, Any] = {}
    for name in SPLITS:
        split = getattr(data, name)
        clean = split.labels if split.clean_labels is None else split.clean_labels
        if name not in splits:
            changed[name] = dataclasses.replace(split, clean_labels=clean)
            continue
        rng = np.random.default_rng([seed, SPLITS.index(name)])
        noise: Any = symmetric_noise if kind == "symmetric" else asymmetric_noise
        if kind == "instance":
            thumbnails = thumbnails_of(split)
            noise = functools.partial(instance_noise, thumbnails=thumbnails, seed=seed)
        labels = noise(split.labels, rate, num_classes=data.num_classes, rng=rng)
        changed[name] = split.with_labels(labels, clean)
    return dataclasses.replace(data, **changed)


def parse_noise(spec: str) -> tuple[str, float]:
    """Reads "symmetric:0.3", "asymmetric:0.3" or "instance:0.3"."""
    kind, _, text = str(spec).partition(":")
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if kind not in NOISE_KINDS or not 0 < rate < 1:
        raise InvalidArgument(
            'Label noise must be "symmetric:RATE" or "asymmetric:RATE" or '
            f'"instance:RATE" with RATE in (0, 1). Received: {spec!r}. '
            'Use "symmetric:0.3", for example.'
        )
    return kind, rate


def symmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    noisy = labels.copy()
    moved = rng.choice(len(labels), size=round(rate * len(labels)), replace=False)
    steps = rng.integers(1, num_classes, size=len(moved))
    noisy[moved] = (labels[moved] + steps) % num_classes
    return noisy


def asymmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    noisy = labels.copy()
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        moved = rng.choice(members, size=round(rate * len(members)), replace=False)
        noisy[moved] = (label + 1) % num_classes
    return noisy


def instance_noise(
    labels: np.ndarray,
    rate: float,
    *,
    num_classes: int,
    rng: np.random.Generator,
    thumbnails: np.ndarray,
    seed: int,
) -> np.ndarray:
    # Source: Xia et al., "Part-dependent label noise: towards instance-dependent label
    # noise", NeurIPS 2020, appendix. A sample's own flip rate comes from a normal
    # distribution around `rate` with deviation 0.1, cut to [0, 1]; its wrong class from
    # the softmax of its image times a random matrix of its class, without its own
    # class. Simplified: the image is one part, a thumbnail; and exactly round(rate x n)
    # samples move, drawn with their flip rates as weights, so that a measured rate is
    # the rate asked for.
    noisy = labels.copy()
    size = round(rate * len(labels))
    if size == 0:
        return noisy
    shape = (num_classes, thumbnails.shape[1], num_classes)
    matrices = np.random.default_rng([seed, len(SPLITS)]).normal(size=shape)
    rates = np.clip(rng.normal(rate, _RATE_DEVIATION, len(labels)), 1e-6, 1)
    moved = rng.choice(len(labels), size, replace=False, p=rates / rates.sum())
    # The largest of scores plus Gumbel noise is a draw from their softmax.
    draws = rng.gumbel(size=(size, num_classes))
    for sample, draw in zip(moved, draws, strict=True):
        scores = thumbnails[sample] @ matrices[labels[sample]] + draw
        scores[labels[sample]] = -np.inf
        noisy[sample] = np.argmax(scores)
    return noisy


def thumbnails_of(split: ImageSplit) -> np.ndarray:
    """Returns each image as 8 x 8 x 3 values with mean 0 and deviation 1."""
    thumbnails = np.zeros((len(split), THUMBNAIL_SIZE**2 * 3), np.float32)
    for index, image in split.images(THUMBNAIL_SIZE):
        values = image.numpy().reshape(-1)
        values -= values.mean()
        thumbnails[int(index)] = values / max(float(values.std()), 1e-6)
    return thumbnails


# Corrections --------------------------------------------------------------------------

COLUMNS = Correction._fields
# What stands in an empty cell of a table in memory.
_EMPTY = ("nan", "None", "<NA>")


def apply_corrections(data: SampleData, files: Any) -> SampleData:
    """Returns the data set with corrected labels and without the dropped images.

    Ids of all three splits may be corrected. Cached features stay in use, also for a
    split that images were dropped from. Images that were kept or relabelled count as
    `reviewed`: training trusts their labels.

    A file is CSV in UTF-8 with the columns `id`, `given_label`, `decision` and
    `new_label`, and a row for each decision. Decisions are `keep`, `relabel`, which
    alone has a `new_label`, and `drop`. A leading quote in front of `= + - @`, a tab,
    a carriage return or another quote, which keeps spreadsheets from running a cell,
    is taken off.

    Args:
        data: The data set, with the labels that were reviewed.
        files: One file, or several that are applied one after the other: the second
            corrects what the first one left, as a second review does. A DataFrame or
            a dict with these columns, or a list of `Correction` rows, counts as a file.

    Returns:
        A new data set; `corrections` says what was changed.

    Raises:
        InvalidArgument: If there is no such file.
        DataError: If a file is not as above or contradicts itself, an id or a label is
            not in the data, a given label is another one there, or a class would lose
            its last training image.
    """
    several = isinstance(files, Sequence) and not isinstance(files, str)
    if not several or any(isinstance(one, tuple) for one in files):
        files = [files]
    for file in files:
        data = _applied(data, file)
    return data


def read_corrections(source: Any) -> list[tuple[int, Correction]]:
    """Reads corrections with their lines; checks all that can be without data.

    They are a CSV file, a DataFrame, a dict of columns, or `Correction` rows.
    """
    file = name_of(source)
    rows: dict[str, tuple[int, Correction]] = {}
    for line, row in _rows_of(source):
        row = row._replace(decision=row.decision.strip().lower())
        where = f"{file}, line {line}"
        for name in ("id", "given_label"):
            if not getattr(row, name):
                raise DataError(f"{where} has no {name}.")
        if row.decision not in DECISIONS:
            raise DataError(
                f"{where}: the decision must be keep, relabel or drop. "
                f"Received: {row.decision!r}."
            )
        if row.decision == "relabel" and row.new_label in ("", row.given_label):
            raise DataError(
                f"{where}: relabel needs a new_label other than the given one. "
                f"Received: {row.new_label!r}. Use keep where the label is right."
            )
        if row.decision != "relabel" and row.new_label:
            raise DataError(
                f"{where}: {row.decision} has no new_label. "
                f"Received: {row.new_label!r}. Use relabel, or leave it empty."
            )
        first, _ = rows.setdefault(row.id, (line, row))
        if first != line:
            raise DataError(
                f"{file} decides twice about {row.id!r}: in lines {first} and {line}. "
                "Leave one of them."
            )
    return list(rows.values())


def name_of(source: Any) -> str:
    is_file = isinstance(source, (str, os.PathLike))
    return os.fspath(source) if is_file else "the corrections"


def _rows_of(source: Any) -> Iterator[tuple[int, Correction]]:
    if isinstance(source, (str, os.PathLike)):
        file = Path(source).expanduser()
        if not file.is_file():
            state = "a folder" if file.is_dir() else "no such file"
            raise InvalidArgument(
                f"Expected a CSV file of corrections. Received: {file} ({state})."
            )
        for line, cells in read_table(file, COLUMNS):
            yield line, Correction(*(plain_cell(cells[name]) for name in COLUMNS))
        return
    rows = source if isinstance(source, Iterable) else [source]
    if isinstance(source, Mapping) or hasattr(source, "columns"):
        known = list(source if isinstance(source, Mapping) else source.columns)
        if missing := [name for name in COLUMNS if name not in known]:
            raise DataError(
                f"The corrections have no column {', '.join(map(repr, missing))}. "
                f"They have: {', '.join(map(repr, known)) or 'none'}."
            )
        rows = zip(*(source[name] for name in COLUMNS), strict=True)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, tuple) or len(row) != len(COLUMNS):
            raise InvalidArgument(
                "Expected corrections as a CSV file, a DataFrame or dict with the "
                f"columns {', '.join(COLUMNS)}, or `Correction` rows. "
                f"Received: {row!r}."
            )
        yield number, Correction(*map(_text_of, row))


def _text_of(cell: Any) -> str:
    """Returns a cell of a table in memory; pandas has 3.0 for 3 beside empty cells."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell)
    return "" if not isinstance(cell, str) and text in _EMPTY else text


def match_corrections(
    rows: Sequence[tuple[int, Correction]],
    splits: Mapping[str, Any],
    class_names: Sequence[str],
    file: str,
    source: str,
) -> dict[str, list[tuple[int, Correction]]]:
    """Returns the corrections of each split with their positions in it."""
    position_of = {
        str(sample_id): (name, position)
        for name, split in splits.items()
        for position, sample_id in enumerate(split.ids.tolist())
    }
    unknown = [(line, row.id) for line, row in rows if row.id not in position_of]
    if unknown:
        line, sample_id = unknown[0]
        raise DataError(
            f"{len(unknown)} of {len(rows)} ids in {file} are not in {source}, "
            f"such as {sample_id!r} in line {line}. Ids there look like "
            f"{next(iter(position_of))!r}. Corrections belong to the data that were "
            "reviewed; an image that was dropped before is no longer in it."
        )
    by_split: dict[str, list[tuple[int, Correction]]] = {name: [] for name in splits}
    for line, row in rows:
        if row.decision == "relabel" and row.new_label not in class_names:
            hint = nearest_name_hint(row.new_label, class_names)
            known = ", ".join(map(repr, class_names[:10]))
            raise DataError(
                f"{file}, line {line}: {row.new_label!r} is not a class of "
                f"{source}.{hint or f' It has: {known}.'}"
            )
        split, position = position_of[row.id]
        label = class_names[splits[split].labels[position]]
        if label != row.given_label:
            raise DataError(
                f"{file}, line {line}: the label of {row.id!r} was "
                f"{row.given_label!r} when it was reviewed and is {label!r} now. "
                "Review the labels as they are, with the same --noise and --seed."
            )
        by_split[split].append((position, row))
    return by_split


def _applied(data: SampleData, source: Any) -> SampleData:
    file, rows = name_of(source), read_corrections(source)
    splits = {name: getattr(data, name) for name in SPLITS}
    by_split = match_corrections(rows, splits, data.class_names, file, data.source)
    changed: dict[str, Any] = {
        name: corrected_split(splits[name], pairs, data.class_names)
        for name, pairs in by_split.items()
        if pairs
    }
    before = data.corrections or Corrections()
    # One row for each image. The given label stays the one that the data were loaded
    # with, so that the result is a file of corrections in its own right.
    merged = {row.id: row for row in before.rows}
    for _, row in rows:
        loaded = merged.get(row.id, row).given_label
        label = row.new_label or row.given_label
        if row.decision == "drop" or label == loaded:
            decision = "drop" if row.decision == "drop" else "keep"
            merged[row.id] = Correction(row.id, loaded, decision)
        else:
            merged[row.id] = Correction(row.id, loaded, "relabel", label)
    is_file = isinstance(source, (str, os.PathLike))
    content = Path(source).expanduser().read_bytes() if is_file else repr(rows).encode()
    changed["corrections"] = Corrections(
        tuple(merged.values()),
        (*before.files, (file, hashlib.sha256(content).hexdigest())),
        before.tested + len(by_split["test"]),
    )
    corrected = dataclasses.replace(data, **changed)
    emptied = np.setdiff1d(data.train.labels, corrected.train.labels)
    if len(emptied):
        names = ", ".join(repr(data.class_names[label]) for label in emptied[:10])
        raise DataError(
            f"{file} would leave no training image of {names}. Keep at least one, or "
            "leave the class out of the data."
        )
    return corrected


def corrected_split(
    split: Any, pairs: Sequence[tuple[int, Correction]], class_names: Sequence[str]
) -> Any:
    """Returns a split of samples, or their features, with corrected labels."""
    labels, remains = split.labels.copy(), np.ones(len(split), bool)
    reviewed = np.zeros(len(split), bool)
    if split.reviewed is not None:
        reviewed |= split.reviewed
    for position, row in pairs:
        reviewed[position] = True
        remains[position] = row.decision != "drop"
        if row.decision == "relabel":
            labels[position] = class_names.index(row.new_label)
    corrected = dataclasses.replace(split, labels=labels, reviewed=reviewed)
    return dataclasses.replace(
        corrected.take(np.flatnonzero(remains)),
        before_review=split if split.before_review is None else split.before_review,
    )


# Clean splits -------------------------------------------------------------------------


def trust_splits(data: SampleData, splits: Sequence[str]) -> SampleData:
    """Returns the data set with the labels of some splits taken as right.

    They count as if a person had confirmed each of them: no policy rejects such a
    sample, none looks wrong, and an accuracy by them is one by right labels.

    Args:
        data: The data set.
        splits: Names out of `"train"`, `"validation"` and `"test"`.

    Returns:
        A new data set.

    Raises:
        InvalidArgument: If there is no split of that name.
        DataError: If a split has no sample, or its right labels are known and differ.

    Example:
        >>> import keras_rsft as rsft
        >>> data = rsft.trust_splits(rsft.load_images("digits"), ["test"])
        >>> bool(data.test.reviewed.all()), data.train.reviewed is None
        (True, True)
    """
    changed: dict[str, Any] = {}
    for name in splits:
        require_known("split", name, SPLITS)
        split = getattr(data, name)
        if not len(split):
            raise DataError(
                f"The {name} split of {data.source} is to be taken as clean, but has "
                "no sample. Leave it out, or hold some samples out."
            )
        if split.clean_labels is not None:
            wrong = int((split.labels != split.clean_labels).sum())
            if wrong:
                raise DataError(
                    f"The {name} split of {data.source} is to be taken as clean, but "
                    f"{wrong} of its {len(split)} labels are known to be wrong. Leave "
                    "it out, or correct them first."
                )
        changed[name] = dataclasses.replace(
            split, clean_labels=split.labels, reviewed=np.ones(len(split), bool)
        )
    return dataclasses.replace(data, **changed)
