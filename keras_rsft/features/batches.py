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
from keras_rsft.errors import InvalidArgument
from keras_rsft.features.feature_set import FeatureSet

# Above this, rows are read from disk.
MAX_BYTES_IN_MEMORY = 2**28
BLOCK_BYTES = 2**23

Order = Callable[[], tuple[tf.Tensor, tf.Tensor]]
Columns = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple]


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

    Raises:
        InvalidArgument: If the batch size is below 1.

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
        if batch_size < 1:
            raise InvalidArgument(
                f"`batch_size` must be at least 1. Received: batch_size={batch_size}."
            )
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
        columns = _with_index if self._sample_index else _without_index
        return _gathered(
            self._features, lambda: self.order(self._epoch), self._batch_size, columns
        )


def batches_of(features: FeatureSet, *, batch_size: int = 256) -> tf.data.Dataset:
    """Returns the plain images' features in order, for evaluation.

    Args:
        features: The features.
        batch_size: Samples per batch, at least 1. Default 256.

    Returns:
        `tf.data.Dataset` of `(features (batch, dim), labels (batch,))`.
    """
    samples = tf.range(len(features), dtype=tf.int64)
    order = (samples, samples * features.views)
    return _gathered(features, lambda: order, batch_size, _without_index)


class _EpochNumber(keras.callbacks.Callback):
    def __init__(self, epoch: tf.Variable):
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch.assign(epoch)


def _with_index(x: tf.Tensor, y: tf.Tensor, sample: tf.Tensor) -> tuple:
    return x, y, None, tf.cast(sample, tf.int32)


def _without_index(x: tf.Tensor, y: tf.Tensor, sample: tf.Tensor) -> tuple:
    return x, y


def _gathered(
    features: FeatureSet, order: Order, batch_size: int, columns: Columns
) -> tf.data.Dataset:
    """Returns batches of the samples and rows that `order` names.

    A batch is what `columns` makes of features, labels and the samples themselves.
    Rows are gathered for many batches at once, and no data set is made inside of
    another, since functions of `tf.data` cost more than the copying: some 30
    microseconds a call, some 5 milliseconds each time that an epoch begins.
    """
    labels = tf.constant(features.labels)
    in_memory = features.num_bytes <= MAX_BYTES_IN_MEMORY
    read = _make_table_reader(features) if in_memory else _make_row_reader(features)
    batch_bytes = 4 * features.dim * batch_size
    block_rows = batch_size * max(1, BLOCK_BYTES // batch_bytes)

    def gather(sample: tf.Tensor, row: tf.Tensor) -> tuple:
        return columns(read(row), tf.gather(labels, sample), sample)

    blocks = tf.data.Dataset.range(1).map(lambda _: order()).rebatch(block_rows)
    batches = blocks.map(gather).prefetch(1).rebatch(batch_size)
    steps = -(-len(features) // batch_size)
    return without_autotuning(
        batches.apply(tf.data.experimental.assert_cardinality(steps))
    )


def _make_table_reader(features: FeatureSet) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from int64 rows `(k,)` to features `(k, dim)` in memory."""
    if features.rows is None:
        values = np.fromfile(features.path, np.float32)
    else:
        values = features.all_views
    table = tf.constant(values.reshape(-1, features.dim))
    return lambda rows: tf.gather(table, rows)


def _make_row_reader(features: FeatureSet) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from int64 rows `(k,)` to features `(k, dim)` from disk.

    Rows are read one by one, in the order of the file. A memory map would count
    its pages as ours, and bring in many more of them than were asked for.
    """
    file = features.path.open("rb", buffering=0)
    row_bytes = 4 * features.dim
    lock = threading.Lock()

    def read(rows: np.ndarray) -> np.ndarray:
        samples, view = np.divmod(rows, features.views)
        rows = features.file_rows(samples) * features.views + view
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
