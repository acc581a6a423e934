"""Decides which samples may update the weights.

Policies see losses, labels and sample numbers only; the room `model` turns their masks
into updates. `decisions.py` has the decisions as pure functions, `policy.py` what all
policies are, `by_loss.py` and `listed.py` the policies, `by_name.py` makes one from its
name.
"""

from keras_rsft.policies.by_loss import AcceptAll, KeepFraction, LossThreshold
from keras_rsft.policies.by_name import build_policy
from keras_rsft.policies.decisions import (
    accept_batch_below,
    accept_below,
    keep_smallest,
    ramped_keep_fraction,
)
from keras_rsft.policies.listed import AcceptListed, AutoPolicy
from keras_rsft.policies.policy import Policy

__all__ = [
    "AcceptAll",
    "AcceptListed",
    "AutoPolicy",
    "KeepFraction",
    "LossThreshold",
    "Policy",
    "accept_batch_below",
    "accept_below",
    "build_policy",
    "keep_smallest",
    "ramped_keep_fraction",
]
