"""Takes what `model.fit` takes: arrays, `tf.data`, a `PyDataset`; and tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_rsft._progress import progress_bar
from keras_rsft.config import SPLITS
from keras_rsft.data import _images, _sources
from keras_rsft.data._images import readable_reason
from keras_rsft.data._samples import (
    ArrayReader,
    ImageData,
    SampleData,
    SampleSplit,
    StreamReader,
    image_digest,
)
from keras_rsft.data._splits import (
    SPLIT_ALIASES,
    TRAIN,
    Cut,
    cut_splits,
    refuse_stray,
    sorted_names,
)
from keras_rsft.data._tfds import tfds_data
from keras_rsft.errors import DataError, InvalidArgument

_CHANNELS = (1, 3, 4)
_EXPECTED = (
    "Expected (x, y) arrays, a tf.data.Dataset, a Keras PyDataset, a table, a data set "
    "of Hugging Face or TFDS, a folder, or a .csv file."
)
# The second pass is compared with the first at once for this many samples, and for
# the others when it is made.
_SAMPLES_TO_COMPARE = 32


def load_data(
    x: Any,
    y: Any = None,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    ids: Any = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
    progress: bool = True,
) -> SampleData:
    """Takes arrays and data sets as `model.fit` does, as images or texts with ids.

    Images are `(n, height, width)` or `(n, height, width, channels)` with 1, 3 or 4
    channels: integers or floats in [0, 255], or floats in [0, 1], which are multiplied
    by 255 with a warning that says so. Floats are not rounded. Of four channels the
    last is opacity: the image is put on white. Texts are strings. Labels are integers
    from 0 on, strings, or one-hot, `(n,)`, `(n, 1)` or `(n, classes)`.

    Arrays are not copied: a `np.memmap` stays on disk. Images of a `tf.data.Dataset`,
    a `PyDataset` or a data set of Hugging Face are read from the source in each pass,
    so they may be larger than memory. Samples must be the same in each pass, in the
    same order, and are compared with those of the first pass, which takes place here.
    Texts are held in memory.

    Args:
        x: One of
            images or texts: an array, a tensor, a list of strings, a Series;
            a pair `(x, y)` of them and their labels;
            a `tf.data.Dataset` of `(image, label)` or `(text, label)`, batched or not,
            or of dicts with the keys `image` or `text`, and `label`;
            a `keras.utils.PyDataset`;
            a data set of Hugging Face with the columns `image` or `text`, and `label`;
            a TFDS builder;
            a table with the columns `path` or `text`, and `label`, such as a pandas or
            polars DataFrame: for other names see `load_images` and `load_texts`;
            a dict of splits by name, such as `{"train": ..., "test": ...}`;
            what `load_images` takes.
        y: Labels, where `x` has none.
        validation_data: The validation split, of any of these kinds. Default None:
            some of the training samples are held out, as by `load_images`.
        test_data: The same of the test split.
        ids: An id for each sample of `x`, each once. Default None: of arrays the
            numbers of the rows, such as "12"; of streams the number and a part of
            the content's digest, or the relative `file_paths` that
            `image_dataset_from_directory` notes; of texts as in `load_texts`. Those of
            `validation_data` and `test_data` begin with the split's name.
        class_names: Names of the classes by label. Default None: the `class_names`
            that the data set has, or the labels.
        validation_fraction: Fraction of the training samples, in [0, 1).
        test_fraction: Fraction of the training samples, in [0, 1).
        split_seed: Chooses which samples are taken for a missing split.
        progress: Show a progress bar of the first pass. Default True.

    Returns:
        `ImageData` or `TextData`, which `finetune` and the others take.

    Raises:
        InvalidArgument: If the data are of another kind, or change between passes.
        DataError: If the samples or the labels cannot be trained on as they are.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
        >>> data = rsft.load_data(x, np.arange(40) % 2, class_names=["cat", "dog"])
        >>> data.class_names, len(data.train), len(data.validation), len(data.test)
        (('cat', 'dog'), 28, 6, 6)
    """
    given = {"validation": validation_data, "test": test_data}
    if isinstance(x, Mapping) and "train" in x:
        named = {SPLIT_ALIASES.get(str(name), ""): part for name, part in x.items()}
        x = named.pop("train")
        given = named | {name: part for name, part in given.items() if part is not None}
    given = {name: given[name] for name in SPLITS if given.get(name) is not None}
    if y is None:
        x, y = _pair_of(x)
    cut = Cut(
        0.0 if "validation" in given else validation_fraction,
        0.0 if "test" in given else test_fraction,
        split_seed,
    )
    asked = _Asked(ids, class_names, progress)
    data = _loaded(x, y, asked, cut)
    for name, part in given.items():
        own = class_names or _own_names(part) or _own_names(x)
        data = _with_split(data, name, part, asked._replace(class_names=own))
    return _sources.of_python(data) if given else data


def whole_split(x: Any, *, progress: bool = True) -> SampleSplit:
    """Returns all samples of data without splits, as one."""
    part = _loaded(*_pair_of(x), _Asked(None, None, progress), None)
    return _only_split(part, "The data")


def _pair_of(x: Any) -> tuple[Any, Any]:
    return x if isinstance(x, tuple) and len(x) == 2 else (x, None)


def _only_split(part: SampleData, what: str) -> SampleSplit:
    if part.validation is not part.train and len(part.validation) + len(part.test):
        raise InvalidArgument(
            f"{what} must be one split. Received: {part.source}, which has several. "
            "Give one of them, such as `load_data(...).train`."
        )
    return part.train


class _Asked(NamedTuple):
    """What a user may say of samples, and how ids of rows begin."""

    ids: Any
    class_names: Sequence[str] | None
    progress: bool
    prefix: str = ""


def _loaded(x: Any, y: Any, asked: _Asked, cut: Cut | None) -> SampleData:
    """Returns data with their splits; without a cut all samples are in `train`."""
    if isinstance(x, Iterator):
        raise InvalidArgument(
            f"A {type(x).__name__} can be read only once, and the samples are read "
            "several times. Make a keras.utils.PyDataset or a tf.data.Dataset of it."
        )
    if y is None and (stream := _stream_of(x)) is not None:
        data = _of_stream(x, stream, asked)
    elif y is None:
        if asked.ids is not None or asked.class_names is not None:
            raise InvalidArgument(
                "`ids` and `class_names` are for arrays and data sets without their "
                f"own. Received: {_sources.called(x)}. Leave them out."
            )
        return _of_source(x, Cut(0.0, 0.0, 0) if cut is None else cut)
    else:
        data = _of_arrays(x, y, asked)
    if cut is not None:
        data = cut_splits(data, np.full(len(data.train), TRAIN, np.int8), cut)
    return _sources.of_python(data)


def _of_source(x: Any, cut: Cut) -> SampleData:
    """Loads what other functions load."""
    cuts: dict[str, Any] = {
        "validation_fraction": cut.validation_fraction,
        "test_fraction": cut.test_fraction,
        "split_seed": cut.seed,
    }
    if isinstance(x, SampleData):
        return x
    if isinstance(x, str | os.PathLike):
        return _sources.load_images(x, **cuts)
    if hasattr(x, "as_dataset") and hasattr(x, "info"):
        return tfds_data(x, "label", None, None, cut)
    columns = _sources.columns_of(x)
    if columns is None:
        what = type(x).__name__
        if isinstance(x, tuple):
            what += f" of {len(x)}; sample weights are not taken"
        elif isinstance(x, list) or hasattr(x, "dtype"):
            what += " without labels. Give (x, y)"
        raise InvalidArgument(f"{_EXPECTED} Received: {what}.")
    if "path" in columns:
        return _sources.load_images(x, **cuts)
    if "text" in columns:
        return _sources.load_texts(x, **cuts)
    raise InvalidArgument(
        f"Expected a column 'path' or 'text' in {_sources.called(x)}, or 'image' in a "
        f"data set of Hugging Face. Received: {', '.join(map(repr, columns)) or 'none'}"
        ". `load_images` and `load_texts` take others: path_column='file'."
    )


def _with_split(data: SampleData, name: str, given: Any, asked: _Asked) -> SampleData:
    """Adds a split of its own, whose classes are those of the training samples."""
    if len(getattr(data, name)):
        raise InvalidArgument(
            f"The data have a {name} split already. Leave out `{name}_data`, or load "
            f"the data with {name}_fraction=0."
        )
    x, y = _pair_of(given)
    asked = asked._replace(ids=None, prefix=f"{name}/")
    if y is None and _stream_of(x) is None:  # It has classes of its own.
        asked = asked._replace(class_names=None)
    part = _loaded(x, y, asked, None)
    if part.kind != data.kind:
        raise InvalidArgument(
            f"`{name}_data` must be {data.kind}, as the training samples. "
            f"Received: {part.kind}."
        )
    split = _only_split(part, f"`{name}_data`")
    twice = np.intersect1d(
        split.ids, np.concatenate([getattr(data, one).ids for one in SPLITS])
    )
    if len(twice):
        raise DataError(
            f"{len(twice)} ids of `{name}_data` are in other splits too, such as "
            f"{str(twice[0])!r}. Give each sample an id of its own, in one split."
        )
    number = {data.class_names[label]: label for label in np.unique(data.train.labels)}
    changed: dict[str, Any] = {"name": name}
    for kind in ("labels", "clean_labels"):
        if (codes := getattr(split, kind)) is not None:
            used = [part.class_names[label] for label in np.unique(codes)]
            refuse_stray(((one, f"`{name}_data`") for one in used), number, data.source)
            labels = [number.get(one, -1) for one in part.class_names]
            changed[kind] = np.array(labels, np.int32)[codes]
    parts: dict[str, Any] = {name: dataclasses.replace(split, **changed)}
    return dataclasses.replace(data, **parts)


# Labels and ids -----------------------------------------------------------------------


def class_codes(
    labels: Any, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels of any kind as int32 `(n,)`, and the names of the classes."""
    values = np.asarray(labels)
    if values.dtype.kind in "OST":
        values = _plain_labels(values)
    if values.ndim == 2 and values.dtype.kind == "f" and np.isin(values, (0, 1)).all():
        values = values.astype(np.int64)  # So Keras has one-hot and binary labels.
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    names = None if class_names is None else tuple(map(str, class_names))
    if values.ndim == 2 and values.dtype.kind in "bui":
        if np.any(values < 0) or np.any(values.sum(axis=1) != 1):
            raise DataError(
                "One-hot labels must have one 1 in each row, and 0 elsewhere. "
                f"Received: another row, in labels of shape {values.shape}. Several "
                "labels a sample are not taken: choose one, as `y.argmax(axis=1)`."
            )
        names = names or tuple(map(str, range(values.shape[1])))
        values = values.argmax(axis=1)
    if values.ndim != 1 or values.dtype.kind not in "buiU":
        raise DataError(
            "Labels must be one integer or string a sample, or one-hot. Received: "
            f"shape {values.shape}, {values.dtype}. Cast whole numbers with "
            "`y.astype(int)`."
        )
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    found, codes = np.unique(values, return_inverse=True)
    given: list[Any] = found.tolist()
    number: dict[Any, int]
    if values.dtype.kind == "U":
        names = names or sorted_names(given)
        expected = f"one of {', '.join(map(repr, names[:10]))}, and not empty"
        number = {name: at for at, name in enumerate(names) if name.strip()}
    elif names is None:
        expected, names = "at least 0", tuple(map(str, given))
        number = {one: at for at, one in enumerate(given) if one >= 0}
    else:
        expected = f"in [0, {len(names)}), the number of classes"
        number = {at: at for at in range(len(names))}
    for one in given:
        if one not in number:
            raise DataError(
                f"Each label must be {expected}. Received: {one!r} in row "
                f"{int(np.argmax(values == one))}. Correct it, or leave it out."
            )
    return np.array([number[one] for one in given], np.int32)[codes], names


