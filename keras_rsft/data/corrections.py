"""Applies what a person decided about labels: keep, relabel, drop.

Reads `corrections.csv`, checks every row against the data, and changes the labels of
the splits; the user's files stay as they are. A file is applied as a whole or refused.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._storage import plain_cell
from keras_rsft.data.partition import SPLITS
from keras_rsft.data.samples import SampleData, SampleSplit
from keras_rsft.errors import DataError, InvalidArgument

KEEP, RELABEL, DROP = DECISIONS = ("keep", "relabel", "drop")
COLUMNS = ("id", "given_label", "decision", "new_label")


@dataclasses.dataclass(frozen=True, slots=True)
class Correction:
    """What was decided about one image."""

    id: str
    given_label: str
    decision: str
    new_label: str = ""


@dataclasses.dataclass(frozen=True)
class Corrections:
    """All that was corrected in a data set, against its labels as they were loaded.

    Attributes:
        rows: One for each image, in the order of the files.
        files: `(path, SHA-256)` of each file, in the order in which they were applied.
        tested: How many of the images are in the test split.
    """

    rows: tuple[Correction, ...]
    files: tuple[tuple[str, str], ...]
    tested: int = 0

    def count(self, decision: str) -> int:
        """Returns how many images one of `DECISIONS` was made about."""
        return sum(row.decision == decision for row in self.rows)

    def describe(self) -> str:
        """Says in one line, or two, what was changed."""
        text = (
            f"Corrections: {self.count(KEEP)} labels kept, {self.count(RELABEL)} "
            f"relabelled, {self.count(DROP)} samples dropped."
        )
        if self.tested:
            text += (
                f"\n{self.tested} of these samples are in the test split: its accuracy "
                "cannot be compared with one from before."
            )
        return text

    def record(self) -> dict[str, Any]:
        """Returns the files and the counts, as JSON can hold them."""
        files = [{"path": path, "sha256": digest} for path, digest in self.files]
        return {"files": files} | {name: self.count(name) for name in DECISIONS}


def apply_corrections(
    data: SampleData, files: str | os.PathLike | Sequence[str | os.PathLike]
) -> SampleData:
    """Returns the data set with corrected labels and without the dropped images.

    Ids of all three splits may be corrected. Features that were kept of the images
    stay in use, also for a split that images were dropped from. Images that were kept
    or relabelled count as `reviewed`: training trusts their labels.

    A file is CSV in UTF-8 with the columns `id`, `given_label`, `decision` and
    `new_label`, and a row for each decision. Decisions are `keep`, `relabel`, which
    alone has a `new_label`, and `drop`. A leading quote in front of `= + - @`, a tab,
    a carriage return or another quote, which keeps spreadsheets from running a cell,
    is taken off.

    Args:
        data: The data set, with the labels that were reviewed.
        files: One file, or several that are applied one after the other: the second
            corrects what the first one left, as a second review does.

    Returns:
        A new data set; `corrections` says what was changed.

    Raises:
        InvalidArgument: If there is no such file.
        DataError: If a file is not as above or contradicts itself, an id or a label is
            not in the data, a given label is another one there, or a class would lose
            its last training image.
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    for file in files:
        data = _applied(data, Path(file))
    return data


def read_corrections(file: str | os.PathLike) -> tuple[Correction, ...]:
    """Reads a file of corrections and checks all that can be checked without data."""
    return tuple(row for _, row in _numbered_rows(Path(file)))


def correction_cells(rows: Iterable[Correction]) -> list[list[str]]:
    """Returns the cells of corrections, in the order of `COLUMNS`."""
    return [[row.id, row.given_label, row.decision, row.new_label] for row in rows]


def _numbered_rows(file: Path) -> list[tuple[int, Correction]]:
    if not file.is_file():
        state = "a folder" if file.is_dir() else "no such file"
        raise InvalidArgument(
            f"Expected a CSV file of corrections. Received: {file} ({state})."
        )
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            _require_columns(reader.fieldnames, file)
            rows = [(reader.line_num, _row(raw, reader.line_num)) for raw in reader]
    except _RowError as error:
        raise DataError(f"{file}, {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Expected {file} to be a comma-separated table in UTF-8. "
            f"Received: {error}. Save it again as CSV (UTF-8)."
        ) from error
    if not rows:
        raise DataError(f"{file} has a header and no decision below it.")
    line_of: dict[str, int] = {}
    for line, row in rows:
        first = line_of.setdefault(row.id, line)
        if first != line:
            raise DataError(
                f"{file} decides twice about {row.id!r}: in lines {first} and {line}. "
                "Leave one of them."
            )
    return rows


def _require_columns(found: Sequence[str] | None, file: Path) -> None:
    if not found:
        raise DataError(f"{file} is empty. Expected the header {','.join(COLUMNS)}.")
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(map(repr, missing))}. Expected the "
            f"header {','.join(COLUMNS)}. Received: {','.join(found)[:200]!r}."
        )


class _RowError(ValueError):
    """A row that cannot be used; the message starts with its line."""


