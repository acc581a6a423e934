"""Per-sample data losses for anything that `compile(loss=...)` takes.

Owns the scorer: it gives one number a sample, or one an element of a sample, without
weights, without regularisation, before any loss scaling. It decides nothing.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.backend import get_keras_mask

from keras_rsft.errors import InvalidArgument

# The loss of an element that the loss itself does not judge: padding, `ignore_class`.
# Not finite, so that every policy rejects it, and not counted by anything.
LEFT_OUT = float("-inf")


class UnreducedLoss(keras.losses.Loss):
    """A loss of one output, without its mean over the batch.

    Calls the wrapped loss's own `call`, never a copy made from its config.
    """

    def __init__(self, loss: Any):
        super().__init__(reduction="none")
        self._loss = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = self._loss
        if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
            loss = _crossentropy_for(y_true, y_pred)
        return self.values_of(keras.losses.get(loss), y_true, y_pred)

    def values_of(self, loss: Any, y_true: Any, y_pred: Any) -> Any:
        """Returns what a loss object or function gives, shape `(batch, ...)`."""
        if isinstance(loss, keras.losses.Loss):
            return loss.call(y_true, y_pred)
        return loss(*_same_rank(y_true, y_pred))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns weighted values of the loss, without what a mask leaves out."""
        mask = get_keras_mask(y_pred)
        y_true, y_pred = keras.tree.map_structure(
            lambda one: keras.ops.convert_to_tensor(one, dtype=self.dtype),
            (y_true, y_pred),
        )
        values = keras.ops.convert_to_tensor(self.call(y_true, y_pred), self.dtype)
        if len(values.shape) == 0:
            raise InvalidArgument(
                "`loss` must return at least one value a sample, to choose between "
                "samples. Received: a loss that returns a single number. "
                "Return it without the mean over the batch."
            )
        own_mask = get_keras_mask(values)  # Of `ignore_class`.
        masks = [one for one in (mask, own_mask) if one is not None]
        if sample_weight is not None:
            values = values * _aligned(sample_weight, values)
        counted = None
        for one in masks:
            one = keras.ops.cast(_aligned(one, values), "bool")
            counted = one if counted is None else keras.ops.logical_and(counted, one)
        return self.reduced(values, counted, y_pred)

    def reduced(self, values: Any, counted: Any, y_pred: Any) -> Any:
        """Returns the values as they will be judged; `counted` may be None: all are."""
        raise NotImplementedError


class PerSampleLoss(UnreducedLoss):
    """A loss of one output, reduced to one number a sample, shape `(batch,)`.

    Several values a sample (of time steps, of pixels) are averaged, without those that
    a Keras mask or `ignore_class` leaves out. With `one_class` a loss of samples with
    several labels is refused.
    """

    def __init__(self, loss: Any, *, one_class: bool = False):
        super().__init__(loss)
        self._one_class = one_class

    def values_of(self, loss: Any, y_true: Any, y_pred: Any) -> Any:
        several = len(y_true.shape) > 1 and y_true.shape[-1] != 1
        if self._one_class and several and _judges_each_entry(loss):
            raise InvalidArgument(
                "A policy that judges class by class (`class_floor`, `num_classes`) "
                "needs samples of one class. Received: a binary loss of targets of "
                f"shape {tuple(y_true.shape)}, which may have several labels. Leave "
                "the floor out; of one-hot targets take categorical_crossentropy."
            )
        return super().values_of(loss, y_true, y_pred)

    def reduced(self, values: Any, counted: Any, y_pred: Any) -> Any:
        del y_pred
        if counted is None or len(values.shape) == 1:
            return _mean_of_each_row(values)
        # Padding has a loss of 0: counted, it would make short samples look easy.
        values = keras.ops.where(counted, values, 0.0)
        counted = keras.ops.broadcast_to(counted, keras.ops.shape(values))
        share = _mean_of_each_row(keras.ops.cast(counted, values.dtype))
        return keras.ops.divide_no_nan(_mean_of_each_row(values), share)