def _plain_labels(values: np.ndarray) -> np.ndarray:
    """Returns objects and bytes as strings or integers, whichever all of them are."""
    flat = values.ravel().tolist()
    kind = str if flat and isinstance(flat[0], str | bytes) else int
    for at, one in enumerate(flat):
        if not isinstance(one, str | bytes if kind is str else int | np.integer):
            raise DataError(
                "Labels must be all integers or all strings. "
                f"Received: {one!r} in row {at}. Correct it, or leave it out."
            )
    plain = [one.decode() if isinstance(one, bytes) else one for one in flat]
    return np.array(plain, np.str_ if kind is str else np.int64).reshape(values.shape)


def _ids_of(asked: _Asked, own: list[str]) -> np.ndarray:
    given, count = own if asked.ids is None else asked.ids, len(own)
    values = np.array(list(map(str, np.asarray(given).ravel().tolist())), np.str_)
    if len(values) != count or len(np.unique(values)) < count or "" in values:
        raise InvalidArgument(
            f"`ids` must be {count} different ids, one for each sample. Received: "
            f"{len(values)}, {len(np.unique(values))} of them different."
        )
    return values


def _row_numbers(count: int, prefix: str) -> list[str]:
    return [f"{prefix}{row}" for row in range(count)]


# Arrays -------------------------------------------------------------------------------


