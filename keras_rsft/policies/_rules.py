"""Decides which losses are accepted. Pure functions of losses and parameters."""

from __future__ import annotations

from typing import Any

from keras import ops

LEAST_OF_A_HARD_CLASS = 0.1


def after_warmup(accept_mask: Any, in_warmup: Any, step: Any, warmup_steps: Any) -> Any:
    """Returns one mask during the first steps, and the other after them."""
    return ops.where(ops.less(step, warmup_steps), in_warmup, accept_mask)


def accept_below(losses: Any, threshold: Any) -> Any:
    """Accepts each sample whose loss is strictly below the threshold."""
    return ops.less(losses, threshold)  # NaN compares false: rejected.


def accept_batch_below(losses: Any, threshold: Any, present: Any = None) -> Any:
    """Accepts whole batches whose mean loss is finite and strictly below it."""
    if present is None:
        mean_loss = ops.mean(losses, axis=-1, keepdims=True)
    else:
        total = ops.sum(ops.where(present, losses, 0.0), axis=-1, keepdims=True)
        mean_loss = total / ops.sum(ops.cast(present, losses.dtype))
    accepted = accept_below(mean_loss, threshold)
    accepted = ops.logical_and(accepted, ops.isfinite(mean_loss))
    return ops.broadcast_to(accepted, ops.shape(losses))


def accept_listed(listed: Any, losses: Any, labels: Any, loss_limit: Any) -> Any:
    """Accepts what is listed and below the limit, and some of each class listed."""
    accept_mask = ops.logical_and(listed, accept_below(losses, loss_limit))
    if labels is None:
        return accept_mask
    losses = ops.where(listed, losses, float("inf"))
    return with_class_floor(accept_mask, losses, labels, LEAST_OF_A_HARD_CLASS)


def keep_smallest(losses: Any, keep_fraction: Any) -> Any:
    """Keeps the smallest finite losses (Han et al., 2018, "Co-teaching")."""
    finite = ops.isfinite(losses)
    # Counted in float32 whatever the losses are: bfloat16 has no 257.
    finite_count = ops.sum(ops.cast(finite, "float32"), axis=-1, keepdims=True)
    # And a little more, so that 0.65 of 90 is 59 in float32 too.
    keep_count = ops.maximum(ops.floor(finite_count * keep_fraction + 0.5001), 1.0)
    losses = ops.where(finite, losses, float("inf"))
    losses = losses + ops.zeros_like(keep_count, dtype=losses.dtype)  # All trials.
    index = ops.cast(keep_count, "int32") - 1
    largest = ops.take_along_axis(ops.sort(losses, axis=-1), index, axis=-1)
    smaller, equal = losses < largest, ops.equal(losses, largest)
    room = keep_count - ops.sum(ops.cast(smaller, "float32"), axis=-1, keepdims=True)
    earliest = ops.cumsum(ops.cast(equal, "float32"), axis=-1) <= room
    kept = ops.logical_or(smaller, ops.logical_and(equal, earliest))
    return ops.logical_and(finite, kept)


def ramped_keep_fraction(step: Any, keep_fraction: Any, ramp_steps: Any) -> Any:
    """Falls linearly from 1 to `keep_fraction` (Han et al., 2018, "Co-teaching")."""
    steps = ops.maximum(ops.cast(ramp_steps, "float32"), 1.0)
    progress = ops.cast(step, "float32") / steps
    over = ops.logical_or(ops.equal(ramp_steps, 0), progress >= 1.0)
    keep_fraction = ops.convert_to_tensor(keep_fraction, "float32")
    # Not computed where the ramp is over: 1 - (1 - 0.15) is less than 0.15.
    return ops.where(over, keep_fraction, 1.0 - (1.0 - keep_fraction) * progress)


def grown_threshold(step: Any, threshold: Any, growth: Any, growth_steps: Any) -> Any:
    """Multiplies a threshold by `growth` in every `growth_steps` steps, smoothly."""
    elapsed = ops.cast(step, "float32") / ops.cast(growth_steps, "float32")
    return threshold * ops.power(ops.cast(growth, "float32"), elapsed)


