"""Metrics of the selection, and a guard against stalled training."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_rsft.model._losses import LEFT_OUT

SELECTION_METRICS = ("acceptance_rate", "accepted_loss")


# The loss of a binary decision that is as likely as not.
_EVEN_LOSS = math.log(2)


def predicts_given(losses: Any, labels: Any, y_pred: Any) -> Any:
    """Says where the given label is the predicted one; False where there is none."""
    rank = len(losses.shape)
    shape: tuple[int | None, ...] = getattr(y_pred, "shape", ())
    if labels is None or len(shape) not in (rank, rank + 1):
        return ops.zeros_like(losses, dtype="bool")
    if len(shape) == rank or shape[-1] == 1:
        return ops.less(losses, _EVEN_LOSS)
    return ops.equal(ops.cast(ops.argmax(y_pred, axis=-1), "int32"), labels)


def selection_sums(losses: Any, accept_mask: Any, predicted: Any) -> Any:
    """Sums what a batch adds to the counters, in one reduction, float32 `(6,)`."""
    predicted = ops.cast(ops.reshape(predicted, (-1,)), "float32")
    judged = ops.ones_like(losses)
    if len(losses.shape) > 1:
        judged = ops.cast(ops.not_equal(losses, LEFT_OUT), "float32")
        judged, losses = (ops.reshape(one, (-1,)) for one in (judged, losses))
    accepted = ops.cast(ops.reshape(accept_mask, (-1,)), "float32")
    finite = ops.isfinite(losses)
    finite_loss = ops.where(finite, losses, 0.0)
    finite = ops.cast(finite, "float32")
    rows = [judged, accepted, accepted * finite_loss, finite, finite_loss, predicted]
    return ops.sum(ops.stack(rows), axis=1)


class SelectionMetric(keras.metrics.Metric):
    """Counts what was accepted since the last reset."""

    def __init__(self, name: str = "selection"):
        super().__init__(name=name, dtype="float32")
        self.totals = self.add_variable((6,), "zeros", dtype="float32", name="totals")
        self.lowest = self.add_variable(
            (),
            keras.initializers.Constant(float("inf")),
            dtype="float32",
            aggregation="only_first_replica",  # All replicas have seen the same.
            name="lowest",
        )

    def update_state(self, sums: Any) -> None:
        """Adds one batch: a float32 tensor `(6,)` from `selection_sums`."""
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
        samples, accepted, accepted_loss, *_ = ops.unstack(self.totals.value, 6)
        return {
            "acceptance_rate": ops.divide_no_nan(accepted, samples),
            "accepted_loss": ops.divide_no_nan(accepted_loss, accepted),
        }

    def reset_state(self) -> None:
        self.totals.assign(ops.zeros((6,)))
        self.lowest.assign(float("inf"))


# Fraction of the given labels' best share that may be lost before the guard warns.
_TOLERANCE = 0.02


class AcceptanceGuard(keras.callbacks.Callback):
    """Warns of epochs that accepted nothing, of losses that are not finite, of harm.

    Harm: after the warm-up fewer samples are accepted, all of them have a higher loss,
    and fewer of the given labels are predicted, than in the epoch that was best at it.
    Noisy labels alone raise the loss, but lower no such share.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, float] | None = None
        self._best: tuple[int, float, float, float] | None = None
        self._warned = False

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
        self._warn_of_harm(epoch, seen)

    def _warn_of_harm(self, epoch: int, seen: dict[str, float]) -> None:
        finite = seen["samples"] - seen["nonfinite"]
        if self._warned or finite <= 0:
            return
        sums = (seen["accepted"], seen["predicted"])
        accepted, predicted = (one / seen["samples"] for one in sums)
        loss = seen["loss_sum"] / finite
        policy = self.model.policy
        if self._best is not None and int(policy.steps_seen.numpy()) > (
            policy.warmup_steps
        ):
            then, more, lower, better = self._best
            falls = predicted < (1 - _TOLERANCE) * better
            if falls and accepted < more and loss > lower:
                self._warned = True
                warnings.warn(
                    f"Epoch {epoch + 1}: the policy rejects what the model still has "
                    f"to learn: {100 * accepted:.0f} % of the samples are accepted "
                    f"({100 * more:.0f} % in epoch {then + 1}), while the loss of all "
                    f"rose from {lower:.3g} to {loss:.3g}, and {100 * predicted:.0f} % "
                    f"of the given labels are predicted ({100 * better:.0f} % then). "
                    'Use policy="auto", a longer warm-up or a higher threshold.',
                    stacklevel=2,
                )
        if self._best is None or predicted > self._best[-1]:
            self._best = epoch, accepted, loss, predicted
