"""Metrics of the selection, and a guard against stalled training."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_rsft.model._losses import LEFT_OUT

SELECTION_METRICS = ("acceptance_rate", "accepted_loss")


def selection_sums(losses: Any, accept_mask: Any) -> Any:
    """Sums what a batch adds to the counters, in one reduction, float32 `(5,)`."""
    judged = ops.ones_like(losses)
    if len(losses.shape) > 1:
        judged = ops.cast(ops.not_equal(losses, LEFT_OUT), "float32")
        judged, losses = (ops.reshape(one, (-1,)) for one in (judged, losses))
    accepted = ops.cast(ops.reshape(accept_mask, (-1,)), "float32")
    finite = ops.isfinite(losses)
    finite_loss = ops.where(finite, losses, 0.0)
    finite = ops.cast(finite, "float32")
    rows = [judged, accepted, accepted * finite_loss, finite, finite_loss]
    return ops.sum(ops.stack(rows), axis=1)


class SelectionMetric(keras.metrics.Metric):
    """Counts what was accepted since the last reset."""

    def __init__(self, name: str = "selection"):
        super().__init__(name=name, dtype="float32")
        self.totals = self.add_variable((5,), "zeros", dtype="float32", name="totals")
        self.lowest = self.add_variable(
            (),
            keras.initializers.Constant(float("inf")),
            dtype="float32",
            aggregation="only_first_replica",  # All replicas have seen the same.
            name="lowest",
        )

    def update_state(self, sums: Any) -> None:
        """Adds one batch: a float32 tensor `(5,)` from `selection_sums`."""
        if keras.backend.backend() == "tensorflow":
            self.totals.value.assign_add(sums)  # `assign` would copy all of it.
        else:
            self.totals.assign(self.totals.value + sums)

    def note_rejected(self, losses: Any, level: str) -> None:
        """Remembers the lowest loss that was judged in a step that accepted nothing."""
        judged = ops.mean(losses) if level == "batch" else losses
        judged = ops.where(ops.isfinite(judged), judged, float("inf"))
        self.lowest.assign(ops.minimum(self.lowest.value, ops.min(judged)))

    def result(self) -> dict[str, Any]:
        samples, accepted, accepted_loss, _, _ = ops.unstack(self.totals.value, 5)
        return {
            "acceptance_rate": ops.divide_no_nan(accepted, samples),
            "accepted_loss": ops.divide_no_nan(accepted_loss, accepted),
        }

    def reset_state(self) -> None:
        self.totals.assign(ops.zeros((5,)))
        self.lowest.assign(float("inf"))


class AcceptanceGuard(keras.callbacks.Callback):
    """Warns when an epoch accepted nothing or met losses that are not finite."""

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
        judged = "element" if self.model.policy.level == "element" else "sample"
        if seen["nonfinite"] > 0:
            warnings.warn(
                f"Epoch {epoch + 1}: {seen['nonfinite']:.0f} of {seen['samples']:.0f} "
                f"{judged}s had a loss of NaN or infinity and were rejected. "
                "Look at their inputs and labels.",
                stacklevel=2,
            )
        if seen["samples"] > 0 and seen["accepted"] == 0:
            lowest = seen["lowest_loss_rejected"]
            found = ": no loss was finite."
            if math.isfinite(lowest):
                mean = (logs or {}).get("loss", lowest)
                found = (
                    f", so nothing was learnt: the lowest loss judged was {lowest:.4g},"
                    f" the mean {mean:.4g}. A threshold above {lowest:.4g} accepts "
                    "some; or begin with a warm-up."
                )
            warnings.warn(
                f"Epoch {epoch + 1} accepted no {judged}{found}", stacklevel=2
            )
