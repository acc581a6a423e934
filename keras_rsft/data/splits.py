"""What the rooms above see of a data set: its splits, labels and class names.

An `ImageSplit` keeps ids and labels in memory, never images. `readers.py`
fetches an image's bytes, `decode.py` makes pixels of them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING

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
from keras_rsft.data.readers import Reader
from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.data.corrections import Corrections


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
    """The images of one split, in an order that does not change between runs.

    Attributes:
        name: "train", "validation" or "test".
        ids: Shape `(n,)`, strings: the path relative to the source with `/`
            between its parts, the TFDS id, or "digits/0123". Sorted; TFDS
            samples are in the order on disk, by shard and number.
        labels: Shape `(n,)`, int32: the given labels, right or wrong.
        clean_labels: Shape `(n,)`, int32: the right labels. None if unknown.
        reader: Fetches the images' bytes.
        reviewed: Shape `(n,)`, bool: whose given label a person has found or made
            right. None: nobody looked.
        before_review: This split as it was loaded, before a person dropped images and
            corrected labels; features kept of it are those of this one. None: nobody
            looked.
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    reader: Reader
    reviewed: np.ndarray | None = None
    before_review: ImageSplit | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when an image is added, removed or changed.

        A file counts as changed when its size or its modification time differs.
        Labels, seeds and the place where the data lie have no part in it. It is
        taken when first asked for and then kept.
        """
        return self.reader.fingerprint()

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
        _require_in_range("start", start, 0, len(self))
        stop = len(self) if stop is None else stop
        _require_in_range("stop", stop, start, len(self))
        _require_in_range("views", views, 1, 2**16 - 1)
        _require_in_range("seed", seed, -(2**63), 2**63 - 1)

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

    def encoded(self, index: int) -> bytes:
        """Returns an image as the bytes of an image file.

        Args:
            index: The image's position in this split.

        Returns:
            The file's bytes as they are, readable or not; where there is no
            file, those of a PNG or JPEG file of the image.

        Raises:
            IndexError: If there is no such position.
            OSError: If the file is gone or cannot be opened.
        """
        return self.reader.encoded(range(len(self))[index])

    def with_labels(
        self, labels: np.ndarray, clean_labels: np.ndarray | None = None
    ) -> ImageSplit:
        """Returns the same images with other labels.

        Args:
            labels: Shape `(n,)`, integers: the given labels.
            clean_labels: Shape `(n,)`, integers: the right labels. None keeps
                those that are known.

        Returns:
            A new split, of labels that nobody has reviewed; its fingerprint is the
            same.

        Raises:
            InvalidArgument: If a shape or a type is not as above.
        """
        labels = _checked_labels("labels", labels, len(self))
        if clean_labels is None:
            return dataclasses.replace(self, labels=labels, reviewed=None)
        clean = _checked_labels("clean_labels", clean_labels, len(self))
        return dataclasses.replace(
            self, labels=labels, clean_labels=clean, reviewed=None
        )

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

    def take(self, indices: np.ndarray) -> ImageSplit:
        """Returns some of the images, in the same order.

        Args:
            indices: Shape `(k,)`, strictly increasing positions in [0, n).

        Returns:
            A new split of `k` images.

        Raises:
            InvalidArgument: If the indices are not increasing or out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        inside = indices.size == 0 or (indices[0] >= 0 and indices[-1] < len(self))
        if indices.ndim != 1 or not inside or np.any(np.diff(indices) <= 0):
            raise InvalidArgument(
                "`indices` must be strictly increasing positions in "
                f"[0, {len(self)}), so that the order of the samples stays. "
                f"Received: indices={indices}. Sort them first."
            )
        clean, reviewed = (
            None if values is None else values[indices]
            for values in (self.clean_labels, self.reviewed)
        )
        return ImageSplit(
            self.name,
            self.ids[indices],
            self.labels[indices],
            clean,
            self.reader.take(indices),
            reviewed,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of labelled images.

    Attributes:
        train: The images to learn from.
        validation: The images to choose settings by.
        test: The images to judge the result by.
        class_names: The classes' names; a label is a position in it.
        source: Where the data are from, as it was asked for.
        ignored_files: How many files of a folder were not taken, because they
            are hidden or have no image suffix.
        corrections: What `apply_corrections` changed, or None.
    """

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    source: str
    ignored_files: int = 0
    corrections: Corrections | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


def _require_in_range(name: str, value: int, low: int, high: int) -> None:
    try:
        inside = low <= operator.index(value) <= high
    except TypeError:
        inside = False
    if not inside:
        raise InvalidArgument(
            f"`{name}` must be an integer in [{low}, {high}]. "
            f"Received: {name}={value!r}."
        )


def _checked_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidArgument(
            f"`{name}` must be {count} integers, one for each image. "
            f"Received: shape {labels.shape}, dtype {labels.dtype}."
        )
    return labels.astype(np.int32)
