"""Per-sample data losses for anything that `compile(loss=...)` takes."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss, get_loss

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies._policy import Policy

# The loss of an element that the loss itself does not judge: padding, `ignore_class`.
# Not finite, so that every policy rejects it, and not counted by anything.
LEFT_OUT = float("-inf")
Shape = tuple[int | None, ...]
# A mean over decisions that have nothing in common.
_BINARY_KINDS = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
_BINARY_FUNCTIONS = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
)


class LossScorer:
    """Scores samples, or their elements, by the loss a model was compiled with."""

    def __init__(self, model: Any, loss: Any, loss_weights: Any):
        # Of a sample's elements by output: they must agree, to be added up.
        by_element = model.policy.level == "element"
        self.shapes: list[Shape] | None = [] if by_element else None
        self.outputs: list[Any] = []  # Each output's losses in the last call.
        self._losses = (
            loss
            if loss is None
            else _Unlogged(
                keras.tree.map_structure(
                    lambda one: one and _Unreduced(one, self, model.policy), loss
                ),
                loss_weights,
                output_names=model.output_names,
            )
        )

    @property
    def built(self) -> bool:
        """Whether it was called, and has what Keras keeps of each output's loss."""
        return self._losses is None or self._losses.built

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns float32 losses of samples `(batch,)`, or elements `(batch, ...)`."""
        if self.shapes:
            self.shapes.clear()
        self.outputs.clear()
        score: Any = self._losses
        values = score(y_true, y_pred, sample_weight)
        return ops.cast(values, "float32")


class _Unlogged(CompileLoss):
    """Keras's losses of outputs, without the metrics that it updates at each call."""

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        self._metrics[:] = [None] * len(self._metrics)


class _Unreduced(keras.losses.Loss):
    """A loss of one output: a number per sample, or per element with `shapes`."""

    def __init__(self, loss: Any, scorer: LossScorer, policy: Policy):
        super().__init__(reduction="none")
        self._loss, self._shapes, self._outputs = loss, scorer.shapes, scorer.outputs
        self._one_class = getattr(policy, "judges_by_class", False)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = get_loss(self._loss, y_true, y_pred)
        if type(loss) is LossFunctionWrapper and not keras.tree.is_nested(y_pred):
            loss = loss.fn
        if isinstance(loss, _BINARY_KINDS) or loss in _BINARY_FUNCTIONS:
            if self._shapes is not None:
                y_true, y_pred = _same_rank(y_true, y_pred)
                if y_pred.shape[-1] != 1:  # Else it would average over the last axis.
                    y_true, y_pred = y_true[..., None], y_pred[..., None]
            elif self._one_class and len(y_true.shape) > 1 and y_true.shape[-1] != 1:
                raise InvalidArgument(
                    "A policy that judges class by class (`class_floor`, "
                    "`num_classes`) needs samples of one class. Received: a binary "
                    f"loss of targets of shape {tuple(y_true.shape)}, which may have "
                    "several labels. Leave the floor out; of one-hot targets take "
                    "categorical_crossentropy."
                )
        if not isinstance(loss, keras.losses.Loss):
            return loss(*_same_rank(y_true, y_pred))
        if type(loss).__call__ is keras.losses.Loss.__call__:
            return loss.call(y_true, y_pred)
        reduction, loss.reduction = loss.reduction, "none"
        try:
            return loss(y_true, y_pred)
        finally:
            loss.reduction = reduction

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = get_keras_mask(y_pred)
        y_true, y_pred = keras.tree.map_structure(
            lambda one: ops.convert_to_tensor(one, dtype=self.dtype), (y_true, y_pred)
        )
        values = ops.convert_to_tensor(self.call(y_true, y_pred), self.dtype)
        if len(values.shape) == 0:
            raise InvalidArgument(
                "`loss` must return at least one value a sample, to choose between "
                "samples. Received: a loss that returns a single number. "
                "Return it without the mean over the batch."
            )
        _check_rows(values, keras.tree.flatten((y_pred, y_true)))
        own_mask = get_keras_mask(values)  # Of `ignore_class`.
        if sample_weight is not None:
            values = values * aligned(sample_weight, values)
        counted = None
        for one in (mask, own_mask):
            if one is not None:
                one = ops.cast(aligned(one, values), "bool")
                counted = one if counted is None else ops.logical_and(counted, one)
        values = self._by_sample(values, counted, y_pred)
        self._outputs.append(values)
        return values

    def _by_sample(self, values: Any, counted: Any, y_pred: Any) -> Any:
        if self._shapes is not None:
            return _by_element(values, counted, y_pred, self._shapes)
        if not (axes := within(values)):
            return values
        if counted is None:
            return ops.mean(values, axis=axes)
        # Padding has a loss of 0: counted, it would make short samples look easy.
        values = ops.where(counted, values, 0.0)
        counted = ops.broadcast_to(counted, ops.shape(values))
        share = ops.mean(ops.cast(counted, values.dtype), axis=axes)
        return ops.divide_no_nan(ops.mean(values, axis=axes), share)


