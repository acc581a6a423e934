"""Decides which samples may update the weights.

Policies see losses, labels and sample numbers only; the room `model` turns their masks
into updates. `rules.py` has the decisions as pure functions, `base.py` what all
policies share, `threshold.py` and `listed.py` the policies.
"""

from keras_rsft.policies.base import Policy
from keras_rsft.policies.listed import AcceptListed, AcceptReviewed, AutoPolicy
from keras_rsft.policies.threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
    build_policy,
)

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
    "build_policy",
]
