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