def _check_rows(values: Any, parts: list[Any]) -> None:
    """Refuses losses of another number of samples; as far as it is known."""
    rows = next((part.shape[0] for part in parts if part.shape[0] is not None), None)
    if values.shape[0] != rows:
        raise InvalidArgument(
            "`loss` must return a value for each sample, of shape (batch,) or more. "
            f"Received: shape {tuple(values.shape)} for "
            f"{'a batch of ' if rows is None else ''}{rows or ''} samples."
        )


def _by_element(values: Any, counted: Any, y_pred: Any, shapes: list[Shape]) -> Any:
    """Returns values with NaN for a sample whose predictions are not all finite."""
    shape, predicted = tuple(values.shape[1:]), getattr(y_pred, "shape", None)
    if not shape:
        raise InvalidArgument(
            "Level 'element' needs a loss with several values a sample. Received: "
            "a loss with one. Use level 'sample', or give targets and predictions "
            "a last axis of size 1 to judge each entry."
        )
    if predicted is None or not _agree(shape, tuple(predicted[1:])[: len(shape)]):
        raise InvalidArgument(
            "Level 'element' needs a loss for each position of the predictions. "
            f"Received: losses of shape {('batch', *shape)} for predictions of "
            f"shape {predicted}. Use level 'sample'."
        )
    if not all(_agree(shape, other) for other in shapes):
        raise InvalidArgument(
            "Level 'element' needs losses of the same shape from all outputs, to "
            f"add them up element by element. Received: {('batch', *shape)} and "
            f"{('batch', *shapes[0])}. Use level 'sample'."
        )
    shapes.append(shape)
    axes = tuple(range(1, len(y_pred.shape)))
    spoiled = ops.logical_not(ops.all(ops.isfinite(y_pred), axis=axes))
    unusable = ops.logical_or(aligned(spoiled, values), values == LEFT_OUT)
    values = ops.where(unusable, float("nan"), values)
    return values if counted is None else ops.where(counted, values, LEFT_OUT)


def within(values: Any) -> tuple[int, ...]:
    """Returns the axes within a sample."""
    return tuple(range(1, len(values.shape)))


def aligned(values: Any, like: Any) -> Any:
    """Returns values with the rank and type of others; the leading axes are shared."""
    rank = len(like.shape)
    values = ops.cast(values, like.dtype)
    if len(values.shape) == rank + 1 and values.shape[-1] == 1:
        return ops.squeeze(values, axis=-1)
    missing = rank - len(values.shape)
    return values[(..., *[None] * missing)] if missing > 0 else values


def _agree(one: Shape, other: Shape) -> bool:
    """Says whether two shapes may be equal; None is an unknown size."""
    return len(one) == len(other) and all(
        None in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True)
    )


def _same_rank(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """Adds or drops a last axis of size 1, as Keras does before a loss function."""
    if len(y_true.shape) == len(y_pred.shape) + 1 and y_true.shape[-1] == 1:
        return ops.squeeze(y_true, axis=-1), y_pred
    if len(y_pred.shape) == len(y_true.shape) + 1 and y_pred.shape[-1] == 1:
        return ops.expand_dims(y_true, axis=-1), y_pred
    return y_true, y_pred
