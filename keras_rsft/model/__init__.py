"""`RSFTModel` and its parts: per-sample losses, selection metrics, training step.

`replicas.py` is the step on several devices, `replica_rules.py` what is refused there.
"""

from keras_rsft.model.rsft_model import RSFTModel
from keras_rsft.model.second_pass import TwoPassRSFTModel
from keras_rsft.model.selection import AcceptanceGuard
from keras_rsft.model.soft_targets import SoftTargets

__all__ = ["AcceptanceGuard", "RSFTModel", "SoftTargets", "TwoPassRSFTModel"]
