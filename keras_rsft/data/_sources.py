"""Opens a data set by name, folder, CSV file, digits or texts; or as a table."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from keras_rsft._runtime import import_extra
from keras_rsft.config import nearest_name_hint
from keras_rsft.data import _images, _samples
from keras_rsft.data._splits import (
    SPLIT_ALIASES,
    Cut,
    Data,
    NamedSample,
    data_of,
    split_and_rest,
)
from keras_rsft.data._tfds import tfds_data
from keras_rsft.errors import DataError, InvalidArgument

TEXT_SUFFIXES = frozenset((".txt",))

# Folders ------------------------------------------------------------------------------


def _folder_data(data_type: type[Data], source: str, cut: Cut) -> Data:
    """Reads a folder of class folders, or of split folders of these."""
    root = os.path.abspath(source)
    kind = data_type.split_type.kind
    suffixes = _images.readable_suffixes() if kind == "images" else TEXT_SUFFIXES
    unread: collections.Counter[str] = collections.Counter()
    # Archives often hold one folder of the same content once more.
    base = _sole_folder(root, "") if len(_visible(root)[0]) == 1 else ""
    folders = [os.path.join(base, one) for one in _visible(os.path.join(root, base))[0]]
    splits = _splits_of(os.path.join(root, base), folders, suffixes)
    for above in {"", base} if splits else {""} - {base}:
        unread += _visible(os.path.join(root, above))[1]
    if splits:
        folders = [_sole_folder(root, one) for one in folders]
    else:
        folders, splits = [base], ["train"]
    samples: list[NamedSample] = []
    inside: list[set[str]] = []  # The folders in each class folder.
    for prefix, split in zip(folders, splits, strict=True):
        labels, others = _visible(os.path.join(root, prefix))
        unread += others
        if not labels:
            raise DataError(
                f"Expected one folder for each class in {os.path.join(root, prefix)}. "
                f"Received: no folder. Sort the {kind} into <class>/<{kind[:-1]}> "
                "first."
            )
        for label in labels:
            below = os.path.join(prefix, label)
            ids, others = files_below(root, below, suffixes)
            if not ids:
                raise DataError(
                    f"Expected {kind} in the class folder {os.path.join(root, below)}. "
                    f"Received: none, and {others.total()} other files"
                    f"{_listed(others)}. {kind.capitalize()} end in "
                    f"{', '.join(sorted(suffixes))}. Add some or remove the folder."
                )
            samples += [NamedSample(id_, label, split) for id_ in ids]
            unread += others
            parts = (id_.split("/")[below.count(os.sep) + 1 : -1] for id_ in ids)
            inside.append({part[0] for part in parts if part})
    for sample in samples:
        try:
            sample.id.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "File names must be valid UTF-8. "
                f"Received: {sample.id!r}. Rename the file or its folder."
            ) from error
    notes = [unread_sentence(unread)] if unread else []
    shared = sorted(set.intersection(*inside))
    if len(shared) > 1:
        notes.append(
            f"Every class folder holds the folders {', '.join(shared[:10])}: these are "
            "taken neither for classes nor for splits. If they are, sort the "
            f"{kind} into <split>/<class>/<{kind[:-1]}> or <class>/<{kind[:-1]}>."
        )
    reader_of = functools.partial(_samples.FileReader, root)
    return data_of(
        data_type, samples, reader_of, cut, source,
        unread_files=dict(unread.most_common()), notes=tuple(notes),
    )  # fmt: skip


def unread_sentence(endings: collections.Counter[str]) -> str:
    """Says how many files have an ending that is not read, and what would help."""
    were = "file was" if endings.total() == 1 else "files were"
    text = f"{endings.total():,} {were} not read{_listed(endings)}."
    readable = _images.readable_suffixes()
    if endings.keys() & (_images.MORE_SUFFIXES - readable):
        text += " Install keras_rsft[images] to read TIFF, HEIC and AVIF."
    return text


def _listed(endings: collections.Counter[str]) -> str:
    """Returns how many files have which ending, behind a colon."""
    counts = [f"{count:,} {name}" for name, count in endings.most_common(10)]
    counts += ["..."] if len(endings) > 10 else []
    return f": {', '.join(counts)}" if counts else ""


def ending_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"


def _splits_of(root: str, folders: list[str], suffixes: frozenset[str]) -> list[str]:
    """Returns the splits that folders are for, none where they are for classes."""
    found = [split_and_rest(os.path.basename(one)) for one in folders]
    names = [os.path.basename(one) for one in folders]
    together = {rest for split, rest in found if split == "train"}
    splits = [split if rest in together else "" for split, rest in found]
    train = [name for name, one in zip(names, splits, strict=True) if one == "train"]
    others = [name for name, one in zip(names, splits, strict=True) if not one]
    if not train:
        if len(found) > 1 and all(split for split, _ in found):
            raise DataError(
                f"Expected a folder `train` in {root}. Received: {', '.join(names)}. "
                "Add one, or rename the folders if they are classes."
            )
        return []
    if others:
        inside = os.path.join(root, train[0])
        nested, files = _visible(inside)
        # A class may be called train; then it holds images.
        if len(set(splits) - {""}) < 2 and (
            len(nested) < 2 or not suffixes.isdisjoint(files)
        ):
            return []
        known = [name for name in names if name not in others]
        raise DataError(
            f"{root} mixes split folders ({', '.join(known)}) with others "
            f"({', '.join(others[:5])}). Move the others away, or rename the first if "
            "they are classes."
        )
    if len(set(splits)) < len(splits):
        raise DataError(
            f"Two folders in {root} are for the same split. Received: "
            f"{', '.join(names)}. Put their images into one."
        )
    return splits


def _sole_folder(root: str, below: str) -> str:
    """Returns the only folder in a folder, if it holds several, else the folder."""
    folders = _visible(os.path.join(root, below))[0]
    inner = os.path.join(below, *folders[:1])
    if len(folders) != 1 or (not below and split_and_rest(inner)[0]):
        return below
    return inner if len(_visible(os.path.join(root, inner))[0]) > 1 else below


def _visible(folder: str) -> tuple[list[str], collections.Counter[str]]:
    """Returns the folders in a folder, and the endings of its files."""
    entries = [one for one in _entries(folder) if not one.name.startswith(".")]
    folders = [one.name for one in entries if _is_dir(one)]
    files = (one.name for one in entries if not _is_dir(one))
    return folders, collections.Counter(map(ending_of, files))


def files_below(
    root: str, below: str, suffixes: frozenset[str]
) -> tuple[list[str], collections.Counter[str]]:
    """Returns the files to read, relative to `root`, and the endings of the others."""
    ids: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    chain: tuple[str, ...] = (os.path.realpath(os.path.join(root, below)),)
    waiting = [(below, chain)]
    while waiting:
        folder, chain = waiting.pop()
        for entry in _entries(os.path.join(root, folder)):
            name = os.path.join(folder, entry.name)
            suffix = os.path.splitext(name)[1].lower()
            if entry.name.startswith("."):
                # macOS writes ._NAME beside NAME where its attributes have no place.
                is_meant = suffix in suffixes and not entry.name.startswith("._")
                others["hidden"] += is_meant and not _is_dir(entry)
                continue
            if _is_dir(entry) and not entry.is_symlink():
                waiting.append((name, chain))
            elif _is_dir(entry):
                real = os.path.realpath(entry.path)
                inside = (os.path.commonpath((one, real)) == real for one in chain)
                if not any(inside):  # A link back to a folder that it lies in is left.
                    waiting.append((name, (*chain, real)))
            elif suffix in suffixes and os.path.isfile(entry):
                ids.append(name.replace(os.sep, "/"))
            else:
                others[ending_of(name)] += 1
    return ids, others


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"Cannot read the folder {folder}: {error.strerror}."
        ) from error


# Tables -------------------------------------------------------------------------------

DEFAULT_SPLIT_COLUMN = "split"
_SPLIT_COLUMN = re.compile("split|set|fold|part|phase|usage", re.IGNORECASE)
# Ten times the limit of a text. Where a quote is never closed, the rest of the file is
# one cell: it must not all go into memory.
_MAX_CELL = 10_000_000
MAX_PATH = 1024


def read_table(
    file: str | os.PathLike, required: Sequence[str], advice: str = ""
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields each row of a CSV file, at least one, with the number of its line."""
    is_empty, line = True, 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            separator, found = _header(file, next(lines, ""), required, advice)
            rows = csv.reader(lines, delimiter=separator, strict=True)
            while (row := _next_row(rows)) is not None:
                line += 1
                if len(row) > len(found):
                    raise DataError(
                        f"{file}, line {line}, has more cells than the header. Put "
                        f"quotes around a cell with {separator!r} in it."
                    )
                if row:
                    is_empty = False
                    row += [""] * (len(found) - len(row))
                    yield line, dict(zip(found, row, strict=True))
                line = 1 + rows.line_num
            if is_empty:
                raise DataError(f"There is no row below the header in {file}.")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Expected {file} to be in UTF-8. Received: another encoding in line "
            f"{_line_not_in_utf8(file)}. Save it again as CSV (UTF-8)."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"Expected {file} to be a comma-separated table. Received: {error}, in the "
            f"row that begins in line {line + 1}. Look for a quote that is not closed."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error


