"""What a forward pass leaves for the update that may follow it, and for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops


class Pass(NamedTuple):
    """A forward pass, and the updates that it holds back.

    `minimised` are the tensors to minimise. Of `per_sample`, if it is not None, the
    mean over the accepted samples is minimised too. `pending` has the new values of the
    model's own state. `batch_loss` is Keras's own loss, where that was computed. Where
    the pass is one that decides, `judged` are the losses that the policy sees,
    `weighted` the same with the samples' weights, `penalties` what layers add, and
    `y_pred` the predictions. `tape` is what the backend goes backward through, if it
    needs something for it.
    """

    minimised: list[Any]
    per_sample: Any
    pending: keras.StatelessScope | None
    batch_loss: Any = None
    judged: Any = None
    weighted: Any = None
    penalties: Sequence[Any] = ()
    y_pred: Any = None
    tape: Any = None

    def targets(self) -> list[Any]:
        """Returns all that is minimised."""
        return [
            *self.minimised,
            *([] if self.per_sample is None else [self.per_sample]),
        ]


def shown_loss(recorded: Pass) -> Any:
    """Returns the loss for the log, a scalar of what is finite.

    Keras's own where that was computed and is finite; else the mean over the finite
    losses and what layers add. A rejected NaN must not reach the log, where it would
    set off `TerminateOnNaN`.

    Args:
        recorded: The pass that was judged.
    """
    mean = finite_mean(recorded.weighted)
    shown = sum(recorded.penalties, mean)
    shown = ops.where(ops.isfinite(shown), shown, mean)
    if recorded.batch_loss is None:
        return shown
    return ops.where(ops.isfinite(recorded.batch_loss), recorded.batch_loss, shown)


def finite_mean(values: Any) -> Any:
    """Returns the mean over the finite values, a scalar; 0 if there is none."""
    finite = ops.isfinite(values)
    total = ops.sum(ops.where(finite, values, 0.0))
    return ops.divide_no_nan(total, ops.sum(ops.cast(finite, "float32")))
