"""Opens a data set by what the user calls it: a folder, a CSV file or a name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from keras_rsft.data.digits import list_digits
from keras_rsft.data.folder import list_folder
from keras_rsft.data.partition import Listing, check_fractions, cut_splits
from keras_rsft.data.splits import ImageData
from keras_rsft.data.table import DEFAULT_SPLIT_COLUMN, Columns, list_table
from keras_rsft.data.tfds import list_tfds
from keras_rsft.errors import InvalidArgument

TFDS_PREFIX = "tfds:"
DIGITS = "digits"


def load_images(
    source: str | Path,
    *,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | None = DEFAULT_SPLIT_COLUMN,
    clean_label_column: str | None = None,
    label_key: str = "label",
    clean_label_key: str | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
) -> ImageData:
    """Lists the images of a data set and makes its splits. No image is opened.

    A split that the source has is left alone. One that it lacks is cut from the
    training samples, class by class; each class keeps at least one, and gives
    at least one to each split if it has three.

    Args:
        source: One of
            a folder with one folder of images for each class;
            a folder with `train` and, if there are, `validation` (or `valid`,
            `val`) and `test`, each with one folder for each class;
            a `.csv` file, whose paths are relative to its own folder;
            `"tfds:NAME"`, an image classification data set of TensorFlow
            Datasets, downloaded if need be;
            `"digits"`, scikit-learn's 8 x 8 digits (`"./digits"` is a folder).
        path_column: CSV: the column of the images' paths.
        label_column: CSV: the column of the given labels.
        split_column: CSV: the column of `train`, `validation` or `test`; an
            empty value means `train`. It may be absent if it is the default.
            None ignores it.
        clean_label_column: CSV: the column of the right labels, if known.
        label_key: TFDS: the feature that holds the given labels.
        clean_label_key: TFDS: the feature that holds the right labels, if
            known. In validation and test it also stands in where `label_key`
            holds -1.
        validation_fraction: Share of the training samples, in [0, 1).
        test_fraction: Share of the training samples, in [0, 1).
        split_seed: Chooses which samples are taken for a missing split.
        data_dir: TFDS: where prepared data are kept. None is TFDS's own place.

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
    check_fractions(validation_fraction, test_fraction)
    name = os.fspath(source)
    if name.startswith(TFDS_PREFIX):
        listing = list_tfds(
            name.removeprefix(TFDS_PREFIX),
            label_key=label_key,
            clean_label_key=clean_label_key,
            data_dir=data_dir,
            source=name,
        )
    elif source == DIGITS:
        listing = list_digits(source=name)
    else:
        columns = Columns(path_column, label_column, split_column, clean_label_column)
        listing = _list_path(name, columns)
    return cut_splits(
        listing,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        split_seed=split_seed,
    )


def _list_path(name: str, columns: Columns) -> Listing:
    if os.path.isdir(name):
        return list_folder(name, source=name)
    if not os.path.exists(name):
        raise InvalidArgument(
            f"`source` must be {_KNOWN}. Received: {name!r}, which does not exist."
            f"{_suggestion(name)}"
        )
    if not name.lower().endswith(".csv"):
        raise InvalidArgument(
            f"`source` must be {_KNOWN}. Received: {name!r}, another kind of file."
        )
    return list_table(name, columns, source=name)


_KNOWN = 'a folder, a .csv file, "tfds:NAME" or "digits"'


def _suggestion(name: str) -> str:
    parent, wanted = os.path.split(os.path.normpath(name))
    try:
        names = os.listdir(parent or os.curdir)
    except OSError:
        return f" Neither does {parent!r}."
    known = [os.path.join(parent, other) for other in names] + [DIGITS]
    target = os.path.join(parent, wanted)
    close = difflib.get_close_matches(target, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