def _line_not_in_utf8(file: str | os.PathLike) -> int:
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        escaped = (any("\udc80" <= one <= "\udcff" for one in line) for line in lines)
        return next(number for number, one in enumerate(escaped, 1) if one)


_SEPARATORS = (",", ";", "\t", "|")


def _header(
    file: str | os.PathLike, line: str, required: Sequence[str], advice: str
) -> tuple[str, list[str]]:
    """Returns what separates cells, and the names of the columns."""
    found: list[str] = []
    for separator in sorted(_SEPARATORS, key=lambda one: -line.count(one)):
        cells = next(csv.reader([line], delimiter=separator, strict=True), [])
        names = [cell.strip() for cell in cells]
        if set(required) <= set(names):
            read = (*required, DEFAULT_SPLIT_COLUMN)
            if twice := [one for one in read if names.count(one) > 1]:
                raise DataError(
                    f"{file}, line 1, has the column {twice[0]!r} "
                    f"{names.count(twice[0])} times. Rename or remove the others."
                )
            return separator, names
        found = found or names
    missing = [name for name in required if name not in found]
    raise DataError(
        f"{file} has no column {', '.join(map(repr, missing))} in line 1. "
        f"It has: {', '.join(map(repr, filter(None, found))) or 'none'}.{advice}"
    )