def _of_arrays(x: Any, y: Any, asked: _Asked) -> SampleData:
    source = "the arrays"
    texts = _texts_of(x)
    images = np.zeros(0) if texts is not None else _array_of(x, "images")
    count, labels = len(images if texts is None else texts), _array_of(y, "labels")
    if count != len(labels):
        raise DataError(
            f"x and y must have the same length. Received: {count} samples and "
            f"{len(labels)} labels."
        )
    if not count:
        raise DataError("The arrays x and y must not be empty. Received: no sample.")
    codes, names = class_codes(labels, asked.class_names)
    if texts is None:
        _check_image(images.shape[1:], images.dtype)
    else:
        return _text_data(texts, codes, names, source, asked)
    scan = _Scan(source)
    for at in range(len(images)):
        scan.add(images[at])
    digests = np.array(scan.digests, np.uint64)
    ids = _ids_of(asked, _row_numbers(count, asked.prefix))
    reader = ArrayReader(ids, images, digests, scan.scale())
    return _whole(ImageData, ids, codes, names, reader, source)


def _whole(
    data_type: type[SampleData],
    ids: np.ndarray,
    codes: np.ndarray,
    names: tuple[str, ...],
    reader: Any,
    source: str,
) -> SampleData:
    """Returns data whose samples are not cut into splits yet."""
    all_samples: Any = data_type.split_type("all", ids, codes, None, reader)
    return data_type(all_samples, all_samples, all_samples, names, source)