class PerElementLoss(UnreducedLoss):
    """A loss of one output, one number an element, shape `(batch, ...)`.

    An element is what the loss has a value for: a pixel, a box, a time step; of binary
    cross-entropy each prediction, also where they are labels of one sample. What a
    Keras mask or `ignore_class` leaves out is `LEFT_OUT`. The elements of a sample
    whose predictions are not all finite are NaN: its gradients would be too. `shapes`
    are those of other outputs, with which this one must agree; its own is added.
    """

    def __init__(self, loss: Any, shapes: list[tuple[int | None, ...]]):
        super().__init__(loss)
        self._shapes = shapes

    def values_of(self, loss: Any, y_true: Any, y_pred: Any) -> Any:
        if _judges_each_entry(loss):
            y_true, y_pred = _same_rank(y_true, y_pred)
            if y_pred.shape[-1] != 1:  # Else it would average over the last axis.
                y_true, y_pred = y_true[..., None], y_pred[..., None]
        return super().values_of(loss, y_true, y_pred)

    def reduced(self, values: Any, counted: Any, y_pred: Any) -> Any:
        self._check(tuple(values.shape[1:]), getattr(y_pred, "shape", None))
        ops = keras.ops
        spoiled = ops.logical_not(
            ops.all(ops.isfinite(y_pred), axis=tuple(range(1, len(y_pred.shape))))
        )
        unusable = ops.logical_or(_aligned(spoiled, values), values == LEFT_OUT)
        values = ops.where(unusable, float("nan"), values)
        return values if counted is None else ops.where(counted, values, LEFT_OUT)

    def _check(self, shape: tuple[int | None, ...], predicted: Any) -> None:
        if not shape:
            raise InvalidArgument(
                "Level 'element' needs a loss with several values a sample. Received: "
                "a loss with one. Use level 'sample', or give targets and predictions "
                "a last axis of size 1 to judge each entry."
            )
        if predicted is None or not _agree(shape, tuple(predicted[1:])[: len(shape)]):
            raise InvalidArgument(
                "Level 'element' needs a loss for each place of the predictions. "
                f"Received: losses of shape {('batch', *shape)} for predictions of "
                f"shape {predicted}. Use level 'sample'."
            )
        if not all(_agree(shape, other) for other in self._shapes):
            raise InvalidArgument(
                "Level 'element' needs losses of the same shape from all outputs, to "
                f"add them up element by element. Received: {('batch', *shape)} and "
                f"{('batch', *self._shapes[0])}. Use level 'sample'."
            )
        self._shapes.append(shape)


class LossScorer:
    """Scores samples, or their elements, by the loss a model was compiled with.

    A model without layers is compiled with the same losses, unreduced, so that
    Keras itself pairs losses with outputs (names, dicts, lists, loss weights).
    It is held here, outside of the trained model, so that it is not saved.
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Any,
        output_names: Any,
        *,
        level: str = "sample",
        one_class: bool = False,
    ):
        self._element_shapes: list[tuple[int | None, ...]] = []

        def unreduced(one_loss: Any) -> UnreducedLoss | None:
            if one_loss is None:
                return None
            if level == "element":
                return PerElementLoss(one_loss, self._element_shapes)
            return PerSampleLoss(one_loss, one_class=one_class)

        self._model = keras.Model()
        self._model.output_names = output_names
        self._model.compile(
            optimizer=None,
            loss=keras.tree.map_structure(unreduced, loss),
            loss_weights=loss_weights,
        )

    @property
    def built(self) -> bool:
        """Whether it was called, and has what Keras keeps of each output's loss."""
        return self._model._compile_loss is None or self._model._compile_loss.built

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns float32 losses of samples `(batch,)`, or elements `(batch, ...)`."""
        self._element_shapes.clear()
        values = self._model.compute_loss(
            y=y_true, y_pred=y_pred, sample_weight=sample_weight
        )
        return keras.ops.cast(values, "float32")


def _mean_of_each_row(values: Any) -> Any:
    return keras.ops.mean(values, axis=tuple(range(1, len(values.shape))))


def _aligned(values: Any, like: Any) -> Any:
    """Returns values with the rank and type of others; the leading axes are shared."""
    rank = len(like.shape)
    values = keras.ops.cast(values, like.dtype)
    if len(values.shape) == rank + 1 and values.shape[-1] == 1:
        return keras.ops.squeeze(values, axis=-1)
    missing = rank - len(values.shape)
    return values[(..., *[None] * missing)] if missing > 0 else values


def _agree(one: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    """Says whether two shapes may be equal; None is an unknown size."""
    return len(one) == len(other) and all(
        None in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True)
    )


def _judges_each_entry(loss: Any) -> bool:
    """Says whether a loss is a mean over decisions that have nothing in common."""
    kinds = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
    functions = (
        keras.losses.binary_crossentropy,
        keras.losses.binary_focal_crossentropy,
    )
    return isinstance(loss, kinds) or loss in functions


def _crossentropy_for(y_true: Any, y_pred: Any) -> str:
    """Names the cross-entropy that Keras takes for the alias "crossentropy"."""
    if y_pred.shape[-1] == 1:
        return "binary_crossentropy"
    if len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1:
        return "sparse_categorical_crossentropy"
    return "categorical_crossentropy"


def _same_rank(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """Adds or drops a last axis of size 1, as Keras does before a loss function."""
    if len(y_true.shape) == len(y_pred.shape) + 1 and y_true.shape[-1] == 1:
        return keras.ops.squeeze(y_true, axis=-1), y_pred
    if len(y_pred.shape) == len(y_true.shape) + 1 and y_pred.shape[-1] == 1:
        return keras.ops.expand_dims(y_true, axis=-1), y_pred
    return y_true, y_pred
