"""Texts with labels: a CSV file with a column of texts, or a folder of text files.

Owns what counts as a text that can be read. Making numbers of it is the business of
the base that takes it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
from typing import ClassVar

import numpy as np
import tensorflow as tf

from keras_rsft.data.folder import list_folder
from keras_rsft.data.partition import Listing, check_fractions, cut_splits, list_named
from keras_rsft.data.pipeline import without_autotuning
from keras_rsft.data.readers import digest
from keras_rsft.data.samples import SampleData, SampleSplit
from keras_rsft.data.table import (
    DEFAULT_SPLIT_COLUMN,
    Columns,
    named_sample,
    table_rows,
)
from keras_rsft.errors import DataError, InvalidArgument

TEXT_SUFFIXES = frozenset((".txt",))
DEFAULT_TEXT_COLUMN = "text"
MAX_BYTES = 1_000_000
_ID_DIGITS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class TextSplit(SampleSplit):
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
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        if sample_shape:
            raise InvalidArgument(
                "The data are texts, and the base takes images. Give a text encoder: "
                "minilm."
            )
        if views != 1:
            raise InvalidArgument(
                f"A text has one view. Received: views={views}. Leave out `--views`."
            )
        start, stop = self.stretch(start, stop)

        @tf.autograph.experimental.do_not_convert
        def read(index: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            encoded = self.reader.load(key)
            return index, tf.ensure_shape(
                tf.numpy_function(_checked, [encoded], tf.string), ()
            )

        texts = (
            self.reader.entries(start)
            .take(stop - start)
            .map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        )
        return without_autotuning(texts.ignore_errors(log_warning=False))

    def text(self, index: int) -> str:
        """Returns a text.

        Args:
            index: Its position in this split.

        Raises:
            DataError: If it is not UTF-8, empty, or longer than 1 MB.
            OSError: If its file is gone or cannot be opened.
        """
        return text_of(self.encoded(index))

    def read_error(self, index: int) -> str | None:
        try:
            self.text(index)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"The file cannot be opened: {error.strerror}."
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class TextData(SampleData):
    """A data set of labelled texts; for its attributes see `SampleData`."""

    split_type: ClassVar[type[SampleSplit]] = TextSplit

    train: TextSplit
    validation: TextSplit
    test: TextSplit


def load_texts(
    source: str | os.PathLike,
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
            `train`, `validation` and `test`, each with one for each class.
        text_column: CSV: the column of the texts.
        label_column: CSV: the column of the given labels.
        split_column: CSV: the column of `train`, `validation` or `test`; an
            empty value means `train`. It may be absent if it is the default.
            None ignores it.
        clean_label_column: CSV: the column of the right labels, if known.
        id_column: CSV: the column of the ids, each once. Default None: an id is made
            of the text, so that a sample keeps it when rows are moved or added.
        validation_fraction: Share of the training samples, in [0, 1).
        test_fraction: Share of the training samples, in [0, 1).
        split_seed: Chooses which samples are taken for a missing split.

    Returns:
        The data set.

    Raises:
        InvalidArgument: If there is no such source, or an option is wrong.
        DataError: If the source cannot be trained on as it is.
    """
    check_fractions(validation_fraction, test_fraction)
    name = os.fspath(source)
    if os.path.isdir(name):
        listing = list_folder(name, source=name, suffixes=TEXT_SUFFIXES, kind="texts")
    elif not os.path.isfile(name) or not name.lower().endswith(".csv"):
        raise InvalidArgument(
            "`source` must be a .csv file with a column of texts, or a folder with one "
            f"folder of .txt files for each class. Received: {name!r}."
        )
    else:
        columns = Columns(text_column, label_column, split_column, clean_label_column)
        listing = _list_table(name, columns, id_column)
    return cut_splits(
        listing,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        split_seed=split_seed,
        data_type=TextData,
    )


def text_of(encoded: bytes) -> str:
    """Returns the text of a file's bytes."""
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


def _checked(encoded: bytes) -> bytes:
    return text_of(encoded).encode()


def read_texts(
    file: str | os.PathLike, columns: Columns
) -> list[tuple[int, str, dict[str, str]]]:
    """Reads the rows of a CSV file with a column of texts."""
    name = os.fspath(file)
    rows = []
    for line, row in table_rows(name, columns, name):
        rows.append((line, row[columns.path] or "", row))
    if not rows:
        raise DataError(f"There is no row below the header in {name}.")
    return rows


def _list_table(file: str, columns: Columns, id_column: str | None) -> Listing:
    name_of = _names_of_texts() if id_column is None else _names_in(id_column)
    samples, texts = [], {}
    wanted = dataclasses.replace(columns, further=(id_column,) if id_column else ())
    for line, text, row in read_texts(file, wanted):
        place = f"{file}, line {line}"
        sample = named_sample(row, columns, name_of(text, row, place), place)
        samples.append(sample)
        texts[sample.id] = text.encode("utf-8", "surrogatepass")
    if not any(text.strip() for text in texts.values()):
        raise DataError(f"The column {columns.path!r} of {file} has no text.")
    listing = list_named(samples, functools.partial(_reader_of, texts), source=file)
    first: dict[bytes | str, str] = {}  # Texts without a word are no copies.
    groups = [
        first.setdefault(texts[one].strip() or one, one) for one in listing.ids.tolist()
    ]
    return dataclasses.replace(listing, groups=np.array(groups, np.str_))


def _names_of_texts():
    """Returns a function that makes an id of a text, and tells repeated texts apart."""
    seen: collections.Counter[str] = collections.Counter()

    def name_of(text: str, row: dict[str, str], place: str) -> str:
        del row, place
        encoded = text.encode("utf-8", "surrogatepass")
        name = hashlib.sha256(encoded).hexdigest()[:_ID_DIGITS]
        seen[name] += 1
        return name if seen[name] == 1 else f"{name}-{seen[name]}"

    return name_of


def _names_in(column: str):
    """Returns a function that reads an id from a row, each of which comes once."""
    seen: set[str] = set()

    def name_of(text: str, row: dict[str, str], place: str) -> str:
        del text
        name = (row[column] or "").strip()
        if not name or name in seen:
            raise DataError(
                f"Each text must have an id of its own in column {column!r}. "
                f"Received: {name!r} in {place}."
            )
        seen.add(name)
        return name

    return name_of


def _reader_of(texts: dict[str, bytes], ids: np.ndarray) -> TextReader:
    return TextReader(ids, np.array([texts[one] for one in ids.tolist()], object))


class TextReader:
    """Reads texts from memory."""

    any_order = True

    def __init__(self, ids: np.ndarray, texts: np.ndarray):
        self._ids = ids
        self._texts = texts

    def entries(self, start: int) -> tf.data.Dataset:
        indices = np.arange(start, len(self._ids), dtype=np.int64)
        texts = tf.constant(self._texts[start:].tolist(), tf.string)
        return tf.data.Dataset.from_tensor_slices((indices, texts))

    def load(self, key: tf.Tensor) -> tf.Tensor:
        return key

    def encoded(self, index: int) -> bytes:
        return self._texts[index]

    def fingerprint(self) -> str:
        named = zip(self._ids, self._texts, strict=True)
        return digest(f"{name}\0{len(text)}\0".encode() + text for name, text in named)

    def take(self, indices: np.ndarray) -> TextReader:
        return TextReader(self._ids[indices], self._texts[indices])
