"""Reads image classification data sets of TensorFlow Datasets."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import tensorflow as tf

from keras_rsft.config import SPLITS
from keras_rsft.data._samples import ImageData, ImageSplit, Reader, digest
from keras_rsft.data._splits import SPLIT_ALIASES, TRAIN, Cut, cut_splits
from keras_rsft.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder
    from tensorflow_datasets.core.features import ClassLabel


_ROWS_A_STEP = 1024
_NO_LABEL = -1


class TfdsReader(Reader):
    """Reads samples of TFDS splits, one split after the other."""

    any_order = False

    def __init__(
        self,
        builder: DatasetBuilder,
        image_key: str,
        ids: np.ndarray,
        splits: np.ndarray,
        positions: np.ndarray,
    ):
        super().__init__(ids, positions)
        self._builder = builder
        self._image_key = image_key
        self._splits = splits

    def entries(self, start: int) -> tf.data.Dataset:
        borders = np.flatnonzero(self._splits[1:] != self._splits[:-1]) + 1
        runs = np.split(np.arange(len(self._ids)), borders)
        streams = [self._stream(run[run >= start]) for run in runs if run[-1:] >= start]
        if not streams:
            nothing = (np.zeros(0, np.int64), np.zeros(0, np.str_))
            return tf.data.Dataset.from_tensor_slices(nothing)
        return functools.reduce(lambda one, two: one.concatenate(two), streams)

    def encoded(self, index: int) -> bytes:
        _, encoded = next(iter(self._stream(np.array([index]))))
        return encoded.numpy()

    def fingerprint(self) -> str:
        names = (self._builder.info.full_name, *self._ids)
        return digest(f"{name}\0".encode() for name in names)

    def take(self, indices: np.ndarray) -> Self:
        taken = super().take(indices)
        taken._splits = self._splits[indices]
        return taken

    def _stream(self, indices: np.ndarray) -> tf.data.Dataset:
        """Streams `(index, encoded)` of samples that are all of one TFDS split."""
        first, last = self._items[indices[[0, -1]]]
        index_at = np.full(last + 1 - first, -1, np.int64)
        index_at[self._items[indices] - first] = indices
        index_at = tf.constant(index_at)
        part = f"{self._splits[indices[0]]}[{first}:{last + 1}]"
        samples = _read(self._builder, part, self._image_key).enumerate()
        return samples.map(
            lambda number, sample: (index_at[number], sample[self._image_key])
        ).filter(lambda index, _: index >= 0)


def tfds_data(
    source: str | DatasetBuilder,
    label_key: str,
    clean_label_key: str | None,
    data_dir: str | Path | None,
    cut: Cut,
) -> ImageData:
    """Reads a TFDS data set, which is downloaded if need be."""
    import tensorflow_datasets as tfds

    if isinstance(source, str):
        builder = _prepared_builder(source, data_dir)
    else:
        builder, source = source, f"tfds:{source.info.full_name}"
        builder.download_and_prepare()
    # Sorted, for TFDS has the features in another order in each process.
    features = dict(sorted(builder.info.features.items()))
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    if "image" not in images and len(images) != 1:
        raise InvalidArgument(
            "Expected a data set with one image in each sample. "
            f"Received: {source}, whose images are {images} of {list(features)}."
        )
    image_key = "image" if "image" in images else images[0]

    def class_label(key: str, argument: str) -> ClassLabel:
        kind = tfds.features.ClassLabel
        labels = [name for name, one in features.items() if isinstance(one, kind)]
        if key not in labels:
            raise InvalidArgument(
                f"`{argument}` must be a class label of {source}, which has: "
                f"{', '.join(labels) or 'none'}. Received: {argument}={key!r}."
            )
        return features[key]

    given = class_label(label_key, "label_key")
    keys, names = [label_key], tuple(given.names)
    if clean_label_key is not None:
        clean = class_label(clean_label_key, "clean_label_key")
        # Prefers the clean label's names where the given one has mere numbers.
        numbers = [str(number) for number in range(given.num_classes)]
        if given.num_classes == clean.num_classes and given.names == numbers:
            names = tuple(clean.names)
        keys.append(clean_label_key)
    origins = list(builder.info.splits)
    if "train" in origins:
        origins = [one for one in origins if one in SPLIT_ALIASES]
        codes = [SPLITS.index(SPLIT_ALIASES[one]) for one in origins]
    else:
        codes = [TRAIN] * len(origins)
    parts = [_gather(builder, origin, image_key, keys) for origin in origins]
    sizes = [len(ids) for ids, _ in parts]
    ids, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    splits = np.repeat(np.array(codes, np.int8), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    reader = TfdsReader(builder, image_key, ids, np.repeat(origins, sizes), positions)
    whole = ImageSplit("all", ids, *_checked_labels(labels, splits, source), reader)
    data = ImageData(whole, whole, whole, names, source)
    return cut_splits(data, splits, cut)


def _prepared_builder(source: str, data_dir: str | Path | None) -> DatasetBuilder:
    import tensorflow_datasets as tfds

    name = source.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, ImportError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f' Did you mean "tfds:{close[0]}"?' if close else ""
        reason = next(iter(str(error).splitlines()), "unknown")
        raise InvalidArgument(
            "Expected the name of a TensorFlow Datasets data set. "
            f"Received: {source!r} ({reason}).{hint}"
        ) from error
    if builder.is_prepared():
        return builder
    try:
        builder.download_and_prepare()
    # Each data set downloads and parses in its own way, and fails in its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source} could not be downloaded and prepared in {builder.data_dir} "
            f"({type(error).__name__}: {reason}). Check the connection, or pass "
            "`data_dir` with data that are prepared already."
        ) from error
    return builder


def _read(builder: DatasetBuilder, split: str, image_key: str) -> tf.data.Dataset:
    import tensorflow_datasets as tfds

    # One shard after the other, so that positions mean the same in each pass;
    # TFDS would keep a small data set in memory unless told not to.
    config = tfds.ReadConfig(
        add_tfds_id=True, interleave_cycle_length=1, try_autocache=False
    )
    return builder.as_dataset(
        split=split,
        decoders={image_key: tfds.decode.SkipDecoding()},
        read_config=config,
        shuffle_files=False,
    )


def _gather(
    builder: DatasetBuilder, split: str, image_key: str, keys: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    rows = _read(builder, split, image_key).map(
        lambda sample: (sample["tfds_id"], [sample[key] for key in keys]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    ids: list[str] = []
    labels = [np.zeros((0, len(keys)), np.int32)]
    for some_ids, some_labels in rows.batch(_ROWS_A_STEP).as_numpy_iterator():
        ids += [id_.decode() for id_ in some_ids]
        labels.append(some_labels.astype(np.int32))
    return np.array(ids, dtype=np.str_), np.concatenate(labels)


def _checked_labels(
    labels: np.ndarray, splits: np.ndarray, source: str
) -> tuple[np.ndarray, np.ndarray | None]:
    given, clean = labels[:, 0].copy(), None
    if labels.shape[1] > 1:
        clean = labels[:, 1].copy()
        # cifar10_n, say, has human labels for its training images only.
        fill = (given == _NO_LABEL) & (splits != TRAIN)
        given[fill] = clean[fill]
    if np.any(given < 0):
        raise DataError(
            f"{np.count_nonzero(given < 0)} of {len(given)} samples of {source} have "
            "no label. Use another `label_key`; if only validation or test lack "
            "labels, pass `clean_label_key`."
        )
    if clean is not None and np.any(clean < 0):
        raise DataError(
            f"{np.count_nonzero(clean < 0)} of {len(clean)} samples of {source} have "
            "no clean label. Use another `clean_label_key`, or none."
        )
    return given, clean
