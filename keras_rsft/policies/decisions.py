"""Which losses are accepted: pure functions of losses and numbers.

They broadcast over leading axes, so that the same code serves one model and many
trials at once. Their state is kept by the classes beside them.
"""

from __future__ import annotations

from typing import Any

from keras import ops


def accept_below(per_sample_loss: Any, threshold: Any) -> Any:
    """Accepts each sample whose loss is strictly below the threshold.

    Args:
        per_sample_loss: Float tensor of shape `(..., batch)`, unreduced.
        threshold: Scalar, or tensor of shape `(..., 1)`, in the loss's units.

    Returns:
        Boolean tensor of shape `(..., batch)`. NaN is never accepted.

    Example:
        >>> import numpy as np
        >>> losses = np.array([[0.2, 1.6], [0.2, 1.6]], "float32")  # Two trials.
        >>> thresholds = np.array([[1.0], [2.0]], "float32")
        >>> np.asarray(accept_below(losses, thresholds)).tolist()
        [[True, False], [True, True]]
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

    Example:
        >>> import numpy as np
        >>> losses = np.array([[0.2, 1.6], [1.0, 3.0]], "float32")
        >>> np.asarray(accept_batch_below(losses, 1.5)).tolist()
        [[True, True], [False, False]]
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

    Example:
        >>> import numpy as np
        >>> losses = np.array([0.2, 3.0, 0.4, np.nan, 1.0], "float32")
        >>> np.asarray(keep_smallest(losses, 0.5)).tolist()  # Half of four.
        [True, False, True, False, False]
    """
    finite = ops.isfinite(per_sample_loss)
    # Counted in float32 whatever the losses are: bfloat16 has no 257.
    finite_count = ops.sum(ops.cast(finite, "float32"), axis=-1, keepdims=True)
    # And a little more, so that 0.65 of 90 is 59 in float32 too.
    keep_count = ops.maximum(ops.floor(finite_count * keep_fraction + 0.5001), 1.0)
    losses = ops.where(finite, per_sample_loss, float("inf"))
    losses = losses + ops.zeros_like(keep_count, dtype=losses.dtype)  # All trials.
    place = ops.cast(keep_count, "int32") - 1
    largest = ops.take_along_axis(ops.sort(losses, axis=-1), place, axis=-1)
    smaller, equal = losses < largest, ops.equal(losses, largest)
    room = keep_count - ops.sum(ops.cast(smaller, "float32"), axis=-1, keepdims=True)
    earliest = ops.cumsum(ops.cast(equal, "float32"), axis=-1) <= room
    kept = ops.logical_or(smaller, ops.logical_and(equal, earliest))
    return ops.logical_and(finite, kept)


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

    Example:
        >>> kept = [ramped_keep_fraction(step, 0.6, ramp_steps=4) for step in (0, 2, 9)]
        >>> [round(float(share), 2) for share in kept]
        [1.0, 0.8, 0.6]
    """
    progress = ops.cast(step, "float32") / ops.maximum(
        ops.cast(ramp_steps, "float32"), 1.0
    )
    over = ops.logical_or(ops.equal(ramp_steps, 0), progress >= 1.0)
    keep_fraction = ops.convert_to_tensor(keep_fraction, "float32")
    # Not computed where the ramp is over: 1 - (1 - 0.15) is less than 0.15.
    return ops.where(over, keep_fraction, 1.0 - (1.0 - keep_fraction) * progress)


def grown_threshold(step: Any, threshold: Any, growth: Any, growth_steps: Any) -> Any:
    """Multiplies a threshold by `growth` in every `growth_steps` steps, smoothly.

    Args:
        step: Number of training steps already taken, at least 0.
        threshold: Threshold at step 0, positive.
        growth: Factor, at least 1.
        growth_steps: Steps after which the factor is reached, at least 1.

    Returns:
        Float tensor, the threshold at this step.

    Example:
        >>> grown = [grown_threshold(s, 0.5, 2.0, growth_steps=10) for s in (0, 20)]
        >>> [round(float(threshold), 2) for threshold in grown]
        [0.5, 2.0]
    """
    elapsed = ops.cast(step, "float32") / ops.cast(growth_steps, "float32")
    return threshold * ops.power(ops.cast(growth, "float32"), elapsed)


def running_moments(
    moments: Any, per_sample_loss: Any, members: Any, momentum: float
) -> Any:
    """Updates weighted mean and variance of the finite losses, group by group.

    West, "Updating mean and variance estimates: an improved method", Communications of
    the ACM, 1979, with batches: sums of squares would lose a small variance of large
    losses.

    Args:
        moments: Float tensor `(..., groups, 3)`: running weight, mean and variance;
            zeros at first.
        per_sample_loss: Float tensor `(..., batch)`.
        members: Float tensor `(..., groups, batch)`, 1 where a sample is of a group.
        momentum: Share of the old weight that is kept, in [0, 1).

    Returns:
        New moments. A group without finite losses keeps its own.
    """
    finite = ops.isfinite(per_sample_loss)
    # Limited, for the square of a huge loss would be infinite for ever.
    losses = ops.clip(ops.where(finite, per_sample_loss, 0.0), -1e6, 1e6)
    losses = ops.cast(losses, "float32")[..., None, :]
    members = members * ops.cast(finite, "float32")[..., None, :]
    counts = ops.sum(members, axis=-1)
    shares = members / ops.maximum(counts, 1.0)[..., None]
    batch_mean = ops.sum(shares * losses, axis=-1)
    distances = ops.square(losses - batch_mean[..., None])
    batch_variance = ops.sum(shares * distances, axis=-1)
    weight, mean, variance = (moments[..., place] for place in range(3))
    new_weight = momentum * weight + (1.0 - momentum)
    new = (1.0 - momentum) / new_weight
    moved = batch_mean - mean
    new_mean = mean + new * moved
    between = variance + new * ops.square(moved)
    new_variance = (1.0 - new) * between + new * batch_variance
    updated = ops.stack([new_weight, new_mean, new_variance], axis=-1)
    return ops.where(counts[..., None] > 0, updated, moments)


def running_percentile(
    statistics: Any, per_sample_loss: Any, members: Any, percentile: Any, momentum: Any
) -> Any:
    """Updates an exponential mean of a percentile of the losses, group by group.

    Args:
        statistics: Float tensor `(..., groups, 2)`: running sums of the weight and
            of the weighted percentile; zeros at first.
        per_sample_loss: Float tensor `(..., batch)`, unreduced.
        members: Float tensor `(groups, batch)`, 1 where a sample is of a group.
        percentile: Share of a group's losses at or below it, in (0, 1].
        momentum: Share of the old statistics that is kept, in [0, 1).

    Returns:
        New statistics. A group without finite losses keeps its own.
    """
    inside = ops.logical_and(members > 0, ops.isfinite(per_sample_loss)[..., None, :])
    losses = ops.where(inside, per_sample_loss[..., None, :], float("inf"))
    counts = ops.sum(ops.cast(inside, "float32"), axis=-1, keepdims=True)
    # Less a little, so that 0.1 of 20 is the second in float32 too.
    place = ops.maximum(ops.ceil(percentile * counts - 1e-4), 1.0) - 1.0
    found = ops.take_along_axis(
        ops.sort(losses, axis=-1), ops.cast(place, "int32"), axis=-1
    )
    seen = ops.concatenate([ops.ones_like(found), found], axis=-1)
    updated = momentum * statistics + (1.0 - momentum) * seen
    return ops.where(counts > 0, updated, statistics)


def threshold_from_percentile(statistics: Any) -> Any:
    """Returns the mean of each group's percentiles.

    Args:
        statistics: Float tensor `(..., groups, 2)` from `running_percentile`.

    Returns:
        Float tensor `(..., groups)`; infinite for a group that has seen nothing.
    """
    weight = statistics[..., 0]
    threshold = statistics[..., 1] / ops.maximum(weight, 1e-12)
    return ops.where(weight > 0, threshold, float("inf"))


def threshold_from_moments(moments: Any, deviations: Any) -> Any:
    """Returns mean plus `deviations` standard deviations of each group.

    Args:
        moments: Float tensor `(..., groups, 3)` from `running_moments`.
        deviations: Number of standard deviations, of any sign.

    Returns:
        Float tensor `(..., groups)`; infinite for a group that has seen nothing.
    """
    weight, mean, variance = (moments[..., place] for place in range(3))
    threshold = mean + deviations * ops.sqrt(variance)
    return ops.where(weight > 0, threshold, float("inf"))


def with_class_floor(
    accept_mask: Any, per_sample_loss: Any, labels: Any, class_floor: Any
) -> Any:
    """Accepts at least a share of each class in the batch: its smallest losses.

    Args:
        accept_mask: Boolean tensor `(..., batch)`, what is accepted already.
        per_sample_loss: Float tensor `(..., batch)`.
        labels: Integer tensor `(batch,)` or `(..., batch)`.
        class_floor: Share in [0, 1]; of `m` finite losses of a class at least
            `ceil(class_floor * m)` are accepted.

    Returns:
        Boolean tensor `(..., batch)`: what was accepted, and what the floor adds.

    Example:
        >>> import numpy as np
        >>> losses, labels = np.array([0.1, 5.0, 4.0], "float32"), np.array([0, 1, 1])
        >>> accepted = np.array([True, False, False])
        >>> np.asarray(with_class_floor(accepted, losses, labels, 0.5)).tolist()
        [True, False, True]
    """
    finite = ops.isfinite(per_sample_loss)
    same_class = ops.equal(labels[..., :, None], labels[..., None, :])
    peers = ops.logical_and(same_class, finite[..., None, :])
    losses = ops.where(finite, per_sample_loss, float("inf"))
    mine, theirs = losses[..., :, None], losses[..., None, :]
    places = ops.arange(losses.shape[-1] or ops.shape(losses)[-1])
    earlier = places[None, :] < places[:, None]
    before = ops.logical_or(theirs < mine, ops.logical_and(theirs == mine, earlier))
    rank = ops.sum(ops.cast(ops.logical_and(peers, before), "float32"), axis=-1)
    # Less a little, so that 0.1 of 20 is 2 in float32 too.
    least = ops.ceil(class_floor * ops.sum(ops.cast(peers, "float32"), axis=-1) - 1e-4)
    floor = ops.logical_and(finite, rank < least)
    return ops.logical_or(accept_mask, floor)
