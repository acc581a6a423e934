"""Metrics of the selection, and a guard against stalled training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.src.trainers.compile_utils import CompileLoss

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._losses import LEFT_OUT

SELECTION_METRICS = ("acceptance_rate", "accepted_loss")


# Classes that are counted apart; further ones are counted with the last.
_CLASSES = 1_000


def selection_sums(losses: Any, accept_mask: Any, labels: Any) -> tuple[Any, Any]:
    """Sums what a batch adds to the counters, in one reduction, float32 `(5,)`.

    And how many samples of each class were judged, and accepted, `(1000, 2)`; None
    where the labels are no classes.
    """
    judged = ops.ones_like(losses)
    if len(losses.shape) > 1:
        judged = ops.cast(ops.not_equal(losses, LEFT_OUT), "float32")
        judged, losses = (ops.reshape(one, (-1,)) for one in (judged, losses))
    accepted = ops.cast(ops.reshape(accept_mask, (-1,)), "float32")
    finite = ops.isfinite(losses)
    finite_loss = ops.where(finite, losses, 0.0)
    finite = ops.cast(finite, "float32")
    rows = [judged, accepted, accepted * finite_loss, finite, finite_loss]
    sums = ops.sum(ops.stack(rows), axis=1)
    if labels is None:
        return sums, None
    groups = ops.minimum(ops.reshape(labels, (-1,)), _CLASSES - 1)  # None is negative.
    counted = ops.stack([judged, accepted], axis=1)
    return sums, ops.segment_sum(counted, groups, num_segments=_CLASSES)


class LossMean(keras.metrics.Mean):
    """Keras's mean of the losses of batches; of none it is NaN, not 0."""

    # Of a training batch: mean and weight of its finite losses, where Keras's is not.
    instead: tuple[Any, Any] | None = None

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        if self.instead is not None:
            finite, (mean, weight) = ops.isfinite(values), self.instead
            values = ops.where(finite, values, mean)
            given = 1.0 if sample_weight is None else float(sample_weight)
            sample_weight = ops.where(finite, given, weight)
        super().update_state(values, sample_weight)

    def add(self, mean: Any, count: Any) -> None:
        """Adds the mean of some losses, in half the operations of `update_state`."""
        _add(self.total, mean * count)
        _add(self.count, count)

    def result(self) -> Any:
        return self.total / self.count


class OutputLosses(CompileLoss):
    """Keras's losses of a model's outputs; the log of each is a `LossMean`."""

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        self._metrics[:] = [LossMean(name=metric.name) for metric in self._metrics]

    def log(self, outputs: list[Any], compute: Callable[[], Any] | None) -> Any:
        """Logs each output's losses `(batch, ...)`; by Keras, if it is to compute one.

        As in Keras, batches count alike where their size is not known in advance.
        """
        for metric, losses in zip(self._metrics, outputs, strict=True):
            finite = ops.isfinite(losses)
            count = ops.sum(ops.cast(finite, "float32"))
            total = ops.sum(ops.where(finite, losses, 0.0))
            weight = count if losses.shape[0] else ops.minimum(count, 1.0)
            metric.instead = ops.divide_no_nan(total, count), weight
        try:
            if compute is not None:
                return compute()
            for metric in self._metrics:
                metric.update_state(float("nan"))
        finally:
            for metric in self._metrics:
                metric.instead = None
        return None


class SelectionMetric(keras.metrics.Metric):
    """Counts what was accepted since the last reset."""

    def __init__(self, name: str = "selection"):
        super().__init__(name=name, dtype="float32")
        self.totals = self.add_variable((5,), "zeros", dtype="float32", name="totals")
        self.classes = self.add_variable(
            (_CLASSES, 2), "zeros", dtype="float32", name="classes"
        )
        # All replicas have seen the same.
        once = {"dtype": "float32", "aggregation": "only_first_replica"}
        infinite = keras.initializers.Constant(float("inf"))
        self.lowest = self.add_variable((), infinite, name="lowest", **once)
        self.steps_not_finite = self.add_variable(
            (), "zeros", name="steps_not_finite", **once
        )

    def update_state(self, sums: Any, of_classes: Any = None) -> None:
        """Adds one batch: what `selection_sums` returns."""
        _add(self.totals, sums)
        if of_classes is not None:
            _add(self.classes, of_classes)

    def note_rejected(self, losses: Any, level: str) -> None:
        """Remembers the lowest loss that was judged in a step that accepted nothing."""
        judged = ops.mean(losses) if level == "batch" else losses
        judged = ops.where(ops.isfinite(judged), judged, float("inf"))
        self.lowest.assign(ops.minimum(self.lowest.value, ops.min(judged)))

    def result(self) -> dict[str, Any]:
        samples, accepted, accepted_loss, _, _ = ops.unstack(self.totals.value, 5)
        return {
            "acceptance_rate": ops.divide_no_nan(accepted, samples),
            "accepted_loss": accepted_loss / accepted,  # NaN, not 0, of none.
        }

    def reset_state(self) -> None:
        self.totals.assign(ops.zeros((5,)))
        self.classes.assign(ops.zeros((_CLASSES, 2)))
        self.lowest.assign(float("inf"))
        self.steps_not_finite.assign(0.0)


