"""Feeds cached features, or images, to training."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NoReturn

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.data._images import without_autotuning
from keras_rsft.data._samples import ImageSplit, SampleSplit
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._store import FeatureSet


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of each batch that the replicas of one process take."""

    replicas: int
    first: int
    count: int

    def row_counts(self, batch_size: int) -> list[int]:
        if batch_size < self.replicas:
            raise InvalidArgument(
                "`batch_size` counts the samples of all replicas and must be at least "
                f"their number, {self.replicas}. Received: batch_size={batch_size}."
            )
        edges = self._edges(batch_size)
        return [end - begin for begin, end in itertools.pairwise(edges)]

    def of_order(
        self, order: tuple[tf.Tensor, ...], batch_size: int
    ) -> tuple[tf.Tensor, ...]:
        edges = self._edges(batch_size)
        row = tf.range(tf.size(order[0])) % batch_size
        ours = (row >= edges[0]) & (row < edges[-1])
        return tuple(tf.boolean_mask(part, ours) for part in order)

    def _edges(self, batch_size: int) -> list[int]:
        numbers = range(self.first, self.first + self.count + 1)
        return [batch_size * number // self.replicas for number in numbers]


# Above this, rows are read from disk.
MAX_BYTES_IN_MEMORY = 2**28
# Features that are shuffled at once. Three times as much is in memory: one window is
# read, one waits, one is trained on.
WINDOW_BYTES = 2**28
# Long enough for a disk, short enough that a window holds samples of all classes
# also where the file holds one class after the other.
STRETCH_BYTES = 2**16
BLOCK_BYTES = 2**23
# What NumPy hands to TensorFlow is copied if it does not begin at a multiple of this.
TENSOR_ALIGNMENT = 64
_ROWS_PER_READ = 1024  # The most that Linux and macOS take.

Order = Callable[[], tuple[tf.Tensor, tf.Tensor]]


class TrainingBatches:
    """Shuffled batches of a feature set; pass both parts to `fit`.

    ```python
    batches = TrainingBatches(train, batch_size=32, seed=0)
    model.fit(batches.dataset, callbacks=[batches.callback], epochs=10)
    ```

    Args:
        features: The training features.
        batch_size: Samples per step, at least 1; the last batch of an epoch may
            be smaller.
        seed: Seed of the order and of the choice among augmentations.
        sample_index: Say which sample each row is. Default False.
        share: Which rows of each batch to yield, one element for each replica of this
            process. Default: whole batches.

    Raises:
        InvalidArgument: If the batch size is below 1, or the number of replicas.

    Attributes:
        dataset: `tf.data.Dataset` of `(features (batch, dim) float32, labels
            (batch,) int32)`, one epoch long; with `sample_index` of `(features,
            labels, None, indices (batch,) int32)`; with `share` weights of one in
            place of None.
        callback: Tells the data set which epoch begins.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> file = Path(tempfile.mkdtemp(), "features.bin")
        >>> np.arange(6, dtype="float32").tofile(file)
        >>> labels, ids = np.array([0, 1, 0]), np.array(["a", "b", "c"])
        >>> features = rsft.FeatureSet(file, labels, ids, dim=2)
        >>> batches = rsft.TrainingBatches(features, batch_size=2, seed=0)
        >>> [values.shape[0] for values, labels in batches.dataset]
        [2, 1]
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        batch_size: int,
        seed: int,
        sample_index: bool = False,
        share: BatchShare | None = None,
    ):
        if batch_size < 1:
            raise InvalidArgument(
                f"`batch_size` must be at least 1. Received: batch_size={batch_size}."
            )
        self._features = features
        self._seed = seed
        self._epoch = tf.Variable(0, dtype=tf.int32, trainable=False)
        self.callback = _EpochNumber(self._epoch)
        self.dataset = _gathered(
            features, self.epoch_order, batch_size, share, sample_index=sample_index
        )

    def order(self, epoch: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the samples and their rows in an epoch, int64 `(n,)` each.

        Args:
            epoch: The epoch's number, from 0.
        """
        count, augmentations = len(self._features), self._features.augmentations
        seed = tf.stack([tf.cast(self._seed, tf.int32), tf.cast(epoch, tf.int32)])
        if self._features.num_bytes <= WINDOW_BYTES:
            samples = _shuffled(count, seed)
        else:
            row_bytes = self._features.row_bytes
            samples = shuffled_by_stretches(
                count,
                seed,
                stretch_rows=max(1, STRETCH_BYTES // (augmentations * row_bytes)),
                window_rows=max(1, WINDOW_BYTES // row_bytes),
            )
        if augmentations == 1:
            return samples, samples
        view = tf.random.stateless_uniform(
            (count,), seed=tf.add(seed, [1, 0]), maxval=augmentations, dtype=tf.int64
        )
        return samples, samples * augmentations + view

    def epoch_order(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `order` of the epoch that began last."""
        return self.order(self._epoch)


def batches_of(
    features: FeatureSet, *, batch_size: int = 256, share: BatchShare | None = None
) -> tf.data.Dataset:
    """Returns the plain images' features in order, for evaluation."""
    samples = tf.range(len(features), dtype=tf.int64)
    order = (samples, samples * features.augmentations)
    return _gathered(features, lambda: order, batch_size, share)


class _EpochNumber(keras.callbacks.Callback):
    def __init__(self, epoch: tf.Variable):
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch.assign(epoch)


# Nothing that is mapped needs to be rewritten for graphs, which takes its time.
as_it_is = tf.autograph.experimental.do_not_convert


def _gathered(
    features: FeatureSet,
    order: Order,
    batch_size: int,
    share: BatchShare | None,
    *,
    sample_index: bool = False,
) -> tf.data.Dataset:
    """Returns batches of the samples and rows that `order` names."""
    # Rows are gathered for many batches at once, and no data set is made inside of
    # another, since functions of `tf.data` cost more than the copying: some 30
    # microseconds a call, some 5 milliseconds each time that an epoch begins.
    labels = tf.constant(features.labels)
    block_rows = batch_size * max(1, BLOCK_BYTES // (4 * features.dim * batch_size))
    rows = tf.data.Dataset.range(1).map(
        as_it_is(
            lambda _: order() if share is None else share.of_order(order(), batch_size)
        )
    )
    if features.num_bytes <= MAX_BYTES_IN_MEMORY:
        if features.rows is None:
            values = np.fromfile(features.path, features.dtype)
        else:
            values = features.all_views
        table = tf.constant(values.reshape(-1, features.dim))
        blocks = rows.rebatch(block_rows).map(
            as_it_is(lambda s, row: (s, tf.gather(table, row)))
        )
    else:
        read = _make_row_reader(features)
        one_window = features.num_bytes <= WINDOW_BYTES
        chunk_rows = block_rows if one_window else WINDOW_BYTES // features.row_bytes
        chunks = rows.rebatch(max(1, chunk_rows)).map(
            as_it_is(lambda s, row: (s, read(row)))
        )
        blocks = chunks.prefetch(1).rebatch(block_rows)

    def complete(sample: tf.Tensor, values: tf.Tensor) -> tuple:
        columns = tf.cast(values, tf.float32), tf.gather(labels, sample)
        if not sample_index:
            return columns
        # Replicas cannot be handed a None.
        weights = None if share is None else tf.ones(tf.shape(sample))
        return *columns, weights, tf.cast(sample, tf.int32)

    samples = blocks.map(as_it_is(complete)).prefetch(1)
    if share is not None:  # Their number differs where the last batch is small.
        return without_autotuning(samples.rebatch(share.row_counts(batch_size)))
    return _counted(samples.rebatch(batch_size), features, batch_size)


def _counted(
    batches: tf.data.Dataset, features: FeatureSet, batch_size: int
) -> tf.data.Dataset:
    """Returns the batches, whose number is that of the features' samples."""
    steps = -(-len(features) // batch_size)
    return without_autotuning(
        batches.apply(tf.data.experimental.assert_cardinality(steps))
    )


def shuffled_by_stretches(
    count: int, seed: tf.Tensor, *, stretch_rows: int, window_rows: int
) -> tf.Tensor:
    """Returns a random order of samples that can be read in few pieces."""
    # Stretches of neighbours are shuffled, then the samples in each window of the
    # result.
    stretches = _shuffled(-(-count // stretch_rows), seed)
    within = tf.range(stretch_rows, dtype=tf.int64)
    samples = tf.reshape(stretches[:, None] * stretch_rows + within, (-1,))
    samples = samples[samples < count]  # The last stretch of the file is shorter.
    window = tf.range(count, dtype=tf.int64) // window_rows
    within = tf.random.stateless_uniform(
        (count,), tf.add(seed, [2, 0]), dtype=tf.float64
    )
    by_window = tf.argsort(tf.cast(window, tf.float64) + within, stable=True)
    return tf.gather(samples, by_window)


def _shuffled(count: int, seed: tf.Tensor) -> tf.Tensor:
    samples = tf.range(count, dtype=tf.int64)
    return tf.random.experimental.stateless_shuffle(samples, seed=seed)


def _make_row_reader(features: FeatureSet) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from int64 rows `(k,)` to features `(k, dim)` from disk."""
    # Neighbours in the file are read together, each row right into its position. A
    # memory map would count its pages as ours, and bring in many more than asked for.
    file = features.path.open("rb", buffering=0)
    _advise(file.fileno(), 0, 0, "POSIX_FADV_RANDOM")  # It need not read ahead.
    dtype, row_bytes = np.dtype(features.dtype), features.row_bytes

    def read(rows: np.ndarray) -> np.ndarray:
        descriptor = file.fileno()  # Of the file, which is open as long as we are.
        samples, view = np.divmod(rows, features.augmentations)
        rows = features.file_rows(samples) * features.augmentations + view
        values = _aligned_array(len(rows), features.dim, dtype)
        filled = values.view(np.uint8)
        by_row = np.argsort(rows)
        runs = np.split(by_row, np.flatnonzero(np.diff(rows[by_row]) != 1) + 1)
        offsets = [int(rows[run[0]]) * row_bytes for run in runs]
        for run, offset in zip(runs, offsets, strict=True):  # All asked for at once:
            _advise(descriptor, offset, len(run) * row_bytes, "POSIX_FADV_WILLNEED")
        for run, offset in zip(runs, offsets, strict=True):
            for start in range(0, len(run), _ROWS_PER_READ):
                part = [filled[at] for at in run[start : start + _ROWS_PER_READ]]
                _read_into(descriptor, part, offset + start * row_bytes)
        return values

    def read_rows(rows: tf.Tensor) -> tf.Tensor:
        values = tf.numpy_function(read, [rows], tf.as_dtype(dtype))
        return tf.ensure_shape(values, (None, features.dim))

    return read_rows


def _aligned_array(rows: int, dim: int, dtype: np.dtype) -> np.ndarray:
    """Returns an unfilled array that becomes a tensor as it is, without a copy."""
    size = rows * dim * dtype.itemsize
    room = np.empty(size + TENSOR_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % TENSOR_ALIGNMENT
    return room[start : start + size].view(dtype).reshape(rows, dim)


def _advise(descriptor: int, offset: int, length: int, advice: str) -> None:
    if hasattr(os, advice):
        os.posix_fadvise(descriptor, offset, length, getattr(os, advice))


def _read_into(descriptor: int, rows: list[np.ndarray], offset: int) -> None:
    """Fills byte arrays, one after the other, from the file's bytes at `offset`."""
    while rows:
        count = os.preadv(descriptor, [one.data for one in rows], offset)
        if count == 0:
            raise OSError(
                errno.EIO, "The cached features are shorter than they should be"
            )
        offset += count
        while rows and count >= len(rows[0]):
            count -= len(rows.pop(0))
        if count:  # A network's disk may give less than it was asked for.
            rows[0] = rows[0][count:]


# Decoded images that are in memory at once, where the source gives them in one order
# only. Three times as much is: one window is decoded, one waits, one is trained on.
IMAGE_WINDOW_BYTES = 2**28
_IMAGES_A_PART = 32
_BYTES_PER_PIXEL = 3 * 4


class ImageBatches:
    """Shuffled batches of a split's images; pass both parts to `fit`."""

    def __init__(
        self,
        split: ImageSplit,
        features: FeatureSet,
        image_size: tuple[int, int],
        *,
        batch_size: int,
        seed: int,
    ):
        self._features = features
        self._image_size = image_size
        self._seed = seed
        self._positions = positions_of(features, split)
        self._split = split
        self._order_of = TrainingBatches(features, batch_size=batch_size, seed=seed)
        self.callback = self._order_of.callback
        self.failure: DataError | None = None
        windows = tf.data.Dataset.from_generator(
            self._parts,
            output_signature=(
                tf.TensorSpec((None, *image_size, 3), tf.float32),
                tf.TensorSpec((None,), tf.int64),
            ),
        )
        labels = tf.constant(features.labels)

        def complete(images: tf.Tensor, sample: tf.Tensor) -> tuple:
            return images, tf.gather(labels, sample), None, tf.cast(sample, tf.int32)

        batches = windows.prefetch(1).rebatch(batch_size).map(complete)
        self.dataset = _counted(batches, features, batch_size).prefetch(1)

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images and samples: some, or a window where a source has an order."""
        samples, rows = (part.numpy() for part in self._order_of.epoch_order())
        augmentations = self._features.augmentations
        any_order = self._split.reader.any_order
        image_bytes = _BYTES_PER_PIXEL * int(np.prod(self._image_size)) * augmentations
        window = max(1, IMAGE_WINDOW_BYTES // image_bytes)
        stretch, size = window, window
        if any_order:
            stretch, size = len(samples), min(window, _IMAGES_A_PART)
        for start in range(0, len(samples), stretch):
            positions = self._positions[samples[start : start + stretch]]
            order = np.arange(len(positions)) if any_order else np.argsort(positions)
            done = 0
            for images in self._decoded(positions[order], size):
                if not any_order:
                    images = images[np.argsort(order)]
                part = slice(start + done, start + done + len(images))
                done += len(images)
                if augmentations > 1:
                    view = rows[part] - samples[part] * augmentations
                    images = images[np.arange(len(images)), view]
                yield images, samples[part]

    def _decoded(self, positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Yields images in parts; raises DataError where one is left out."""
        ids, reader = self._split.ids[positions], self._split.reader.take(positions)
        images = dataclasses.replace(self._split, ids=ids, reader=reader).images(
            self._image_size,
            augmentations=self._features.augmentations,
            seed=self._seed,
        )
        done = 0
        for index, values in images.batch(size).prefetch(2).as_numpy_iterator():
            expected = np.arange(done, done + len(index))
            if not np.array_equal(index, expected):
                self._fail(int(positions[expected[index != expected][0]]))
            done += len(index)
            yield values
        if done < len(positions):
            self._fail(int(positions[done]))

    def _fail(self, position: int) -> NoReturn:
        self.failure = DataError(
            f"{self._split.ids[position]} could be read before and now cannot: "
            f"{self._split.read_error(position)}"
        )
        raise self.failure


def labelled_images(
    split: ImageSplit,
    features: FeatureSet,
    image_size: tuple[int, int],
    *,
    batch_size: int,
) -> tf.data.Dataset:
    """Returns a split's readable images in order, for evaluation."""
    labels = tf.constant(split.labels)
    batches = split.images(image_size).batch(batch_size)
    batches = batches.map(lambda index, images: (images, tf.gather(labels, index)))
    return _counted(batches, features, batch_size).prefetch(2)


def positions_of(features: FeatureSet, split: SampleSplit | FeatureSet) -> np.ndarray:
    """Returns where the samples of a feature set are in their split, int64 `(n,)`."""
    position_of = {sample_id: at for at, sample_id in enumerate(split.ids.tolist())}
    positions = [position_of.get(sample_id, -1) for sample_id in features.ids.tolist()]
    if -1 in positions:
        raise DataError(
            "The features must be of the images of the split. Received: features of "
            f"{features.ids[positions.index(-1)]!r}, which is not in it."
        )
    return np.array(positions, np.int64)
