"""Losses of the elements of samples: what a training step makes of them.

Owns what differs where pixels, boxes or labels within a sample are judged rather than
samples. With losses `(batch,)` each function does what sample level needs, so that the
training step is one for all levels. The losses come from `per_sample_loss.py`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rsft.model.batch import class_labels
from keras_rsft.model.per_sample_loss import LEFT_OUT


def labels_of(y: Any, losses: Any) -> Any:
    """Returns the classes that targets name, int32 of the shape of `losses`, or None.

    Args:
        y: Targets: integers or one-hot rows, one for each loss.
        losses: Float tensor `(batch,)` or `(batch, ...)`.
    """
    rank = len(losses.shape)
    if rank == 1:
        return class_labels(y)
    if isinstance(y, (dict, list, tuple)) or y is None:
        return None
    if len(y.shape) == rank + 1:
        if y.shape[-1] != 1:
            return ops.cast(ops.argmax(y, axis=-1), "int32")
        y = ops.squeeze(y, axis=-1)
    named = len(y.shape) == rank and keras.backend.is_int_dtype(y.dtype)
    return ops.cast(y, "int32") if named else None


def all_judged_finite(losses: Any) -> Any:
    """Says whether all losses are finite, but for those of elements left out."""
    finite = ops.isfinite(losses)
    if len(losses.shape) > 1:
        finite = ops.logical_or(finite, ops.equal(losses, LEFT_OUT))
    return ops.all(finite)


def unusable_overwritten(data: Any, losses: Any) -> Any:
    """Returns a batch in which samples with no finite loss are overwritten.

    A NaN in one row would reach the gradients of all, since 0 x NaN is NaN: masking
    the loss is not enough. Such rows become copies of the first that has a finite loss,
    and stay masked. All others stay: a BatchNorm sees what it saw before.

    Args:
        data: Tensors `(batch, ...)` or None, in any structure.
        losses: Float32 tensor `(batch,)` or `(batch, ...)`; not all of them need be
            finite.
    """
    usable = ops.isfinite(losses)
    if len(losses.shape) > 1:
        axes = _within(losses)
        nothing_judged = ops.all(ops.equal(losses, LEFT_OUT), axis=axes)
        usable = ops.logical_or(ops.any(usable, axis=axes), nothing_judged)
    rows = ops.arange(ops.shape(usable)[0], dtype="int32")
    # A replica may have no row: there is then none to copy.
    first_usable = ops.argmax(ops.pad(ops.cast(usable, "int32"), ((0, 1),)))
    rows = ops.where(usable, rows, ops.cast(first_usable, "int32"))
    return keras.tree.map_structure(
        lambda part: None if part is None else ops.take(part, rows, axis=0), data
    )


def only_accepted(y_pred: Any, accept_mask: Any) -> Any:
    """Returns predictions through which rejected elements have no gradient at all.

    A loss that is not finite may have a gradient that is not either, and 0 x NaN is
    NaN: masking the loss is not enough.

    Args:
        y_pred: Predictions `(batch, ...)`, one tensor or a structure of them. Their
            shapes begin with that of the mask, unless that is `(batch,)`.
        accept_mask: Boolean tensor `(batch,)`, with which nothing is changed, or
            `(batch, ...)`.
    """
    if len(accept_mask.shape) == 1:
        return y_pred

    def chosen(values: Any) -> Any:
        further_axes = [None] * (len(values.shape) - len(accept_mask.shape))
        mask = accept_mask[(..., *further_axes)]
        return ops.where(mask, values, ops.zeros_like(values))

    return keras.tree.map_structure(chosen, y_pred)


def noted(losses: Any, accept_mask: Any) -> tuple[Any, Any]:
    """Returns what a ledger notes of each sample.

    Args:
        losses: Float32 tensor `(batch,)`, or `(batch, ...)` with a value an element.
        accept_mask: Boolean tensor of the same shape.

    Returns:
        Losses, float32 `(batch,)`: the mean over the elements whose loss is finite,
        NaN where none is. And which samples count as accepted, boolean `(batch,)`:
        those of whose judged elements at least half, and at least one, were.
    """
    if len(losses.shape) == 1:
        return losses, accept_mask
    axes = _within(losses)
    finite = ops.isfinite(losses)
    sums = ops.sum(ops.where(finite, losses, 0.0), axis=axes)
    means = sums / ops.sum(ops.cast(finite, "float32"), axis=axes)
    judged = ops.sum(ops.cast(ops.not_equal(losses, LEFT_OUT), "int32"), axis=axes)
    accepted = ops.sum(ops.cast(accept_mask, "int32"), axis=axes)
    return means, ops.logical_and(accepted > 0, 2 * accepted >= judged)


def _within(values: Any) -> tuple[int, ...]:
    return tuple(range(1, len(values.shape)))
