"""Decides which samples may update the weights.

Policies see losses, labels and sample numbers only; the room `model` turns their masks
into updates. `decisions.py` has the decisions as pure functions, `policy.py` what all
policies are, `by_loss.py`, `adaptive.py` and `listed.py` the policies, `by_name.py`
makes one from its name.
"""

from keras_rsft.policies.adaptive import LossMixture, RunningThreshold, SelfPaced
from keras_rsft.policies.by_loss import AcceptAll, KeepFraction, LossThreshold
from keras_rsft.policies.by_name import build_policy
from keras_rsft.policies.decisions import (
    accept_batch_below,
    accept_below,
    grown_threshold,
    keep_smallest,
    ramped_keep_fraction,
    running_moments,
    running_percentile,
    threshold_from_moments,
    threshold_from_percentile,
    with_class_floor,
)
from keras_rsft.policies.listed import AcceptListed, AcceptReviewed, AutoPolicy
from keras_rsft.policies.policy import Policy

__all__ = [
    "AcceptAll",
    "AcceptListed",
    "AcceptReviewed",
    "AutoPolicy",
    "KeepFraction",
    "LossMixture",
    "LossThreshold",
    "Policy",
    "RunningThreshold",
    "SelfPaced",
    "accept_batch_below",
    "accept_below",
    "build_policy",
    "grown_threshold",
    "keep_smallest",
    "ramped_keep_fraction",
    "running_moments",
    "running_percentile",
    "threshold_from_moments",
    "threshold_from_percentile",
    "with_class_floor",
]
