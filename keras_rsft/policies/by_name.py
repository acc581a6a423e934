"""Makes a policy from its name and numbers."""

from __future__ import annotations

import math

from keras_rsft.policies.by_loss import AcceptAll, KeepFraction, LossThreshold
from keras_rsft.policies.policy import Policy
from keras_rsft.policy_choice import PolicyChoice


def build_policy(
    choice: PolicyChoice, *, num_classes: int, steps_per_epoch: int
) -> Policy:
    """Returns the policy that a choice by name means for one data set.

    Args:
        choice: Name and numbers, in units free of the data set's size; not `"auto"`,
            which needs an examination of the data.
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
