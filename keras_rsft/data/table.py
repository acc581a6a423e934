"""Reads a CSV file that lists images and their labels.

The paths in it are taken from the CSV's own folder and may not leave it: a
table from somebody else must not reach other files of this machine.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterator

from keras_rsft.data.partition import SPLIT_ALIASES, Listing, NamedSample, list_named
from keras_rsft.data.readers import FileReader
from keras_rsft.errors import DataError

DEFAULT_SPLIT_COLUMN = "split"
# Ten times what a text may have. Where a quote is never closed, the rest of the file is
# one cell: it must not all go into memory.
_MAX_CELL = 10_000_000


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns to read; None for one that is not wanted."""

    path: str = "path"
    label: str = "label"
    split: str | None = DEFAULT_SPLIT_COLUMN
    clean_label: str | None = None
    further: tuple[str, ...] = ()


def list_table(file: str, columns: Columns, *, source: str) -> Listing:
    """Lists the images of a CSV file (UTF-8, comma-separated, with a header)."""
    folder = os.path.dirname(os.path.abspath(file))
    locate = _Locator(folder)
    samples = [
        _located_sample(row, columns, locate, f"{source}, line {line}")
        for line, row in table_rows(file, columns, source)
    ]
    if not samples:
        raise DataError(f"There is no row below the header in {source}.")
    if locate.found == 0:
        raise DataError(
            f"None of the {len(samples)} files listed in {source} exists, such as "
            f"{samples[0].id!r}. Paths are relative to the CSV's folder, {folder}."
        )
    return list_named(samples, functools.partial(FileReader, folder), source=source)


def table_rows(file: str, columns: Columns, source: str) -> Iterator[tuple[int, dict]]:
    """Yields each row of a CSV file with the number of its line."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            _require_columns(reader.fieldnames or [], columns, source)
            while (row := _next_row(reader)) is not None:
                if None in row:
                    raise DataError(
                        f"{source}, line {reader.line_num}, has more cells than the "
                        "header. Put quotes around a cell with a comma in it."
                    )
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Expected {source} to be a comma-separated table in UTF-8. "
            f"Received: {error}. Save it again as CSV (UTF-8)."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {source}: {error.strerror}.") from error


def _next_row(reader: csv.DictReader) -> dict | None:
    """Returns the next row, of cells up to `_MAX_CELL` characters; None at the end."""
    # The limit is one of the process: nobody else's reading must notice.
    before = csv.field_size_limit(_MAX_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _require_columns(found: list[str], columns: Columns, source: str) -> None:
    wanted = [columns.path, columns.label, *columns.further]
    if columns.split != DEFAULT_SPLIT_COLUMN:
        wanted.append(columns.split)
    wanted.append(columns.clean_label)
    missing = [name for name in wanted if name is not None and name not in found]
    if missing:
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}. "
            f"It has: {', '.join(map(repr, found)) or 'none'}."
        )


def _located_sample(
    row: dict, columns: Columns, locate: Callable[[str, str], str], place: str
) -> NamedSample:
    found = locate(_value(row, columns.path, place), place)
    return named_sample(row, columns, found, place)


def named_sample(row: dict, columns: Columns, name: str, place: str) -> NamedSample:
    """Returns the sample of a row."""
    clean = columns.clean_label
    given = (row.get(columns.split) or "train").strip() or "train"
    split = SPLIT_ALIASES.get(given.lower())
    if split is None:
        raise DataError(
            f"The split must be one of {', '.join(SPLIT_ALIASES)} or empty. "
            f"Received: {given!r} in {place}."
        )
    return NamedSample(
        id=name,
        label=_value(row, columns.label, place),
        split=split,
        clean_label=None if clean is None else _value(row, clean, place),
    )


def _value(row: dict, column: str, place: str) -> str:
    value = (row[column] or "").strip()
    if not value:
        raise DataError(f"Expected a value in column {column!r} of {place}.")
    return value


class _Locator:
    """Turns a path of the table into an id, if it stays inside the folder."""

    def __init__(self, folder: str):
        self.found = 0
        self._folder = folder
        self._root = os.path.realpath(folder)
        self._seen: set[str] = set()
        # Most files share a folder: resolving each anew would take long.
        self._resolve = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def __call__(self, path: str, place: str) -> str:
        name = os.path.normpath(path)
        full = os.path.join(self._folder, name)
        if "\0" in path or os.path.isabs(path) or not self._is_inside(full):
            raise DataError(
                "Paths must be relative to the CSV's folder and stay inside it. "
                f"Received: {path!r} in {place}."
            )
        name = name.replace(os.sep, "/")
        if name in self._seen:
            raise DataError(f"{path!r} in {place} has been listed before.")
        self._seen.add(name)
        self.found += _is_file(full, place)
        return name

    def _is_inside(self, full: str) -> bool:
        parent, name = os.path.split(full)
        real = os.path.join(self._resolve(parent), name)
        if os.path.islink(real) or name == os.pardir:
            real = os.path.realpath(real)
        return real.startswith(os.path.join(self._root, ""))


def _is_file(full: str, place: str) -> bool:
    try:
        mode = os.stat(full).st_mode
    except OSError:
        return False
    # Reading a pipe or a device might never end.
    if not stat.S_ISREG(mode):
        raise DataError(f"{full} is not a file, in {place}.")
    return True