def _array_of(values: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"The {what} cannot be made an array ({error}). All must have one shape. "
            "Give images of several sizes as a tf.data.Dataset, not batched."
        ) from error
    if array.ndim == 0:
        kind = type(values).__name__
        raise InvalidArgument(f"{_EXPECTED} Received: {kind} as the {what}.")
    return array


def _check_image(shape: tuple[int, ...], dtype: np.dtype) -> None:
    received = f"Received: images of shape {shape}, {dtype}."
    if dtype.kind not in "uif":
        raise DataError(f"Images must be integers or floats. {received} Cast them.")
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(
            "Each image must have the shape (height, width) or (height, width, "
            f"channels). {received}"
        )
    if len(shape) == 3 and shape[-1] not in _CHANNELS:
        first = shape[0] in _CHANNELS
        advice = "Move the channels last: `np.moveaxis(x, 1, -1)`." if first else ""
        raise DataError(
            f"Images must have 1, 3 or 4 channels, in the last axis. {received} "
            f"{advice or 'Choose the channels to use.'}"
        )


class _Scan:
    """What the first pass finds out about images."""

    def __init__(self, source: str):
        self.digests: list[int] = []
        self._source = source
        self._low, self._high = math.inf, -math.inf
        self._float: np.dtype | None = None

    def add(self, image: np.ndarray) -> None:
        if image.dtype != np.uint8:
            low, high = float(image.min()), float(image.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(
                    "Images must be finite. Received: NaN or infinity in image "
                    f"{len(self.digests)} of {self._source}. Leave it out."
                )
            self._low, self._high = min(low, self._low), max(high, self._high)
            if image.dtype.kind == "f":
                self._float = image.dtype
        self.digests.append(image_digest(image))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self._float is None else np.float32)

    def scale(self) -> float:
        """Returns what the pixels must be multiplied by, and says so."""
        if self._low < 0 or self._high > 255:
            advice = "Rescale them to [0, 255]; the backbone does its preprocessing."
            if self._low >= -1 and self._high <= 1:
                advice = "Rescale those in [-1, 1]: `(x + 1) * 127.5`."
            elif self._low >= -64 and self._high <= 320:
                advice = "Clip what resizing overshot: `np.clip(x, 0, 255)`."
            raise DataError(
                "Images must be in [0, 255], or floats in [0, 1]. Received: values "
                f"from {self._low:.4g} to {self._high:.4g} in {self._source}. {advice}"
            )
        if self._float is None or self._high > 1:
            return 1.0
        warnings.warn(
            f"The images of {self._source} are {self._float} in [0, 1]: they are "
            "multiplied by 255.",
            stacklevel=2,
        )
        return 255.0


# Texts --------------------------------------------------------------------------------


