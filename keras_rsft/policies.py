"""Decides which samples may update the weights.

Policies see losses only; `model.py` turns their masks into updates. The
decisions are pure functions that broadcast over leading axes, so that the same
code serves one model and many trials at once. The classes around them are
Keras layers without trainable weights: they hold the numbers (a live
threshold, the steps seen) as variables, which are saved with the model and can
be changed by a callback without a retrace.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import keras
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import LEVELS, PolicyChoice


def accept_below(per_sample_loss: Any, threshold: Any) -> Any:
    """Accepts each sample whose loss is strictly below the threshold.

    Args:
        per_sample_loss: Float tensor of shape `(..., batch)`, unreduced.
        threshold: Scalar, or tensor of shape `(..., 1)`, in the loss's units.

    Returns:
        Boolean tensor of shape `(..., batch)`. NaN is never accepted.
    """
    return ops.less(per_sample_loss, threshold)  # NaN compares false: rejected.


def accept_batch_below(per_sample_loss: Any, threshold: Any) -> Any:
    """Accepts whole batches whose mean loss is strictly below the threshold.

    Args:
        per_sample_loss: Float tensor of shape `(..., batch)`, unreduced.
        threshold: Scalar, or tensor of shape `(..., 1)`, in the loss's units.

    Returns:
        Boolean tensor of shape `(..., batch)`, equal along the last axis. A
        batch that holds a NaN or an infinity is never accepted.
    """
    mean_loss = ops.mean(per_sample_loss, axis=-1, keepdims=True)
    accepted = accept_below(mean_loss, threshold)
    accepted = ops.logical_and(accepted, ops.isfinite(mean_loss))
    return ops.broadcast_to(accepted, ops.shape(per_sample_loss))


def keep_smallest(per_sample_loss: Any, keep_fraction: Any) -> Any:
    """Keeps the smallest losses of a batch (Han et al., 2018, "Co-teaching").

    Args:
        per_sample_loss: Float tensor of shape `(..., batch)`, unreduced.
        keep_fraction: Share of the finite losses to keep, in (0, 1]; a scalar
            or a tensor of shape `(..., 1)`. The number kept is rounded to the
            nearest integer, halves upwards. Of equal losses the earlier is kept.

    Returns:
        Boolean tensor of shape `(..., batch)`. At least one entry of each
        batch is True, unless none of its losses is finite.
    """
    finite = ops.isfinite(per_sample_loss)
    sortable = ops.where(finite, per_sample_loss, float("inf"))
    rank = ops.argsort(ops.argsort(sortable, axis=-1), axis=-1)
    # Counted in float32 whatever the losses are: bfloat16 has no 257.
    finite_count = ops.sum(ops.cast(finite, "float32"), axis=-1, keepdims=True)
    keep_count = ops.maximum(ops.floor(finite_count * keep_fraction + 0.5), 1.0)
    return ops.logical_and(finite, ops.less(ops.cast(rank, "float32"), keep_count))


def ramped_keep_fraction(step: Any, keep_fraction: Any, ramp_steps: Any) -> Any:
    """Falls linearly from 1 at step 0 to `keep_fraction` at step `ramp_steps`.

    The schedule of Co-teaching (Han et al., 2018): early on, everything is
    learnt, since wrong labels are memorised later than right ones.

    Args:
        step: Number of training steps already taken, at least 0.
        keep_fraction: Share kept after the ramp, in (0, 1].
        ramp_steps: Length of the ramp in steps; 0 means no ramp.

    Returns:
        Float tensor, the share to keep at this step.
    """
    progress = ops.cast(step, "float32") / ops.maximum(
        ops.cast(ramp_steps, "float32"), 1.0
    )
    no_ramp = ops.equal(ramp_steps, 0)
    progress = ops.where(no_ramp, 1.0, ops.minimum(progress, 1.0))
    return 1.0 - (1.0 - keep_fraction) * progress


class Policy(keras.layers.Layer):
    """Turns the losses of a training batch into a mask of accepted samples.

    A subclass implements `decide(per_sample_loss, step)` and, where it has
    constructor arguments, `get_config`. All variables are made in `__init__`.

    Attributes:
        level: `"sample"` if samples are accepted one by one, `"batch"` if the
            mask is equal for all samples of a batch.
        accepts_every_finite_sample: True where the policy never rejects a
            sample whose loss is finite.
        steps_seen: int32 scalar variable, training batches judged so far.
    """

    level = "sample"
    accepts_every_finite_sample = False

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("dtype", "float32")
        super().__init__(trainable=False, **kwargs)
        self.steps_seen = self.add_weight(
            name="steps_seen", shape=(), dtype="int32", initializer="zeros"
        )
        self.built = True

    def decide(self, per_sample_loss: Any, step: Any) -> Any:
        """Returns a boolean mask of the shape of `per_sample_loss`.

        Args:
            per_sample_loss: Float32 tensor of shape `(batch,)`.
            step: int32 scalar tensor, batches judged before this one.
        """
        raise NotImplementedError

    def call(self, per_sample_loss: Any) -> Any:
        """Returns the mask of `decide`, less what may never be accepted.

        A loss that is not finite is rejected whatever `decide` says; at batch
        level it takes the whole batch with it.
        """
        step = ops.convert_to_tensor(self.steps_seen)
        accept_mask = ops.logical_and(
            self.decide(per_sample_loss, step), ops.isfinite(per_sample_loss)
        )
        if self.level == "batch":
            accept_mask = ops.logical_and(accept_mask, ops.all(accept_mask))
        # Tied to the batch by a maximum that changes nothing: at the end of a data
        # set of unknown size Keras runs whatever does not wait for a batch.
        accepted_any = ops.cast(ops.any(accept_mask), "int32")
        self.steps_seen.assign(ops.maximum(step + 1, accepted_any))
        return accept_mask

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("trainable", None)
        return config


@keras.saving.register_keras_serializable(package="keras_rsft")
class AcceptAll(Policy):
    """Plain fine-tuning: every sample with a finite loss is accepted."""

    accepts_every_finite_sample = True

    def decide(self, per_sample_loss: Any, step: Any) -> Any:
        del step
        return ops.ones_like(per_sample_loss, dtype="bool")


@keras.saving.register_keras_serializable(package="keras_rsft")
class LossThreshold(Policy):
    """Accepts what has a loss strictly below a fixed threshold.

    With `level="batch"` and `warmup_steps=0` this is the rule of the RSFT
    article: a batch whose mean loss is not below the threshold is skipped.
    The threshold is live: `policy.threshold.assign(value)` takes effect at the
    next step.

    Args:
        threshold: Positive number in the loss's units. A new head on `k`
            classes starts near `ln(k)`; a threshold below that rejects
            everything unless there is a warm-up.
        level: `"sample"` judges each sample by its own loss, `"batch"` all
            samples of a batch by their mean loss. Default `"sample"`.
        warmup_steps: Steps at the start in which every finite sample is
            accepted, at least 0. Default 0.

    Raises:
        InvalidArgument: If an argument is out of its range.
    """

    def __init__(
        self,
        threshold: float,
        *,
        level: str = "sample",
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not _is_positive(threshold):
            raise InvalidArgument(
                "`threshold` must be a positive number. "
                f"Received: threshold={threshold}. A new head on k classes "
                "starts with a loss near ln(k)."
            )
        if level not in LEVELS:
            raise InvalidArgument(
                f"`level` must be one of {LEVELS}. Received: level={level!r}."
            )
        self.level = level
        self.warmup_steps = _whole_number("warmup_steps", warmup_steps)
        self.threshold = self.add_weight(
            name="threshold",
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(float(threshold)),
        )
        self._configured_threshold = float(threshold)

    def decide(self, per_sample_loss: Any, step: Any) -> Any:
        judge = accept_batch_below if self.level == "batch" else accept_below
        accept_mask = judge(per_sample_loss, self.threshold)
        if self.warmup_steps == 0:
            return accept_mask
        return ops.logical_or(accept_mask, ops.less(step, self.warmup_steps))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "threshold": self._configured_threshold,
            "level": self.level,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="keras_rsft")
class KeepFraction(Policy):
    """Keeps a fixed share of each batch: the smallest losses.

    Source: Han et al., "Co-teaching: Robust training of deep neural networks
    with extremely noisy labels", NeurIPS 2018 (the small-loss rule and its
    ramp, with one network).

    Args:
        keep_fraction: Share kept after the ramp, in (0, 1]; one minus the
            share of wrong labels is a good value.
        ramp_steps: Steps over which the kept share falls from 1 to
            `keep_fraction`, at least 0. Default 0: no ramp.

    Raises:
        InvalidArgument: If an argument is out of its range.
    """

    def __init__(self, keep_fraction: float, *, ramp_steps: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if not _is_positive(keep_fraction) or keep_fraction > 1:
            raise InvalidArgument(
                "`keep_fraction` must be in (0, 1]. "
                f"Received: keep_fraction={keep_fraction}. "
                "Use 1.0 to keep every sample."
            )
        self.ramp_steps = _whole_number("ramp_steps", ramp_steps)
        self.keep_fraction = self.add_weight(
            name="keep_fraction",
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(float(keep_fraction)),
        )
        self._configured_keep_fraction = float(keep_fraction)

    def decide(self, per_sample_loss: Any, step: Any) -> Any:
        keep_fraction = ramped_keep_fraction(step, self.keep_fraction, self.ramp_steps)
        return keep_smallest(per_sample_loss, keep_fraction)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "keep_fraction": self._configured_keep_fraction,
            "ramp_steps": self.ramp_steps,
        }


def build_policy(
    choice: PolicyChoice, *, num_classes: int, steps_per_epoch: int
) -> Policy:
    """Returns the policy that a choice by name means for one data set.

    Args:
        choice: Name and numbers, in units free of the data set's size.
        num_classes: Number of classes, at least 2.
        steps_per_epoch: Batches per epoch, at least 1.
    """
    warmup_steps = round(choice.warmup_epochs * steps_per_epoch)
    if choice.name == "accept-all":
        return AcceptAll()
    if choice.name == "keep-fraction":
        return KeepFraction(choice.keep_fraction, ramp_steps=warmup_steps)
    threshold = choice.threshold
    if threshold is None:
        threshold = choice.relative_threshold * math.log(num_classes)
    return LossThreshold(threshold, level=choice.level, warmup_steps=warmup_steps)


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and value > 0
    )


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise InvalidArgument(
            f"`{name}` must be a whole number of steps, at least 0. "
            f"Received: {name}={value!r}."
        )
    return int(value)