def _row(raw: dict[str | None, Any], line: int) -> Correction:
    if None in raw:
        raise _RowError(
            f"line {line} has more cells than the header. Put quotes around a cell "
            "with a comma in it."
        )
    cells = [plain_cell(raw[name] or "") for name in COLUMNS]
    row = Correction(cells[0], cells[1], cells[2].strip().lower(), cells[3])
    for name in ("id", "given_label"):
        if not getattr(row, name):
            raise _RowError(f"line {line} has no {name}.")
    if row.decision not in DECISIONS:
        raise _RowError(
            f"line {line}: the decision must be {KEEP}, {RELABEL} or {DROP}. "
            f"Received: {raw['decision']!r}."
        )
    if row.decision == RELABEL and row.new_label in ("", row.given_label):
        raise _RowError(
            f"line {line}: {RELABEL} needs a new_label other than the given one. "
            f"Received: {row.new_label!r}. Use {KEEP} where the label is right."
        )
    if row.decision != RELABEL and row.new_label:
        raise _RowError(
            f"line {line}: {row.decision} has no new_label. "
            f"Received: {row.new_label!r}. Use {RELABEL}, or leave it empty."
        )
    return row


def _applied(data: SampleData, file: Path) -> SampleData:
    rows = _numbered_rows(file)
    places = {
        sample_id: (name, at)
        for name in SPLITS
        for at, sample_id in enumerate(getattr(data, name).ids.tolist())
    }
    _check_against(data, rows, places, file)
    number = {name: label for label, name in enumerate(data.class_names)}
    by_split: dict[str, list[tuple[int, Correction]]] = {name: [] for name in SPLITS}
    for _, row in rows:
        split, at = places[row.id]
        by_split[split].append((at, row))
    changed = {
        name: _corrected(getattr(data, name), pairs, number)
        for name, pairs in by_split.items()
        if pairs
    }
    corrected = dataclasses.replace(data, **changed)
    emptied = np.setdiff1d(data.train.labels, corrected.train.labels)
    if len(emptied):
        names = ", ".join(repr(data.class_names[label]) for label in emptied[:10])
        raise DataError(
            f"{file} would leave no training image of {names}. Keep at least one, or "
            "leave the class out of the data."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    merged = _merged(data.corrections, [row for _, row in rows])
    files = () if data.corrections is None else data.corrections.files
    tested = 0 if data.corrections is None else data.corrections.tested
    record = Corrections(
        merged, (*files, (str(file), digest)), tested + len(by_split["test"])
    )
    return dataclasses.replace(corrected, corrections=record)


def _check_against(
    data: SampleData,
    rows: Sequence[tuple[int, Correction]],
    places: dict[str, tuple[str, int]],
    file: Path,
) -> None:
    unknown = [(line, row.id) for line, row in rows if row.id not in places]
    if unknown:
        line, sample_id = unknown[0]
        raise DataError(
            f"{len(unknown)} of {len(rows)} ids in {file} are not in {data.source}, "
            f"such as {sample_id!r} in line {line}. Ids there look like "
            f"{next(iter(places))!r}. Corrections belong to the data that were "
            "reviewed; an image that was dropped before is no longer in it."
        )
    known = set(data.class_names)
    for line, row in rows:
        if row.decision == RELABEL and row.new_label not in known:
            raise DataError(
                f"{file}, line {line}: {row.new_label!r} is not a class of "
                f"{data.source}.{_nearest(row.new_label, data.class_names)}"
            )
        split, at = places[row.id]
        label = data.class_names[getattr(data, split).labels[at]]
        if label != row.given_label:
            raise DataError(
                f"{file}, line {line}: the label of {row.id!r} was "
                f"{row.given_label!r} when it was reviewed and is {label!r} now. "
                "Review the labels as they are, with the same --noise and --seed."
            )


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" It has: {', '.join(map(repr, known[:10]))}."


def _corrected(
    split: SampleSplit, pairs: Sequence[tuple[int, Correction]], number: dict[str, int]
) -> SampleSplit:
    labels = split.labels.copy()
    reviewed = np.zeros(len(split), bool)
    if split.reviewed is not None:
        reviewed |= split.reviewed
    remains = np.ones(len(split), bool)
    for at, row in pairs:
        reviewed[at] = True
        remains[at] = row.decision != DROP
        if row.decision == RELABEL:
            labels[at] = number[row.new_label]
    corrected = dataclasses.replace(split, labels=labels, reviewed=reviewed)
    return dataclasses.replace(
        corrected.take(np.flatnonzero(remains)),
        before_review=split if split.before_review is None else split.before_review,
    )


def _merged(
    before: Corrections | None, rows: Sequence[Correction]
) -> tuple[Correction, ...]:
    """Adds a file's rows to those of the files before, one for each image."""
    # The given label stays the one that the data were loaded with, so that the result
    # is a file of corrections in its own right.
    merged = {row.id: row for row in (before.rows if before is not None else ())}
    for row in rows:
        loaded = merged[row.id].given_label if row.id in merged else row.given_label
        label = row.new_label or row.given_label
        if row.decision == DROP:
            merged[row.id] = Correction(row.id, loaded, DROP)
        elif label == loaded:
            merged[row.id] = Correction(row.id, loaded, KEEP)
        else:
            merged[row.id] = Correction(row.id, loaded, RELABEL, label)
    return tuple(merged.values())