def _texts_of(x: Any) -> list[bytes] | None:
    """Returns texts in UTF-8; None where the values are none."""
    if isinstance(x, tf.Tensor):
        x = x.numpy()
    if isinstance(x, np.ndarray) and (x.ndim != 1 or x.dtype.kind not in "UTSO"):
        return None
    if not hasattr(x, "__iter__") or not isinstance(next(iter(x), None), str | bytes):
        return None
    texts = []
    for at, one in enumerate(x):
        if not isinstance(one, str | bytes):
            raise DataError(
                f"Texts must be strings. Received: {one!r} in row {at}. Leave it out."
            )
        texts.append(_sample(one))
    suffixes = tuple(one.encode() for one in _images.SUFFIXES)
    if all(one.lower().endswith(suffixes) for one in texts):
        raise InvalidArgument(
            "Expected images or texts. Received: paths of images, such as "
            f"{texts[0].decode()!r}. Give a table: "
            "load_data({'path': x, 'label': y})."
        )
    return texts


def _text_data(
    texts: Sequence[bytes],
    codes: np.ndarray,
    names: tuple[str, ...],
    source: str,
    asked: _Asked,
) -> SampleData:
    id_of = _sources.text_ids()
    ids = _ids_of(asked, [asked.prefix + id_of(one) for one in texts])
    order = np.argsort(ids, kind="stable")
    values = np.empty(len(texts), object)
    values[:] = [texts[at] for at in order.tolist()]
    reader = _sources.TextReader(ids[order], values)
    return _whole(_sources.TextData, ids[order], codes[order], names, reader, source)


# Streams ------------------------------------------------------------------------------


class _Stream(NamedTuple):
    """What starts a pass, how many elements it has, and whether they are batches."""

    elements: Callable[[], Iterator[Any]]
    size: int | None
    batched: bool | None = None


def _own_names(x: Any) -> Sequence[str] | None:
    """Returns the classes that a data set itself knows, by label."""
    names = getattr(x, "class_names", None)
    return _sources.class_names_of(x) if names is None else names


def _stream_of(x: Any) -> _Stream | None:
    import keras

    if isinstance(x, tf.data.Dataset):
        count = int(x.cardinality())
        if count == tf.data.INFINITE_CARDINALITY:
            raise InvalidArgument(
                "The tf.data.Dataset has no end. Leave out `.repeat()`, or end it with "
                "`.take(number)`."
            )
        known = None if count == tf.data.UNKNOWN_CARDINALITY else count
        return _Stream(x.as_numpy_iterator, known)
    if isinstance(x, keras.utils.PyDataset):
        try:
            size = int(x.num_batches)
        except (TypeError, NotImplementedError) as error:
            raise InvalidArgument(
                "The PyDataset has no end. Give it a `__len__`, its number of batches."
            ) from error
        return _Stream(lambda: _batches_of(x, size), size, batched=True)
    columns = _sources.columns_of(x)
    if columns and hasattr(x, "features") and "image" in columns:
        return _Stream(lambda: iter(x), len(x), batched=False)
    return None


def _batches_of(x: Any, size: int) -> Iterator[Any]:
    for number in range(size):
        try:
            batch = x[number]
        except (IndexError, StopIteration) as error:
            raise DataError(
                f"The PyDataset has {size} batches by its `__len__`, but no batch "
                f"{number} ({type(error).__name__}: {error}). Correct its `__len__`."
            ) from error
        yield batch


