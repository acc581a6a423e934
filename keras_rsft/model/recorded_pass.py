"""What a forward pass leaves for the update that may follow it, and for the log."""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf


class Pass(NamedTuple):
    """A forward pass, and the updates that it holds back.

    `tape` is None where the pass only judged. `minimised` are the tensors to minimise.
    Of `per_sample`, if it is not None, the mean over the accepted samples is
    minimised too. `batch_loss` is Keras's own loss, where that was computed.
    """

    tape: tf.GradientTape | None
    minimised: list[tf.Tensor]
    per_sample: tf.Tensor | None
    pending: keras.StatelessScope
    batch_loss: tf.Tensor | None = None


def shown_loss(recorded: Pass, sums: tf.Tensor) -> tf.Tensor:
    """Returns the loss for the log, of the samples whose loss is finite.

    Args:
        recorded: The pass that was judged.
        sums: Float32 `(5,)` from `selection_sums`.
    """
    _, _, _, finite_count, finite_loss = tf.unstack(sums)
    finite_mean = tf.math.divide_no_nan(finite_loss, finite_count)
    if recorded.batch_loss is None:
        return sum(recorded.minimised, finite_mean)
    # A rejected NaN must not reach the log: it would set off TerminateOnNaN.
    is_finite = tf.math.is_finite(recorded.batch_loss)
    return tf.where(is_finite, recorded.batch_loss, finite_mean)
