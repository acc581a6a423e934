"""Which validation samples a policy would accept, were they training samples.

Judged by the policy's own code, on losses of the model as it is, in batches of the size
of a training batch, and without changing anything in the policy. What it needs to know
of a sample beside the loss must come from training: a policy that goes by a list of
training samples is given a list of the validation samples made in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from keras_rsft.examination import Examination
from keras_rsft.policies import (
    AcceptListed,
    AcceptReviewed,
    AutoPolicy,
    Policy,
    RunningThreshold,
)

Judge = Callable[[np.ndarray], np.ndarray]


def validation_judge(
    policy: Policy,
    labels: np.ndarray,
    *,
    batch_size: int,
    examination: Examination | None = None,
    chosen: np.ndarray | None = None,
    seed: int = 0,
) -> Judge | None:
    """Returns what judges validation samples by their losses, or None.

    None for a policy that judges whole batches, since then no single sample is
    accepted, and for a list of training samples that says nothing about others.

    Args:
        policy: The policy of the training.
        labels: int32 array `(m,)`, the given labels of the validation samples.
        batch_size: Samples in a training batch, at least 1.
        examination: For `AutoPolicy`, made with these validation samples held out.
        chosen: Positions of the samples among those held out. Default: all of them.
        seed: Deals the samples to batches. Default 0.

    Returns:
        A function from losses, float32 `(m,)`, to a boolean array `(m,)`.
    """
    if isinstance(policy, AcceptReviewed):  # Of the training samples.
        policy = policy.policy
    if policy.level != "sample":
        return None
    judging = policy
    if isinstance(policy, AutoPolicy):
        if examination is None or not examination.judges_held_out:
            return None
        judging = _listed_like(policy, examination.held_out_mask(), chosen)
        if judging is None:
            return lambda losses: np.zeros(len(labels), bool)
    elif isinstance(policy, AcceptListed):
        return None
    places = _batches(len(labels), batch_size, seed)
    if isinstance(policy, RunningThreshold):  # Its statistics are of one batch.
        places = np.arange(len(labels))
    listed_as = places if chosen is None else chosen[places]

    def judge(losses: np.ndarray) -> np.ndarray:
        inside = places >= 0
        shown = np.where(inside, losses[places], np.float32("nan"))
        with keras.StatelessScope():  # Judging changes no running statistics.
            last = np.asarray(policy.steps_seen) - 1  # As the last batch was judged.
            judging.steps_seen.assign(last)
            mask = np.asarray(judging(shown, labels[places], np.maximum(listed_as, 0)))
        accepted = np.zeros(len(labels), bool)
        accepted[places[inside]] = mask[inside]
        return accepted

    return judge


def _listed_like(
    policy: AutoPolicy, listed: np.ndarray, chosen: np.ndarray | None
) -> AutoPolicy | None:
    """Returns the same policy for another list, or None where that is empty."""
    own = listed if chosen is None else listed[chosen]
    if not own.any():
        return None
    config = policy.get_config()
    twin = AutoPolicy(
        len(listed), **{name: config[name] for name in ("loss_limit", "warmup_steps")}
    )
    twin.listed.assign(listed)
    twin.loss_limit.assign(policy.loss_limit)
    return twin


def _batches(count: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns positions `(batches, batch_size)`, shuffled, -1 behind the last."""
    batches = -(-count // batch_size)
    places = np.full(batches * batch_size, -1)
    places[:count] = np.random.default_rng(seed).permutation(count)
    return places.reshape(batches, batch_size)
