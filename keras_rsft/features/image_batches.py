"""Feeds images to a training that runs the base in each step.

For a base of which nothing is worth keeping. The order of the samples is that of
`TrainingBatches`: it depends on the seed and the epoch's number alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from keras_rsft.data import ImageSplit
from keras_rsft.data.pipeline import without_autotuning
from keras_rsft.errors import DataError
from keras_rsft.features.batches import TrainingBatches
from keras_rsft.features.feature_set import FeatureSet

# Decoded images that are in memory at once, where the source gives them in one order
# only. Three times as much is: one window is decoded, one waits, one is trained on.
WINDOW_BYTES = 2**28
_IMAGES_A_PART = 32
_BYTES_PER_PIXEL = 3 * 4


class ImageBatches:
    """Shuffled batches of a split's images; pass both parts to `fit`."""

    def __init__(
        self,
        split: ImageSplit,
        kept: FeatureSet,
        image_size: tuple[int, int],
        *,
        batch_size: int,
        seed: int,
    ):
        self._kept = kept
        self._image_size = image_size
        self._seed = seed
        self._positions = positions_of(kept, split)
        self._split = split
        self._order_of = TrainingBatches(kept, batch_size=batch_size, seed=seed)
        self.callback = self._order_of.callback
        self.failure: DataError | None = None
        self.dataset = self._make_dataset(batch_size)

    def _make_dataset(self, batch_size: int) -> tf.data.Dataset:
        windows = tf.data.Dataset.from_generator(
            self._parts,
            output_signature=(
                tf.TensorSpec((None, *self._image_size, 3), tf.float32),
                tf.TensorSpec((None,), tf.int64),
            ),
        )
        labels = tf.constant(self._kept.labels)
        batches = windows.prefetch(1).rebatch(batch_size)
        batches = batches.map(
            lambda images, sample: (
                images,
                tf.gather(labels, sample),
                None,
                tf.cast(sample, tf.int32),
            )
        )
        steps = -(-len(self._kept) // batch_size)
        return without_autotuning(
            batches.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(1)
        )

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images and their samples, in the order of the epoch."""
        samples, rows = (part.numpy() for part in self._order_of.epoch_order())
        views = self._kept.views
        image_bytes = _BYTES_PER_PIXEL * int(np.prod(self._image_size)) * views
        read = self._streamed if self._split.reader.any_order else self._by_windows
        at = 0
        for images in read(samples, max(1, WINDOW_BYTES // image_bytes)):
            part = slice(at, at + len(images))
            at += len(images)
            if views > 1:
                view = rows[part] - samples[part] * views
                images = images[np.arange(len(images)), view]
            yield images, samples[part]

    def _streamed(self, samples: np.ndarray, window: int) -> Iterator[np.ndarray]:
        """Yields images as they are decoded, in any order that is asked for."""
        positions = self._positions[samples]
        images = self._split.images_in_order(
            positions, self._image_size, views=self._kept.views, seed=self._seed
        )
        done = 0
        parts = images.batch(min(window, _IMAGES_A_PART)).prefetch(2)
        for index, values in parts.as_numpy_iterator():
            self._require_all(index, positions, done)
            done += len(index)
            yield values
        self._require_all(np.zeros(0, np.int64), positions, done, at_the_end=True)

    def _by_windows(self, samples: np.ndarray, window: int) -> Iterator[np.ndarray]:
        """Yields windows of images that their source gives in one order only."""
        for start in range(0, len(samples), window):
            positions = self._positions[samples[start : start + window]]
            inside = np.sort(positions)
            images = self._split.take(inside).images(
                self._image_size, views=self._kept.views, seed=self._seed
            )
            decoded = images.batch(len(inside)).as_numpy_iterator()
            index, values = next(decoded, (np.zeros(0, np.int64), None))
            self._require_all(index, inside, 0, at_the_end=True)
            yield values[np.searchsorted(inside, positions)]

    def _require_all(
        self,
        index: np.ndarray,
        positions: np.ndarray,
        done: int,
        *,
        at_the_end: bool = False,
    ) -> None:
        """Raises where an image is left out: it could be read for its features."""
        last = len(positions) if at_the_end else done + len(index)
        missing = np.setdiff1d(np.arange(done, last), index)
        if len(missing):
            position = int(positions[missing[0]])
            self.failure = DataError(
                f"{self._split.ids[position]} could be read before and now cannot: "
                f"{self._split.read_error(position)}"
            )
            raise self.failure


def labelled_images(
    split: ImageSplit, kept: FeatureSet, image_size: tuple[int, int], *, batch_size: int
) -> tf.data.Dataset:
    """Returns a split's readable images in order, for evaluation."""
    labels = tf.constant(split.labels)
    batches = split.images(image_size).batch(batch_size)
    batches = batches.map(lambda index, images: (images, tf.gather(labels, index)))
    steps = -(-len(kept) // batch_size)
    return without_autotuning(
        batches.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)
    )


def positions_of(kept: FeatureSet, split: ImageSplit) -> np.ndarray:
    """Returns where the samples of a feature set are in their split, int64 `(n,)`."""
    position_of = {sample_id: at for at, sample_id in enumerate(split.ids.tolist())}
    positions = [position_of.get(sample_id, -1) for sample_id in kept.ids.tolist()]
    if -1 in positions:
        raise DataError(
            "The features must be of the images of the split. Received: features of "
            f"{kept.ids[positions.index(-1)]!r}, which is not in it."
        )
    return np.array(positions, np.int64)
