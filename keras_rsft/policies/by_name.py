"""Makes a policy from its name and numbers."""

from __future__ import annotations

import math

from keras_rsft.policies.adaptive import LossMixture, RunningThreshold, SelfPaced
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
    threshold = choice.threshold
    if threshold is None:
        threshold = choice.relative_threshold * math.log(num_classes)
    floor = {"class_floor": choice.class_floor}
    makers = {
        "accept-all": AcceptAll,
        "loss-threshold": lambda: LossThreshold(
            threshold, level=choice.level, warmup_steps=warmup_steps, **floor
        ),
        "keep-fraction": lambda: KeepFraction(
            choice.keep_fraction, ramp_steps=warmup_steps, **floor
        ),
        "self-paced": lambda: SelfPaced(
            threshold, growth_steps=steps_per_epoch, warmup_steps=warmup_steps, **floor
        ),
        "running-threshold": lambda: RunningThreshold(
            num_classes=num_classes, warmup_steps=warmup_steps, **floor
        ),
        "loss-mixture": lambda: LossMixture(
            warmup_epochs=max(math.ceil(choice.warmup_epochs), 1), **floor
        ),
    }
    return makers[choice.name]()