def running_moments(moments: Any, losses: Any, members: Any, momentum: float) -> Any:
    """Updates weight, mean and variance `(..., groups, 3)` of each group's losses."""
    finite = ops.isfinite(losses)
    # Limited, because the square would overflow and stay infinite.
    losses = ops.clip(ops.where(finite, losses, 0.0), -1e6, 1e6)
    losses = ops.cast(losses, "float32")[..., None, :]
    members = members * ops.cast(finite, "float32")[..., None, :]
    counts = ops.sum(members, axis=-1)
    shares = members / ops.maximum(counts, 1.0)[..., None]
    batch_mean = ops.sum(shares * losses, axis=-1)
    distances = ops.square(losses - batch_mean[..., None])
    batch_variance = ops.sum(shares * distances, axis=-1)
    weight, mean, variance = (moments[..., column] for column in range(3))
    new_weight = momentum * weight + (1.0 - momentum)
    new = (1.0 - momentum) / new_weight
    moved = batch_mean - mean
    new_mean = mean + new * moved
    between = variance + new * ops.square(moved)
    new_variance = (1.0 - new) * between + new * batch_variance
    updated = ops.stack([new_weight, new_mean, new_variance], axis=-1)
    return ops.where(counts[..., None] > 0, updated, moments)


def threshold_from_moments(moments: Any, deviations: Any) -> Any:
    """Returns each group's mean plus some deviations; infinite where unseen."""
    weight, mean, variance = (moments[..., column] for column in range(3))
    threshold = mean + deviations * ops.sqrt(variance)
    return ops.where(weight > 0, threshold, float("inf"))


def running_percentile(
    statistics: Any, losses: Any, members: Any, percentile: Any, momentum: Any
) -> Any:
    """Updates `(..., groups, 2)`: sums of the weight and of the weighted percentile."""
    inside = ops.logical_and(members > 0, ops.isfinite(losses)[..., None, :])
    losses = ops.where(inside, losses[..., None, :], float("inf"))
    counts = ops.sum(ops.cast(inside, "float32"), axis=-1, keepdims=True)
    # Less a little, so that 0.1 of 20 is the second in float32 too.
    index = ops.maximum(ops.ceil(percentile * counts - 1e-4), 1.0) - 1.0
    ranked, index = ops.sort(losses, axis=-1), ops.cast(index, "int32")
    found = ops.take_along_axis(ranked, index, axis=-1)
    seen = ops.concatenate([ops.ones_like(found), found], axis=-1)
    updated = momentum * statistics + (1.0 - momentum) * seen
    return ops.where(counts > 0, updated, statistics)


def threshold_from_percentile(statistics: Any) -> Any:
    """Returns the mean of each group's percentiles, infinite where nothing is seen."""
    weight = statistics[..., 0]
    threshold = statistics[..., 1] / ops.maximum(weight, 1e-12)
    return ops.where(weight > 0, threshold, float("inf"))


def with_class_floor(
    accept_mask: Any, losses: Any, labels: Any, class_floor: Any
) -> Any:
    """Also accepts the smallest losses of each class, a fraction of its samples."""
    finite = ops.isfinite(losses)
    same_class = ops.equal(labels[..., :, None], labels[..., None, :])
    peers = ops.logical_and(same_class, finite[..., None, :])
    losses = ops.where(finite, losses, float("inf"))
    mine, theirs = losses[..., :, None], losses[..., None, :]
    index = ops.arange(losses.shape[-1] or ops.shape(losses)[-1])
    earlier = index[None, :] < index[:, None]
    before = ops.logical_or(theirs < mine, ops.logical_and(theirs == mine, earlier))
    rank = ops.sum(ops.cast(ops.logical_and(peers, before), "float32"), axis=-1)
    # Less a little, so that 0.1 of 20 is 2 in float32 too.
    least = ops.ceil(class_floor * ops.sum(ops.cast(peers, "float32"), axis=-1) - 1e-4)
    return ops.logical_or(accept_mask, ops.logical_and(finite, rank < least))