def _of_stream(x: Any, stream: _Stream, asked: _Asked) -> SampleData:
    """Reads a stream once: labels, and digests of the images, or the texts."""
    kind = "tf.data.Dataset" if isinstance(x, tf.data.Dataset) else type(x).__name__
    source = f"the {kind}"
    class_names = asked.class_names or _own_names(x)

    def rows() -> Iterator[tuple[Any, Any]]:
        return _rows(stream.elements(), stream.batched, source)

    scan = _Scan(source)
    labels: list[np.ndarray] = []
    texts: list[bytes] = []
    try:
        with progress_bar(
            f"Reading {source}", total=stream.size or 0, unit="elements",
            visible=asked.progress and bool(stream.size),
        ) as advance:  # fmt: skip
            for element in stream.elements():
                for content, label in _rows([element], stream.batched, source):
                    if not labels:
                        class_codes(np.asarray(label)[np.newaxis], class_names)
                    labels.append(label)
                    if isinstance(content, bytes):
                        texts.append(content)
                    else:
                        _check_image(content.shape, content.dtype)
                        scan.add(content)
                advance(1)
    except tf.errors.OpError as error:
        raise DataError(
            f"{source[0].upper()}{source[1:]} cannot be read to its end. "
            f"TensorFlow says: {readable_reason(error).rstrip('.')}."
        ) from error
    if not labels:
        raise DataError(f"There is no sample in {source}.")
    if len({np.shape(one) for one in labels}) > 1:
        raise DataError(f"Labels must have one shape. Received: several in {source}.")
    codes, names = class_codes(np.stack(labels), class_names)
    if texts:
        return _text_data(texts, codes, names, source, asked)
    changed = (
        f"{source[0].upper()}{source[1:]} has other samples, another order or an "
        "earlier end in another pass, so its samples cannot be told apart. Use "
        "`image_dataset_from_directory(..., shuffle=False)` or give its folder; leave "
        "out `shuffle`, or give it `reshuffle_each_iteration=False`; and leave out "
        "random augmentation: "
        "`FeatureConfig(augmentations=4)` adds it."
    )
    known = zip(scan.digests[:_SAMPLES_TO_COMPARE], labels, strict=False)
    again = itertools.islice(rows(), _SAMPLES_TO_COMPARE)
    for first, second in itertools.zip_longest(known, again):
        if first is None or second is None:
            raise InvalidArgument(changed)
        if first[0] != image_digest(second[0]) or np.any(first[1] != second[1]):
            raise InvalidArgument(changed)
    digests = np.array(scan.digests, np.uint64)
    ids = _ids_of(asked, _stream_ids(x, digests, asked.prefix))
    reader = StreamReader(
        ids,
        lambda: (content for content, _ in rows()),
        digests,
        scan.scale(),
        scan.dtype,
        changed,
    )
    return _whole(ImageData, ids, codes, names, reader, source)


def _stream_ids(x: Any, digests: np.ndarray, prefix: str) -> list[str]:
    paths = list(map(os.path.abspath, getattr(x, "file_paths", ())))
    if len(paths) == len(digests):
        root = os.path.join(os.path.commonpath(map(os.path.dirname, paths)), "")
        return [prefix + one[len(root) :].replace(os.sep, "/") for one in paths]
    # With content: corrections of another order must not fit.
    numbers = _row_numbers(len(digests), prefix)
    pairs = zip(numbers, digests.tolist(), strict=True)
    return [f"{number}-{digest:016x}"[: len(number) + 7] for number, digest in pairs]


def _rows(
    elements: Any, batched: bool | None, source: str
) -> Iterator[tuple[Any, Any]]:
    """Yields samples, bytes or arrays, and labels of elements, batched or not."""
    for element in elements:
        content, label = _pair(element, source)
        if hasattr(content, "convert"):  # A picture of Pillow.
            from PIL import ImageOps

            content = ImageOps.exif_transpose(content)
            mode = "RGBA" if content.has_transparency_data else "RGB"
            content = content if content.mode == "L" else content.convert(mode)
        label = np.asarray(label)
        if isinstance(content, str | bytes):
            yield _sample(content), label
            continue
        content = np.asarray(content)
        if not (_is_batch(content, label) if batched is None else batched):
            yield _sample(content), label
            continue
        if label.ndim == 0 or len(content) != len(label):
            raise DataError(
                f"Each batch must have a label for each sample. Received: "
                f"{len(content)} samples, labels of shape {label.shape} in {source}."
            )
        yield from zip(map(_sample, content), label, strict=True)


def _pair(element: Any, source: str) -> tuple[Any, Any]:
    what = f"{len(element) if isinstance(element, tuple | list) else 1} parts"
    if isinstance(element, Mapping):
        what = f"a dict of {', '.join(map(str, element))}"
        element = [element[one] for one in ("image", "text", "label") if one in element]
    if isinstance(element, tuple | list) and len(element) == 2:
        return element[0], element[1]
    raise InvalidArgument(
        f"Each element of {source} must be (image, label) or (text, label), or a dict "
        f"of `image` or `text`, and `label`. Received: {what}. Choose them first, with "
        "`.map()`; sample weights are not taken."
    )


def _sample(content: Any) -> Any:
    """Returns a text as bytes, an image as an array."""
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")
    return content if isinstance(content, bytes) else np.asarray(content)


def _is_batch(content: np.ndarray, label: np.ndarray) -> bool:
    """Tells a batch from one sample, by the shapes of both."""
    if label.ndim == 0:
        return False
    if content.dtype.kind in "OSU":
        return content.ndim == 1
    if content.ndim != 3:
        return content.ndim > 3
    return content.shape[-1] not in _CHANNELS
