"""What a training run shows of the selection: metrics and a guard against stalls.

Owns the counters behind `acceptance_rate` and `accepted_loss`, and the warning
when an epoch accepts nothing. The decisions themselves are in `policies.py`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import tensorflow as tf

SELECTION_METRICS = ("acceptance_rate", "accepted_loss")


class SelectionMetric(keras.metrics.Metric):
    """Counts what was accepted since the last reset.

    One vector holds all sums, so that a step pays for one assignment: accepted
    samples, samples, summed loss of the accepted, samples without a finite
    loss, and the lowest finite loss that was judged.
    """

    def __init__(self, name: str = "selection"):
        super().__init__(name=name, dtype="float32")
        self.totals = self.add_variable((4,), "zeros", dtype="float32", name="totals")
        self.lowest = self.add_variable(
            (),
            keras.initializers.Constant(float("inf")),
            dtype="float32",
            name="lowest",
        )

    def update_state(self, per_sample_loss: Any, accept_mask: Any, judged: Any) -> None:
        """Adds one batch.

        Args:
            per_sample_loss: Float32 tensor of shape `(batch,)`.
            accept_mask: Boolean tensor of shape `(batch,)`.
            judged: Float32 tensor, the losses that were compared with the
                threshold: those of the samples, or the mean of the batch.
        """
        accepted = tf.cast(accept_mask, tf.float32)
        finite = tf.math.is_finite(per_sample_loss)
        size = tf.cast(tf.size(per_sample_loss), tf.float32)
        increments = [
            tf.reduce_sum(accepted),
            size,
            tf.reduce_sum(tf.where(accept_mask, per_sample_loss, 0.0)),
            size - tf.reduce_sum(tf.cast(finite, tf.float32)),
        ]
        self.totals.assign_add(tf.stack(increments))
        judged = tf.where(tf.math.is_finite(judged), judged, float("inf"))
        self.lowest.assign(tf.minimum(self.lowest, tf.reduce_min(judged)))

    def result(self) -> dict[str, Any]:
        accepted, seen, accepted_loss, _ = tf.unstack(self.totals.value)
        return {
            "acceptance_rate": tf.math.divide_no_nan(accepted, seen),
            "accepted_loss": tf.math.divide_no_nan(accepted_loss, accepted),
        }

    def reset_state(self) -> None:
        self.totals.assign(tf.zeros((4,)))
        self.lowest.assign(float("inf"))


class AcceptanceGuard(keras.callbacks.Callback):
    """Warns when an epoch accepted nothing or met losses that are not finite.

    Every `RSFTModel.fit` has one: training never stalls in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, float] | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._seen = None

    def on_test_begin(self, logs: dict | None = None) -> None:
        # Validation resets the metrics before the epoch ends.
        self._seen = self._seen or self.model.selection_totals()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        seen = self._seen or self.model.selection_totals()
        if seen["nonfinite"] > 0:
            warnings.warn(
                f"Epoch {epoch + 1}: {seen['nonfinite']:.0f} of {seen['samples']:.0f} "
                "samples had a loss of NaN or infinity and were rejected. "
                "Look at their inputs and labels.",
                stacklevel=2,
            )
        if seen["samples"] > 0 and seen["accepted"] == 0:
            warnings.warn(_stall_message(epoch, seen, logs or {}), stacklevel=2)


def _stall_message(epoch: int, seen: dict[str, float], logs: dict[str, Any]) -> str:
    """Says that nothing was accepted, with the losses seen and what would help."""
    lowest = seen["lowest_loss"]
    if not math.isfinite(lowest):
        return f"Epoch {epoch + 1} accepted no sample: no loss was finite."
    return (
        f"Epoch {epoch + 1} accepted no sample, so nothing was learnt: the lowest "
        f"loss judged was {lowest:.4g}, the mean {logs.get('loss', lowest):.4g}. "
        f"A threshold above {lowest:.4g} accepts some; or set `warmup_steps`."
    )