def _add(variable: Any, value: Any) -> None:
    if keras.backend.backend() == "tensorflow":
        variable.value.assign_add(value)  # `assign` would copy all of it.
    else:
        variable.assign(variable.value + value)


def _check_numbers(optimizer: Any) -> None:
    """Refuses an optimizer that would make all weights NaN."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    rate = optimizer.learning_rate
    numbers = {k: v for k, v in vars(optimizer).items() if isinstance(v, float)}
    # A product is a plain tensor, also of a variable that is on several devices.
    numbers["learning_rate"] = float(ops.multiply(rate, 1.0))
    for name, value in numbers.items():
        if math.isnan(value) or (name == "learning_rate" and math.isinf(value)):
            raise InvalidArgument(
                f"`{name}` of the optimizer must be a finite number. Received: "
                f"{type(optimizer).__name__} with {name}={value}."
            )


# A class of at least this many samples, of which no larger fraction is accepted, is not
# learnt any more.
_LEAST_SAMPLES, _LEAST_ACCEPTED = 10, 0.1


class AcceptanceGuard(keras.callbacks.Callback):
    """Warns of epochs that accepted nothing, of losses that are not finite, of harm.

    Harm: after the warm-up fewer samples are accepted, all of them have a higher loss
    than in the epoch before, and of some class hardly any is accepted. Noisy labels
    alone do the first two, but leave each class its clean ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, Any] | None = None
        self._best, self._loss_before = (0, 0.0), math.inf
        self._warned = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._seen = None
        _check_numbers(self.model.optimizer)

    def on_test_begin(self, logs: dict | None = None) -> None:
        # Validation resets the metrics before the epoch ends.
        self._seen = self._seen or self._counted()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        seen = self._seen or self._counted()
        judged = "element" if self.model.policy.level == "element" else "sample"
        if seen["nonfinite"] > 0:
            warnings.warn(
                f"Epoch {epoch + 1}: {seen['nonfinite']:.0f} of {seen['samples']:.0f} "
                f"{judged}s had a loss of NaN or infinity and were rejected. "
                "Look at their inputs and labels.",
                stacklevel=2,
            )
        steps = seen["steps_not_finite"]
        # Those that a loss scale was too high for are part of its search.
        scaled = isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer)
        if steps > 0 and (not scaled or seen["accepted"] == 0):
            warnings.warn(
                f"Epoch {epoch + 1}: {steps:.0f} steps changed nothing, because the "
                "gradient, or a state such as the mean of a BatchNorm, was NaN or "
                "infinite, though the loss was not. Look at the inputs, and at square "
                "roots, logarithms and divisions in the model.",
                stacklevel=2,
            )
        if seen["samples"] > 0 and seen["accepted"] == 0:
            lowest = seen["lowest_loss_rejected"]
            found = f": no {'gradient' if steps > 0 else 'loss'} was finite."
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

    def _counted(self) -> dict[str, Any]:
        classes = self.model.selection.classes.numpy()
        return self.model.selection_totals() | {"classes": classes}

    def _warn_of_harm(self, epoch: int, seen: dict[str, Any]) -> None:
        finite = seen["samples"] - seen["nonfinite"]
        if self._warned or finite <= 0:
            return
        accepted, loss = seen["accepted"] / seen["samples"], seen["loss_sum"] / finite
        judged, learnt = seen["classes"].T
        known = judged >= _LEAST_SAMPLES
        left_out = known & (learnt < _LEAST_ACCEPTED * judged)
        policy, (best_epoch, best) = self.model.policy, self._best
        if (
            int(policy.steps_seen.numpy()) > policy.warmup_steps
            and accepted < best
            and loss > self._loss_before
            and left_out.any()
        ):
            self._warned = True
            warnings.warn(
                f"Epoch {epoch + 1}: the policy rejects what the model still has to "
                f"learn: it accepts {100 * accepted:.0f} % of the samples "
                f"({100 * best:.0f} % in epoch {best_epoch + 1}) and hardly any of "
                f"{left_out.sum()} of {known.sum()} classes, while the loss of all "
                f"samples rises, from {self._loss_before:.3g} to {loss:.3g}. Use "
                'policy="auto", a longer warm-up or a higher threshold.',
                stacklevel=2,
            )
        self._loss_before = loss
        if accepted > best:
            self._best = epoch, accepted
