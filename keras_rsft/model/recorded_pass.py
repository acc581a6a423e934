"""What a forward pass leaves for the update that may follow it, and for the log."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops


class Pass(NamedTuple):
    """A forward pass, and the updates that it holds back.

    `minimised` are the tensors to minimise. Of `per_sample`, if it is not None, the
    mean over the accepted samples is minimised too. `pending` has the new values of the
    model's own state. `batch_loss` is Keras's own loss, where that was computed. Where
    the pass is one that decides, `judged` are the losses that the policy sees, and
    `y_pred` the predictions. `tape` is what the backend goes backward through, if it
    needs something for it.
    """

    minimised: list[Any]
    per_sample: Any
    pending: keras.StatelessScope | None
    batch_loss: Any = None
    judged: Any = None
    y_pred: Any = None
    tape: Any = None

    def targets(self) -> list[Any]:
        """Returns all that is minimised."""
        return [
            *self.minimised,
            *([] if self.per_sample is None else [self.per_sample]),
        ]


def shown_loss(recorded: Pass, sums: Any) -> Any:
    """Returns the loss for the log, of the samples whose loss is finite.

    Args:
        recorded: The pass that was judged.
        sums: Float32 `(5,)` from `selection_sums`.
    """
    _, _, _, finite_count, finite_loss = ops.unstack(sums, 5)
    finite_mean = ops.divide_no_nan(finite_loss, finite_count)
    if recorded.batch_loss is None:
        return sum(recorded.minimised, finite_mean)
    # A rejected NaN must not reach the log: it would set off TerminateOnNaN.
    is_finite = ops.isfinite(recorded.batch_loss)
    return ops.where(is_finite, recorded.batch_loss, finite_mean)
