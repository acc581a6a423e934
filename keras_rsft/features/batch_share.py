"""Which rows of a batch are whose, where several replicas train on it."""

from __future__ import annotations

import dataclasses
import itertools

import tensorflow as tf

from keras_rsft.errors import InvalidArgument


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of each batch that the replicas of one process take."""

    replicas: int
    first: int
    count: int

    def row_counts(self, batch_size: int) -> list[int]:
        """Returns how many rows of a full batch each replica of this process takes."""
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
        """Returns what this process takes of the samples and rows of an epoch."""
        edges = self._edges(batch_size)
        place = tf.range(tf.size(order[0])) % batch_size
        ours = (place >= edges[0]) & (place < edges[-1])
        return tuple(tf.boolean_mask(part, ours) for part in order)

    def _edges(self, batch_size: int) -> list[int]:
        numbers = range(self.first, self.first + self.count + 1)
        return [batch_size * number // self.replicas for number in numbers]
