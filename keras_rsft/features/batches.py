"""Feeds kept features to training, from memory or from disk.

Owns the order of the samples: it depends on the seed and the epoch's number
alone, so that a run that was interrupted goes on with the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.data.pipeline import without_autotuning
from keras_rsft.features.feature_set import FeatureSet

# Above this, rows are read from disk a block of batches at a time.
MAX_BYTES_IN_MEMORY = 2**28
BLOCK_BYTES = 2**25

Gathering = Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]


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
        seed: Seed of the order and of the choice among views.
        sample_index: Say which sample each row is. Default False.

    Attributes:
        dataset: `tf.data.Dataset` of `(features (batch, dim) float32, labels
            (batch,) int32)`, one epoch long; with `sample_index` of `(features,
            labels, None, indices (batch,) int32)`.
        callback: Tells the data set which epoch begins.
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        batch_size: int,
        seed: int,
        sample_index: bool = False,
    ):
        self._features = features
        self._sample_index = sample_index
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = tf.Variable(0, dtype=tf.int32, trainable=False)
        self.callback = _EpochNumber(self._epoch)
        self.dataset = self._make_dataset()

    def order(self, epoch: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the samples and their rows in an epoch, int64 `(n,)` each."""
        count, views = len(self._features), self._features.views
        seed = tf.stack([tf.cast(self._seed, tf.int32), tf.cast(epoch, tf.int32)])
        samples = tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), seed=seed
        )
        if views == 1:
            return samples, samples
        view = tf.random.stateless_uniform(
            (count,), seed=tf.add(seed, [1, 0]), maxval=views, dtype=tf.int64
        )
        return samples, samples * views + view

    def _make_dataset(self) -> tf.data.Dataset:
        gathered = _make_gathering(self._features, self._batch_size)
        steps = -(-len(self._features) // self._batch_size)
        dataset = tf.data.Dataset.range(1).flat_map(
            lambda _: gathered(*self.order(self._epoch))
        )
        if self._sample_index:
            dataset = dataset.map(lambda x, y, index: (x, y, None, index))
        else:
            dataset = dataset.map(lambda x, y, index: (x, y))
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
        return without_autotuning(dataset.prefetch(2))


def batches_of(features: FeatureSet, *, batch_size: int = 256) -> tf.data.Dataset:
    """Returns the plain images' features in order, for evaluation.

    Args:
        features: The features.
        batch_size: Samples per batch, at least 1. Default 256.

    Returns:
        `tf.data.Dataset` of `(features (batch, dim), labels (batch,))`.
    """
    samples = tf.range(len(features), dtype=tf.int64)
    rows = samples * features.views
    dataset = _make_gathering(features, batch_size)(samples, rows)
    dataset = dataset.map(lambda x, y, index: (x, y))
    return without_autotuning(dataset.prefetch(2))


class _EpochNumber(keras.callbacks.Callback):
    def __init__(self, epoch: tf.Variable):
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch.assign(epoch)


def _make_gathering(features: FeatureSet, batch_size: int) -> Gathering:
    """Returns a function from samples and their rows to a data set of batches.

    A batch is features, labels and the samples themselves.
    """
    labels = tf.constant(features.labels)
    if features.all_views.nbytes <= MAX_BYTES_IN_MEMORY:
        values = np.fromfile(features.path, np.float32).reshape(-1, features.dim)
        table = tf.constant(values)

        def from_memory(samples: tf.Tensor, rows: tf.Tensor) -> tf.data.Dataset:
            return _slices((samples, rows), batch_size).map(
                lambda sample, row: (
                    tf.gather(table, row),
                    tf.gather(labels, sample),
                    tf.cast(sample, tf.int32),
                ),
                num_parallel_calls=tf.data.AUTOTUNE,
            )

        return from_memory

    read = _make_row_reader(features)
    block_rows = batch_size * max(1, BLOCK_BYTES // (4 * features.dim * batch_size))

    def from_disk(samples: tf.Tensor, rows: tf.Tensor) -> tf.data.Dataset:
        blocks = _slices((samples, rows), block_rows).map(
            lambda sample, row: (
                read(row),
                tf.gather(labels, sample),
                tf.cast(sample, tf.int32),
            )
        )
        return blocks.prefetch(1).flat_map(lambda *block: _slices(block, batch_size))

    return from_disk


def _slices(tensors: tuple[tf.Tensor, ...], size: int) -> tf.data.Dataset:
    """Cuts tensors of equal length into consecutive pieces of `size`."""
    count = tf.shape(tensors[0], tf.int64)[0]
    starts = tf.data.Dataset.range(0, count, size)
    return starts.map(lambda start: tuple(t[start : start + size] for t in tensors))


def _make_row_reader(features: FeatureSet) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from int64 rows `(k,)` to features `(k, dim)` from disk.

    Rows are read one by one, in the order of the file. A memory map would count
    its pages as ours, and bring in many more of them than were asked for.
    """
    file = features.path.open("rb", buffering=0)
    row_bytes = 4 * features.dim
    lock = threading.Lock()

    def read(rows: np.ndarray) -> np.ndarray:
        values = np.empty((len(rows), features.dim), np.float32)
        with lock:
            for position in np.argsort(rows):
                file.seek(int(rows[position]) * row_bytes)
                file.readinto(values[position])
        return values

    def read_rows(rows: tf.Tensor) -> tf.Tensor:
        values = tf.numpy_function(read, [rows], tf.float32)
        return tf.ensure_shape(values, (None, features.dim))

    return read_rows