def _next_row(reader: Any) -> list[str] | None:
    # The limit is one of the process: nobody else's reading must notice.
    before = csv.field_size_limit(_MAX_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def columns_of(table: Any) -> list[str] | None:
    """Returns the names of a table's columns, or None of what is no table."""
    # pandas and polars, a dict of columns, and a data set of Hugging Face.
    names = list(table) if isinstance(table, Mapping) else None
    for name in ("column_names", "columns"):
        names = getattr(table, name, None) if names is None else names
    usable = hasattr(table, "__getitem__") and hasattr(table, "__len__")
    return None if names is None or not usable else [str(one) for one in names]


def class_names_of(table: Any) -> tuple[str, ...] | None:
    """Returns the classes that a Hugging Face data set gives its labels."""
    features = getattr(table, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    names = getattr(label, "names", None)
    return None if names is None else tuple(map(str, names))


def _table_rows(
    table: Any, columns: Sequence[str], label: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each row of a table, with words that say which one it is."""
    name = called(table)
    found = columns_of(table) or []
    if wrong := [one for one in columns if found.count(one) != 1]:
        count = "more than one" if wrong[0] in found else "no"
        raise DataError(
            f"There is {count} column {', '.join(map(repr, wrong))} in {name}. It has: "
            f"{', '.join(map(repr, found)) or 'none'}."
        )
    names = class_names_of(table)
    most = math.inf if names is None else len(names)
    cells = [list(table[one]) for one in columns]
    if not cells[0]:
        raise DataError(f"There is no row in {name}.")
    if len(lengths := {len(column) for column in cells}) > 1:
        raise DataError(
            f"The columns of {name} must be of one length. Received: "
            f"{' and '.join(map(str, sorted(lengths)))} rows."
        )
    for number, row in enumerate(zip(*cells, strict=True)):
        values = {one: _cell(v) for one, v in zip(columns, row, strict=True)}
        given = row[columns.index(label)]
        is_number = isinstance(given, int | np.integer)
        fault = isinstance(given, float | np.floating) and values[label] != ""
        if fault or (is_number and not 0 <= given < most):
            raise DataError(
                f"Labels must be strings, or whole numbers in [0, {most}). Received: "
                f"{given!r} in row {number} of {name}. Correct the column {label!r}."
            )
        if names is not None and is_number:
            values[label] = names[int(given)]
        yield f"row {number} of {name}", values


def _cell(value: Any) -> str:
    """Returns a value as a CSV file would have it: empty where it is missing."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    return "" if isinstance(value, float) and math.isnan(value) else str(value)


def called(source: Any) -> str:
    """Returns what a message calls a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"the {type(source).__name__}"


def _path_of(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    raise InvalidArgument(
        f"Expected a folder, a file or a table. Received: {type(source).__name__}. For "
        "arrays and data sets use `load_data`."
    )


def of_python(data: Data) -> Data:
    """Returns the data set, marked as one that no command can load."""
    splits = (data.train, data.validation, data.test)
    found = _samples.digest(split.fingerprint.encode() for split in splits)
    return dataclasses.replace(data, fingerprint=found[:32])


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns to read; the first has the path or the text."""

    content: str
    label: str
    split: str | None
    clean_label: str | None
    is_text: bool = False

    def rows(
        self, table: Any, *further: str | None
    ) -> Iterator[tuple[str, dict[str, str]]]:
        split = None if self.split == DEFAULT_SPLIT_COLUMN else self.split
        if split is None and self.split in (columns_of(table) or ()):
            split = self.split
        names = (self.content, self.label, *further, split, self.clean_label)
        required = [one for one in dict.fromkeys(names) if one is not None]
        if not isinstance(table, str):
            yield from _table_rows(table, required, self.label)
            return
        option = "--text-column" if self.is_text else "--path-column"
        advice = f" Name the columns with {option} and --label-column."
        for line, row in read_table(table, required, advice):
            where = f"{table}, line {line}"
            for name in required:
                # A quote too many joins all cells up to the next one.
                if name != self.content or not self.is_text:
                    _require_one_line(row[name], name, where)
            yield where, row

    def unused_splits(self, table: Any) -> tuple[str, ...]:
        """Says which column has the names of splits and is not read as such."""
        row: dict[str, str] = {}
        if isinstance(table, str):
            _, row = next(read_table(table, (self.content, self.label)))
        names = columns_of(table) or list(row)
        if self.split is None or self.split in names:
            return ()
        for name in filter(_SPLIT_COLUMN.search, names):
            first = row[name] if row else str(next(iter(table[name])))
            if split_and_rest(first)[0] and name not in (self.content, self.label):
                return (
                    f"The column {name!r}, which begins with {first!r}, is not read. "
                    "If it has the splits, name it: --set split_column=NAME "
                    "(`split_column`).",
                )
        return ()

    def sample(self, row: dict[str, str], name: str, where: str) -> NamedSample:
        given = (row.get(self.split or "", "")).strip() or "train"
        if given.lower() not in SPLIT_ALIASES:
            raise DataError(
                f"The split must be one of {', '.join(SPLIT_ALIASES)} or empty. "
                f"Received: {given!r} in {where}."
            )
        clean = self.clean_label and _value(row, self.clean_label, where)
        label = _value(row, self.label, where)
        return NamedSample(name, label, SPLIT_ALIASES[given.lower()], clean)


def _value(row: dict[str, str], column: str, where: str) -> str:
    value = row[column].strip()
    if not value:
        raise DataError(f"Expected a value in column {column!r} of {where}.")
    return value


def _require_one_line(value: str, column: str, where: str) -> None:
    lines = value.strip().splitlines()
    quoted = value.strip()[:1] == '"' or value.strip()[-1:] == '"'
    if len(lines) > 1 or (quoted and value.count('"') % 2):
        shown = lines[0] if len(lines[0]) <= 80 else f"{lines[0][:80]}..."
        raise DataError(
            f"A cell of column {column!r} runs over {len(lines)} lines or holds a "
            f"quote too many. Received: {shown!r} in {where}. Remove the quote."
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the files of a table are: below `folder`, which the user gave or not."""

    folder: str
    suffix: str
    is_given: bool

    @classmethod
    def of(cls, given: str | os.PathLike | None, default: str, suffix: str) -> _Place:
        folder = os.path.abspath(default if given is None else given)
        if given is not None and not os.path.isdir(folder):
            raise InvalidArgument(f"`image_dir` must be a folder. Received: {given!r}.")
        return cls(folder, suffix, given is not None)

    def name_of(self, path: str) -> str:
        """Returns a path relative to the folder, also one of another machine."""
        path += self.suffix if not path.endswith(self.suffix) else ""
        name = os.path.normpath(path)
        if not self.is_given:
            return name
        name = name.removeprefix(os.path.join(self.folder, ""))
        parts = [one for one in re.split(r"[/\\]+", name) if one not in ("", "..")]
        tails = [os.path.join(*parts[at:]) for at in range(len(parts))]
        paths = (os.path.join(self.folder, one) for one in tails)
        found = (t for t, one in zip(tails, paths, strict=True) if os.path.lexists(one))
        return next(found, tails[0] if tails else name)


def _image_table(
    file: str, columns: _Columns, cut: Cut, place: _Place
) -> _samples.ImageData:
    """Reads a table of images, whose paths are relative to a folder."""
    folder = place.folder
    root = os.path.join(os.path.realpath(folder), "")
    # Most files share a folder: resolving each anew would take long.
    resolve = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def target_of(full: str) -> str:
        parent, name = os.path.split(full)
        real = os.path.join(resolve(parent), name)
        if os.path.islink(real) or name == os.pardir:
            real = os.path.realpath(real)
        return real

    samples: dict[str, NamedSample] = {}
    too_long: list[str] = []
    found = 0
    for where, row in columns.rows(file):
        path = _value(row, columns.content, where)
        if len(path) > MAX_PATH:  # Arrays of ids are as wide as the longest one.
            too_long.append(where.rpartition(" ")[2])
            continue
        name = place.name_of(path)
        full = os.path.join(folder, name)
        outside = "\0" in path or os.path.isabs(name)
        if outside or not (target := target_of(full)).startswith(root):
            is_link = not outside and os.path.normpath(full).startswith(
                os.path.join(folder, "")
            )
            leads = f", which is a link to {target}," if is_link else ""
            raise DataError(
                f"Paths must be relative to {folder} and stay inside it. Received: "
                f"{path!r}{leads} in {where}. Name the folder of the images with "
                "--image-dir (`image_dir`); column: --path-column."
            )
        name = name.replace(os.sep, "/")
        if name in samples:
            raise DataError(f"{path!r} in {where} has been listed before.")
        if os.path.isfile(full):
            found += 1
        elif os.path.exists(full):  # Reading a pipe or a device might never end.
            raise DataError(f"{full} is not a file, in {where}.")
        samples[name] = columns.sample(row, name, where)
    if not found:
        raise DataError(
            f"None of the {len(samples)} files listed in {file} exists, such as "
            f"{next(iter(samples), '')!r} in line 2. Paths are relative to {folder}. "
            "Name another folder with --image-dir (`image_dir`), what is missing at "
            "the end with --image-suffix (`image_suffix`), or another column with "
            "--path-column (`path_column`)."
        )
    notes = columns.unused_splits(file)
    if too_long:
        notes += (
            f"{len(too_long):,} rows of {file} were left out: their paths are longer "
            f"than {MAX_PATH:,} characters (line {', '.join(too_long[:10])}).",
        )
    reader_of = functools.partial(_samples.FileReader, folder)
    return data_of(
        _samples.ImageData, samples.values(), reader_of, cut, file, notes=notes
    )


def _images_of_table(
    table: Any, columns: _Columns, cut: Cut, place: _Place
) -> _samples.ImageData:
    """Reads a table of images, whose paths are the ids."""
    samples: dict[str, NamedSample] = {}
    full: dict[str, str] = {}
    for where, row in columns.rows(table):
        name = _value(row, columns.content, where)
        if len(name) > MAX_PATH:
            raise DataError(
                f"A path is longer than {MAX_PATH:,} characters, in {where}."
            )
        name = place.name_of(name)
        if name in samples:
            raise DataError(f"{name!r} in {where} has been listed before.")
        samples[name] = columns.sample(row, name, where)
        full[name] = os.path.join(place.folder, name)
        if os.path.exists(full[name]) and not os.path.isfile(full[name]):
            raise DataError(f"{full[name]} is not a file, in {where}.")
    if not any(map(os.path.isfile, full.values())):
        raise DataError(
            f"None of the {len(samples)} files in {called(table)} exists, such as "
            f"{next(iter(samples))!r}. Paths are absolute, or relative to "
            f"{place.folder}; `image_dir` names another folder."
        )

    def reader_of(ids: np.ndarray) -> _samples.FileReader:
        paths = np.array([full[one] for one in ids.tolist()], np.str_)
        return _samples.FileReader("", ids, paths)

    data = data_of(
        _samples.ImageData, samples.values(), reader_of, cut, called(table),
        notes=columns.unused_splits(table),
    )  # fmt: skip
    return of_python(data)


# Texts --------------------------------------------------------------------------------

DEFAULT_TEXT_COLUMN = "text"
MAX_BYTES = 1_000_000
_ID_DIGITS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class TextSplit(_samples.SampleSplit):
    """The texts of one split, in an order that does not change between runs.

    `ids` are paths relative to the folder with `/` between their parts; of a CSV file
    those of its column of ids, or 16 hexadecimal digits made of the text, with a number
    behind them where a text comes again. Sorted. For the other attributes see
    `SampleSplit`.
    """

    kind: ClassVar[str] = "texts"

    def inputs(
        self,
        sample_shape: tuple[int | None, ...],
        *,
        start: int = 0,
        stop: int | None = None,
        augmentations: int = 1,
        **options: Any,
    ) -> tf.data.Dataset:
        if sample_shape:
            raise InvalidArgument(
                "The data are texts, and the backbone takes images. Give a text "
                "encoder: minilm."
            )
        if augmentations != 1:
            raise InvalidArgument(
                f"A text has no augmentations. Received: augmentations={augmentations}."
            )

        def read(index: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
            text = tf.numpy_function(
                lambda one: text_of(one).encode(), [encoded], tf.string
            )
            return tf.ensure_shape(text, ())

        return self.mapped(read, start, stop)

    def text(self, index: int) -> str:
        """Returns a text.

        Args:
            index: Its position in this split.

        Raises:
            DataError: If it is not UTF-8, empty, or longer than 1 MB.
            OSError: If its file is gone or cannot be opened.
        """
        return text_of(self.encoded(index))

    def check(self, encoded: bytes) -> None:
        text_of(encoded)


@dataclasses.dataclass(frozen=True, eq=False)
class TextData(_samples.SampleData):
    """A data set of labelled texts; for its attributes see `SampleData`."""

    split_type: ClassVar[type[_samples.SampleSplit]] = TextSplit

    train: TextSplit
    validation: TextSplit
    test: TextSplit


def load_texts(
    source: Any,
    *,
    text_column: str = DEFAULT_TEXT_COLUMN,
    label_column: str = "label",
    split_column: str | None = DEFAULT_SPLIT_COLUMN,
    clean_label_column: str | None = None,
    id_column: str | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
) -> TextData:
    """Lists the texts of a data set and makes its splits, as `load_images` does.

    A text that is not UTF-8, empty, or longer than 1 MB is listed and counts as one
    that cannot be read.

    Args:
        source: A `.csv` file (UTF-8, comma-separated, with a header) with a text a
            row; or a folder with one folder of `.txt` files for each class, or with
            `train`, `validation` and `test`, each with one for each class; or a table
            with such columns: a pandas or polars DataFrame, a dict of columns, or a
            data set of Hugging Face. Other kinds of data: `load_data`.
        text_column: CSV and table: the column of the texts. So are the other columns.
        label_column: CSV: the column of the given labels.
        split_column: CSV: the column of `train`, `validation` or `test`; an
            empty value means `train`. It may be absent if it is the default.
            None ignores it.
        clean_label_column: CSV: the column of the right labels, if known.
        id_column: CSV: the column of the ids, each once. Default None: an id is made
            of the text, so that a sample keeps it when rows are moved or added.
        validation_fraction: Fraction of the training samples, in [0, 1).
        test_fraction: Fraction of the training samples, in [0, 1).
        split_seed: Chooses which samples are taken for a missing split.

    Returns:
        The data set.

    Raises:
        InvalidArgument: If there is no such source, or an option is wrong.
        DataError: If the source cannot be trained on as it is.
    """
    cut = Cut(validation_fraction, test_fraction, split_seed)
    columns = _Columns(
        text_column, label_column, split_column, clean_label_column, is_text=True
    )
    if columns_of(source) is not None:
        return of_python(_text_table(source, columns, id_column, cut))
    name = _path_of(source)
    if os.path.isdir(name):
        return _folder_data(TextData, name, cut)
    if not os.path.isfile(name) or not name.lower().endswith(".csv"):
        raise InvalidArgument(
            "`source` must be a .csv file with a column of texts, or a folder with one "
            f"folder of .txt files for each class. Received: {name!r}."
        )
    return _text_table(name, columns, id_column, cut)


def text_of(encoded: bytes) -> str:
    if len(encoded) > MAX_BYTES:
        raise DataError(f"The text has more than {MAX_BYTES // 1_000_000} MB.")
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text is not UTF-8: byte {error.start} is {encoded[error.start]:#04x}."
        ) from error
    if not text.strip():
        raise DataError("The text is empty.")
    return text


def text_ids() -> Callable[[bytes], str]:
    """Returns what makes ids of texts: the same wherever a text lies."""
    repeated: collections.Counter[str] = collections.Counter()

    def id_of(encoded: bytes) -> str:
        name = hashlib.sha256(encoded).hexdigest()[:_ID_DIGITS]
        repeated[name] += 1
        return name if repeated[name] == 1 else f"{name}-{repeated[name]}"

    return id_of


def _text_table(
    table: Any, columns: _Columns, id_column: str | None, cut: Cut
) -> TextData:
    samples: list[NamedSample] = []
    texts: dict[str, bytes] = {}
    id_of, file = text_ids(), called(table)
    for where, row in columns.rows(table, id_column):
        encoded = row[columns.content].encode("utf-8", "surrogatepass")
        if id_column is None:
            name = id_of(encoded)
        else:
            name = row[id_column].strip()
            if not name or name in texts or len(name) > MAX_PATH:
                raise DataError(
                    f"Each text must have an id of its own in column {id_column!r}, of "
                    f"at most {MAX_PATH:,} characters. Received: {name[:80]!r} in "
                    f"{where}."
                )
        samples.append(columns.sample(row, name, where))
        texts[name] = encoded
    if not any(text.strip() for text in texts.values()):
        raise DataError(f"The column {columns.content!r} of {file} has no text.")

    def reader_of(ids: np.ndarray) -> TextReader:
        return TextReader(ids, np.array([texts[one] for one in ids.tolist()], object))

    notes = columns.unused_splits(table)
    return data_of(TextData, samples, reader_of, cut, file, notes=notes)


class TextReader(_samples.Reader):
    """Reads texts, bytes in UTF-8, from memory."""

    def copy_names(self) -> np.ndarray:
        first: dict[bytes | str, str] = {}  # Texts without a word are no copies.
        names = [
            first.setdefault(text.strip() or one, one)
            for one, text in zip(self._ids.tolist(), self._items, strict=True)
        ]
        return np.array(names, np.str_)

    def encoded(self, index: int) -> bytes:
        return self._items[index]

    def fingerprint(self) -> str:
        named = zip(self._ids, self._items, strict=True)
        return _samples.digest(
            f"{name}\0{len(text)}\0".encode() + text for name, text in named
        )


# Images -------------------------------------------------------------------------------

TFDS_PREFIX = "tfds:"
DIGITS = "digits"
_BRIGHTEST_DIGIT = 16


def load_images(
    source: Any,
    *,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | None = DEFAULT_SPLIT_COLUMN,
    clean_label_column: str | None = None,
    image_dir: str | os.PathLike | None = None,
    image_suffix: str = "",
    label_key: str = "label",
    clean_label_key: str | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
) -> _samples.ImageData:
    """Lists the images of a data set and makes its splits. No image is decoded.

    A split that the source has is left alone. One that it lacks is held out from
    the training samples, class by class; each class keeps at least one, and gives
    at least one to each split if it has three. Equal files go to one split.

    Args:
        source: One of
            a folder with one folder of images for each class;
            a folder with `train` and, if there are, `validation` (or `valid`,
            `val`) and `test`, each with one folder for each class;
            a `.csv` file, whose paths are relative to its own folder or `image_dir`,
            separated by commas, semicolons, tabs or bars;
            `"tfds:NAME"`, an image classification data set of TensorFlow
            Datasets, downloaded if need be;
            `"digits"`, scikit-learn's 8 x 8 digits (`"./digits"` is a folder);
            a table with the columns of a CSV file, whose paths are absolute or
            relative to the current folder, and are the ids: a pandas or polars
            DataFrame, or a dict of columns. Other kinds of data: `load_data`.
        path_column: CSV and table: the column of the images' paths. So are the other
            columns.
        label_column: CSV: the column of the given labels.
        split_column: CSV: the column of `train`, `validation` or `test`; an
            empty value means `train`. It may be absent if it is the default.
            None ignores it.
        clean_label_column: CSV: the column of the right labels, if known.
        image_dir: CSV and table: the folder of the images. A path that is not below
            it, such as one of another machine, means the file at the longest end of
            the path that is. Default None: the folder of the CSV file.
        image_suffix: CSV and table: what is appended to paths that do not end so, such
            as `.jpg`. Default: nothing.
        label_key: TFDS: the feature that holds the given labels.
        clean_label_key: TFDS: the feature that holds the right labels, if
            known. In validation and test it also stands in where `label_key`
            holds -1.
        validation_fraction: Fraction of the training samples, in [0, 1).
        test_fraction: Fraction of the training samples, in [0, 1).
        split_seed: Chooses which samples are taken for a missing split.
        data_dir: TFDS: folder of prepared data. Default None: TFDS's own folder.

    Returns:
        The data set.

    Raises:
        InvalidArgument: If there is no such source, or an option is wrong.
        DataError: If the source cannot be trained on as it is.
        ImportError: If the source needs a package that is not installed.

    Example:
        >>> import keras_rsft as rsft
        >>> data = rsft.load_images("digits")
        >>> len(data.train), len(data.validation), len(data.test)
        (1259, 269, 269)
        >>> data.class_names[:3]
        ('0', '1', '2')
    """
    cut = Cut(validation_fraction, test_fraction, split_seed)
    columns = _Columns(path_column, label_column, split_column, clean_label_column)
    if columns_of(source) is not None:
        place = _Place.of(image_dir, os.curdir, image_suffix)
        return _images_of_table(source, columns, cut, place)
    name = _path_of(source)
    if name.startswith(TFDS_PREFIX):
        return tfds_data(name, label_key, clean_label_key, data_dir, cut)
    if source == DIGITS:
        return _digits(cut)
    if os.path.isdir(name):
        return _folder_data(_samples.ImageData, name, cut)
    fault = "" if name.lower().endswith(".csv") else "another kind of file."
    if not os.path.exists(name):
        fault = f"which does not exist.{_suggestion(name)}"
    if fault:
        raise InvalidArgument(
            '`source` must be a folder, a .csv file, "tfds:NAME" or "digits". '
            f"Received: {name!r}, {fault}"
        )
    place = _Place.of(image_dir, os.path.dirname(name), image_suffix)
    return _image_table(name, columns, cut, place)


def _digits(cut: Cut) -> _samples.ImageData:
    """Reads scikit-learn's digits, as "digits/0000" to "digits/1796"."""
    datasets = import_extra("sklearn.datasets", "demo", 'The source "digits"')
    bunch = datasets.load_digits()
    pixels = np.round(bunch.images * (255 / _BRIGHTEST_DIGIT)).astype(np.uint8)
    reader_of = functools.partial(_samples.ArrayReader, images=pixels)
    samples = [
        NamedSample(f"digits/{number:04}", str(label), "train")
        for number, label in enumerate(bunch.target)
    ]
    return data_of(_samples.ImageData, samples, reader_of, cut, DIGITS)


def _suggestion(name: str) -> str:
    parent, wanted = os.path.split(os.path.normpath(name))
    try:
        names = os.listdir(parent or os.curdir)
    except OSError:
        return f" Neither does {parent!r}."
    known = [os.path.join(parent, other) for other in names] + [DIGITS]
    return nearest_name_hint(os.path.join(parent, wanted), known, 0.6)
