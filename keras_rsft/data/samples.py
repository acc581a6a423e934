"""What all kinds of data have in common: samples with ids and labels, in splits.

A kind of data is a `SampleSplit` that says how its samples are read and which input
they are for a base: `splits.py` for images, `texts.py` for texts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import tensorflow as tf

from keras_rsft.data.readers import Reader
from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.data.corrections import Corrections


@dataclasses.dataclass(frozen=True, eq=False)
class SampleSplit(abc.ABC):
    """The samples of one split, in an order that does not change between runs.

    Attributes:
        kind: What the samples are, in the plural: "images" or "texts".
        name: "train", "validation" or "test".
        ids: Shape `(n,)`, strings.
        labels: Shape `(n,)`, int32: the given labels, right or wrong.
        clean_labels: Shape `(n,)`, int32: the right labels. None if unknown.
        reader: Fetches the samples' bytes.
        reviewed: Shape `(n,)`, bool: whose given label a person has found or made
            right. None: nobody looked.
        before_review: This split as it was loaded, before a person dropped samples and
            corrected labels; features kept of it are those of this one. None: nobody
            looked.
    """

    kind: ClassVar[str]

    name: str
    ids: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    reader: Reader
    reviewed: np.ndarray | None = None
    before_review: Self | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abc.abstractmethod
    def inputs(
        self,
        sample_shape: tuple[int | None, ...],
        *,
        start: int = 0,
        stop: int | None = None,
        views: int = 1,
        seed: int = 0,
    ) -> tf.data.Dataset:
        """Reads the samples one after the other, as a base takes them.

        Samples that cannot be read are left out: compare the indices, and ask
        `read_error` for the reason.

        Args:
            sample_shape: Shape of one input of the base: `(height, width, 3)` for
                images, `()` for texts.
            start: Index of the first sample, in [0, n].
            stop: Index after the last sample, in [start, n]. Default: n.
            views: How many versions of each sample, at least 1. Default 1.
            seed: Of the random versions. Default 0.

        Returns:
            A dataset, not batched, of `(index, input)` in index order.

        Raises:
            InvalidArgument: If the base does not take such samples.
        """

    @abc.abstractmethod
    def read_error(self, index: int) -> str | None:
        """Says in one sentence why a sample cannot be read; None if it can."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when a sample is added, removed or changed.

        A file counts as changed when its size or its modification time differs.
        Labels, seeds and the place where the data lie have no part in it. It is
        taken when first asked for and then kept.
        """
        return self.reader.fingerprint()

    def encoded(self, index: int) -> bytes:
        """Returns a sample as the bytes of a file.

        Args:
            index: The sample's position in this split.

        Returns:
            The file's bytes as they are, readable or not; where there is no
            file, those of a PNG or JPEG file of the image, or of the text in UTF-8.

        Raises:
            IndexError: If there is no such position.
            OSError: If the file is gone or cannot be opened.
        """
        return self.reader.encoded(range(len(self))[index])

    def with_labels(
        self, labels: np.ndarray, clean_labels: np.ndarray | None = None
    ) -> Self:
        """Returns the same samples with other labels.

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

    def take(self, indices: np.ndarray) -> Self:
        """Returns some of the samples, in the same order.

        Args:
            indices: Shape `(k,)`, strictly increasing positions in [0, n).

        Returns:
            A new split of `k` samples.

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
        return type(self)(
            self.name,
            self.ids[indices],
            self.labels[indices],
            clean,
            self.reader.take(indices),
            reviewed,
        )

    def stretch(self, start: int, stop: int | None) -> tuple[int, int]:
        """Returns the two ends of a part of the split.

        Raises:
            InvalidArgument: If they are out of range.
        """
        require_in_range("start", start, 0, len(self))
        stop = len(self) if stop is None else stop
        require_in_range("stop", stop, start, len(self))
        return start, stop


@dataclasses.dataclass(frozen=True, eq=False)
class SampleData:
    """A data set of labelled samples.

    Attributes:
        train: The samples to learn from.
        validation: The samples to choose settings by.
        test: The samples to judge the result by.
        class_names: The classes' names; a label is a position in it.
        source: Where the data are from, as it was asked for.
        ignored_files: How many files of a folder were not taken, because they
            are hidden or have another suffix.
        corrections: What `apply_corrections` changed, or None.
    """

    split_type: ClassVar[type[SampleSplit]]

    train: SampleSplit
    validation: SampleSplit
    test: SampleSplit
    class_names: tuple[str, ...]
    source: str
    ignored_files: int = 0
    corrections: Corrections | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def kind(self) -> str:
        """What the samples are, in the plural: "images" or "texts"."""
        return self.train.kind


def require_in_range(name: str, value: int, low: int, high: int) -> None:
    """Raises InvalidArgument unless a value is an integer in [low, high]."""
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
            f"`{name}` must be {count} integers, one for each sample. "
            f"Received: shape {labels.shape}, dtype {labels.dtype}."
        )
    return labels.astype(np.int32)
