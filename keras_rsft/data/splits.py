"""What the rooms above see of a data set of images: its splits.

An `ImageSplit` keeps ids and labels in memory, never images. `readers.py`
fetches an image's bytes, `decode.py` makes pixels of them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from keras_rsft.data.decode import (
    checked_size,
    decode_image,
    decode_pixels,
    decode_views,
    readable_reason,
)
from keras_rsft.data.pipeline import without_autotuning
from keras_rsft.data.samples import SampleData, SampleSplit, require_in_range
from keras_rsft.errors import InvalidArgument

_IMAGE_RANK = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit(SampleSplit):
    """The images of one split, in an order that does not change between runs.

    `ids` are paths relative to the source with `/` between their parts, the TFDS id, or
    "digits/0123". Sorted; TFDS samples are in the order on disk, by shard and number.
    For the other attributes see `SampleSplit`.
    """

    kind: ClassVar[str] = "images"

    def inputs(
        self,
        sample_shape: tuple[int | None, ...],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        if len(sample_shape) != _IMAGE_RANK:
            raise InvalidArgument(
                "The data are images, and the base takes texts. Give a base for "
                "images, or load the data as texts (--text-column, `load_texts`)."
            )
        size = sample_shape[:2]
        return self.images(size, start=start, stop=stop, views=views, seed=seed)

    def images(
        self,
        image_size: int | tuple[int, int],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Decodes the images one after the other.

        Images that cannot be read are left out: compare the indices, and ask
        `read_error` for the reason.

        Args:
            image_size: Height and width, or one number for a square.
            start: Index of the first image, in [0, n].
            stop: Index after the last image, in [start, n]. Default: n.
            views: How many versions of each image. The first is the plain one,
                each further one a random flip and crop.
            seed: Chooses the random versions, together with the image's index
                and the version's number; their order plays no part.

        Returns:
            A dataset, not batched, of `(index, image)` in index order: an int64
            scalar, and float32 of shape `(height, width, 3)` in [0, 255]. With
            `views` > 1 the latter has shape `(views, height, width, 3)`.

        Raises:
            InvalidArgument: If an argument is out of its range.
        """
        size = checked_size(image_size)
        start, stop = self.stretch(start, stop)
        require_in_range("views", views, 1, 2**16 - 1)
        require_in_range("seed", seed, -(2**63), 2**63 - 1)

        @tf.autograph.experimental.do_not_convert
        def render(index: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            encoded = self.reader.load(key)
            if views == 1:
                return index, decode_image(encoded, size)
            return index, decode_views(
                encoded, size, views=views, seed=seed, index=index
            )

        images = (
            self.reader.entries(start)
            .take(stop - start)
            .map(render, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        )
        return without_autotuning(images.ignore_errors(log_warning=False))

    def read_error(self, index: int) -> str | None:
        """Says why an image cannot be read.

        Args:
            index: The image's position in this split.

        Returns:
            One sentence, or None if the image can be read.
        """
        try:
            decode_pixels(tf.constant(self.encoded(index)))
        except tf.errors.OpError as error:
            return readable_reason(error)
        except OSError as error:
            return f"The file cannot be opened: {error.strerror}."
        return None

    def images_in_order(
        self,
        indices: np.ndarray,
        image_size: int | tuple[int, int],
        *,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Decodes some of the images in any order, from a source that can do so.

        Args:
            indices: Shape `(k,)`, positions in [0, n).
            image_size: As in `images`.
            views: As in `images`.
            seed: As in `images`.

        Returns:
            What `images` returns; the index is a position in `indices`.

        Raises:
            InvalidArgument: If the source gives its images in one order only.
        """
        if not self.reader.any_order:
            raise InvalidArgument("This source gives its images in one order only.")
        reader = self.reader.take(indices)
        ordered = dataclasses.replace(self, ids=self.ids[indices], reader=reader)
        return ordered.images(image_size, views=views, seed=seed)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData(SampleData):
    """A data set of labelled images; for its attributes see `SampleData`."""

    split_type: ClassVar[type[SampleSplit]] = ImageSplit

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
