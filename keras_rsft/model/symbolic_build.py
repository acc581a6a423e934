"""What Keras builds before it trains, where a batch has a fourth part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keras_rsft.model.batch import unpack


class SymbolicBuild:
    """Builds from the first three parts of a batch, under JAX and PyTorch.

    Goes before `keras.Model` among a class's bases. Under TensorFlow Keras builds
    while it traces the step.
    """

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None:
            iterator = _first_three_parts(iterator)
        super()._symbolic_build(iterator=iterator, data_batch=data_batch)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Computes the loss of a batch, as Keras does; builds the scorer with it."""
        if not self._scorer.built:
            self._scorer(y, y_pred)
        return super().compute_loss(x, y, y_pred, sample_weight, training)


def _first_three_parts(iterator: Any) -> Iterator[tuple[int, int, list[Any]]]:
    for begin, end, batches in iterator:
        listed = isinstance(batches, (list, tuple))
        batch = batches[0] if listed else next(batches)
        yield begin, end, [unpack(batch)[:3]]
